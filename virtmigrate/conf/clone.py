# SPDX-License-Identifier: Apache-2.0
"""Options of clones."""

from oslo_config import cfg

clone_opts = [
    cfg.BoolOpt(
        "enable_live_clone",
        default=False,
        help="Let running instances be cloned, memory and all. A clone begins as its "
        "source, with all that it has in memory: keys, sessions, secrets. Read "
        "docs/clone.md before. Clones of instances that are off need no leave.",
    ),
    cfg.IntOpt(
        "max_clones",
        default=16,
        min=1,
        max=256,
        help="Clones that one call may ask for.",
    ),
    cfg.FloatOpt(
        "clone_memory_timeout",
        default=3600.0,
        min=1.0,
        max=86400.0,
        help="Seconds until the writing of the source's memory is given up. It runs "
        "meanwhile; one that writes faster than its storage never gets there.",
    ),
    cfg.FloatOpt(
        "clone_identity_timeout",
        default=120.0,
        min=1.0,
        max=3600.0,
        help="Seconds that the agent of a clone has to make it somebody else. Raise it "
        "for guests that are slow to regenerate their keys.",
    ),
    cfg.StrOpt(
        "clone_apart_network",
        default="virtmigrate-apart",
        regex="^[A-Za-z0-9][A-Za-z0-9_-]{0,40}$",
        help="Name of the isolated network of libvirt that clones are plugged into "
        "until they are somebody else. It is made when it is needed: without an "
        "address, without a way out, its ports kept apart.",
    ),
]
