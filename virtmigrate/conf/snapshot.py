# SPDX-License-Identifier: Apache-2.0
"""Options of snapshots."""

from oslo_config import cfg

snapshot_opts = [
    cfg.IntOpt(
        "max_snapshots",
        default=64,
        min=1,
        max=1000,
        help="Snapshots that an instance may have. Each keeps a copy of its "
        "configuration in the instance's record, which has 8 MiB at most.",
    ),
    cfg.IntOpt(
        "max_chain",
        default=16,
        min=2,
        max=100,
        help="Layers that a disk may stand on. Each makes a read that finds nothing "
        "slower, and takes memory of QEMU for its tables.",
    ),
]
