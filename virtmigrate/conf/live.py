# SPDX-License-Identifier: Apache-2.0
"""Options of live migration."""

from oslo_config import cfg

live_opts = [
    cfg.FloatOpt(
        "live_downtime",
        default=0.3,
        min=0.001,
        max=60,
        help="Seconds that a guest may stand still for the last of its memory. A live "
        "migration begins with this; where it stalls, more is allowed step by step.",
    ),
    cfg.FloatOpt(
        "live_downtime_limit",
        default=2.0,
        min=0.001,
        max=600,
        help="Seconds that a stalled live migration may raise live_downtime to.",
    ),
    cfg.FloatOpt(
        "live_stall",
        default=30.0,
        min=0.5,
        max=3600,
        help="Seconds without less left to send than ever before after which a live "
        "migration counts as stalled.",
    ),
    cfg.StrOpt(
        "live_stalled",
        default="give up",
        choices=[
            ("give up", "the migration is rolled back; the guest runs on undisturbed"),
            ("pause", "the guest is paused on the source, so that what is left ends"),
        ],
        help="What is done with a live migration that stalls although all of "
        "live_downtime_limit was allowed.",
    ),
    cfg.FloatOpt(
        "live_timeout",
        default=3600.0,
        min=1,
        max=7 * 86400,
        help="Seconds until a live migration that has not ended is rolled back.",
    ),
    cfg.IntOpt(
        "live_bandwidth_mib",
        default=0,
        min=0,
        max=1000000,
        help="MiB per second that one live migration may send. 0: no limit.",
    ),
    cfg.IntOpt(
        "live_parallel",
        default=0,
        min=0,
        max=64,
        help="Connections that memory is sent over at once (multifd); 0: one, without "
        "it. QEMU encrypts each in a thread of its own.",
    ),
    cfg.BoolOpt(
        "live_auto_converge",
        default=False,
        help="Let QEMU slow a guest down that writes to its memory faster than "
        "that can be sent.",
    ),
    cfg.BoolOpt(
        "live_tls",
        default=True,
        help="Send memory and disks by TLS, by the certificates of QEMU "
        "(/etc/pki/qemu). Turn it off only where the network itself encrypts.",
    ),
    cfg.StrOpt(
        "live_uri",
        default="tcp://{dest}",
        help="Where a peer's QEMU takes memory and disks; {dest} is the peer's name. "
        "Its certificate has to be of the host that stands here.",
    ),
]
