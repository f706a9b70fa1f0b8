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
    cfg.IntOpt(
        "warn_chain",
        default=8,
        min=0,
        max=100,
        help="Layers that a disk may stand on before the log, and "
        "`virtmigrate snapshot list`, say that it gets slow; 0: they never do.",
    ),
    cfg.IntOpt(
        "max_snapshot_space",
        default=0,
        min=0,
        max=1024 * 1024,
        help="GiB that the layers and files of memory of one instance may take before "
        "the next snapshot is refused; 0: no limit. What is kept inside of volumes, or "
        "by their backend, is not counted, and nor is the lowest volume of a disk.",
    ),
    cfg.IntOpt(
        "flatten_chain",
        default=0,
        min=0,
        max=100,
        help="Layers that a disk may stand on before its automatic snapshots, the "
        "oldest first, are deleted while settling; 0: none is. Others stay.",
    ),
    cfg.StrOpt(
        "flatten_by",
        default="merge",
        choices=[
            ("merge", "automatic snapshots are deleted, and their layers merged"),
            (
                "pull",
                "so they are; where that is not enough, the active layer gets all that "
                "it stands on, down to an image of the cache. That takes the room of a "
                "whole disk, and reads and writes as much",
            ),
        ],
        help="How a chain that is deeper than flatten_chain is made shorter.",
    ),
]
