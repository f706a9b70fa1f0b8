# SPDX-License-Identifier: Apache-2.0
"""Options of transient disks."""

from oslo_config import cfg

transient_opts = [
    cfg.IntOpt(
        "transient_limit_mib",
        default=0,
        min=0,
        max=1 << 30,
        help="MiB that the layer over a transient disk takes at most, its tables (a "
        "few hundred KiB) included. A guest that needs more is paused by QEMU as on a "
        "full disk; turned off, it loses the layer and begins anew. 0: as large as the "
        "disk, which always suffices; set it where several guests share little room.",
    ),
]
