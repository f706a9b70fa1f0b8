# SPDX-License-Identifier: Apache-2.0
"""Options of what moves bytes, and of what answers for them."""

from oslo_config import cfg

transfer_opts = [
    cfg.IntOpt(
        "stream_length",
        default=32,
        min=1,
        max=64,
        help="MiB in one libvirt stream. libvirtd queues what its disk does not "
        "take in memory, so this bounds what it may hold, and what is sent "
        "again after an error.",
    ),
    cfg.IntOpt(
        "transfer_workers",
        default=2,
        min=1,
        max=8,
        help="Connections that send ranges of disks of one move at once. One "
        "libvirtd does all its TLS in one thread: more than two seldom help.",
    ),
    cfg.IntOpt(
        "max_transfers",
        default=2,
        min=1,
        max=64,
        help="Moves whose disks are copied from this host at once; others wait "
        "before their guests are stopped.",
    ),
    cfg.FloatOpt(
        "queue_timeout",
        default=3600.0,
        min=0,
        max=86400,
        help="Seconds that a move waits for max_transfers. Then it is refused, and "
        "its guest was never stopped.",
    ),
    cfg.IntOpt(
        "bandwidth_mib",
        default=0,
        min=0,
        help="MiB per second that one move may send. 0: no limit.",
    ),
    cfg.IntOpt(
        "host_bandwidth_mib",
        default=0,
        min=0,
        help="MiB per second that all moves of one process of this host may send "
        "together. 0: no limit.",
    ),
    cfg.StrOpt(
        "verify",
        default="full",
        choices=[
            ("full", "every byte at the peer is compared with the source"),
            ("sampled", "blocks drawn at random are compared"),
            ("none", "nothing is compared; what libvirt says is believed"),
        ],
        help="How copies are proven before the source gives an instance up. With "
        "sampled and none the source's volumes stay until a confirmation that "
        "names the risk, and the copies are never used as proven ones.",
    ),
    cfg.BoolOpt(
        "send_ahead",
        default=True,
        help="Send the disks of a running guest before it is stopped, and afterwards "
        "only what it wrote meanwhile: much less downtime, for reading the disks "
        "twice. Turn it off where the disks are slower than the network.",
    ),
    cfg.BoolOpt(
        "flatten_disks",
        default=False,
        help="Send what a guest sees of its disk, as one raw volume, instead of the "
        "layers that the disk consists of. Where the peer's backend holds raw volumes "
        "only, that is done in any case. This process must be able to read the files.",
    ),
    cfg.FloatOpt(
        "retry_timeout",
        default=120.0,
        min=0,
        max=86400,
        help="Seconds that a copy tries again while the peer, or this host's "
        "libvirtd, is away. It goes on where it was.",
    ),
    cfg.IntOpt(
        "resume_age",
        default=3600,
        min=0,
        max=30 * 86400,
        help="Seconds that what a failed move has sent stays at the peer, with its "
        "room reserved, so that the next attempt sends only what is missing. 0: "
        "it goes at once.",
    ),
    cfg.BoolOpt(
        "keep_retired",
        default=False,
        help="Keep an instance's volumes when its move away from here is confirmed, "
        "so that moving back sends only what changed. They are never started. When "
        "room is short for a move to here or a new instance, the oldest go first; "
        "`virtmigrate host retired` lists and removes them.",
    ),
]

receiver_opts = [
    cfg.BoolOpt(
        "receiver",
        default=True,
        help="Serve peers' requests in the driver's process. Turn it off where "
        "`virtmigrate receiver` runs.",
    ),
    cfg.BoolOpt(
        "accept_moves",
        default=False,
        help="Let sources finish moves to this host, and have instances given back, "
        "without a compute service here: for the command `virtmigrate`. Whoever may "
        "write to this host's mailbox can then bring instances here.",
    ),
    cfg.FloatOpt(
        "receiver_timeout",
        default=10.0,
        min=0.1,
        max=600,
        help="Seconds within which a peer's receiver has to begin with a request. "
        "After that the copy is read back over the network.",
    ),
    cfg.FloatOpt(
        "receiver_interval",
        default=5.0,
        min=0.1,
        max=60,
        help="Seconds between two looks for requests where changes of the mailbox's "
        "directory cannot be watched; while a transfer is open it looks more often.",
    ),
]
