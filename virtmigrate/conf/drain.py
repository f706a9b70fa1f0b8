# SPDX-License-Identifier: Apache-2.0
"""Options of emptying a host."""

from oslo_config import cfg, types

drain_opts = [
    cfg.ListOpt(
        "drain_policy",
        default=["live"],
        item_type=types.String(choices=["live", "postcopy", "cold", "stop", "leave"]),
        help="How instances leave a host that is drained, first choice first; an "
        "instance's own policy goes before. One way by default, the one that is "
        "practised with every drain: what falls back to a way that nobody tried for "
        "months finds its faults at the worst time.",
    ),
    cfg.IntOpt(
        "drain_concurrency",
        default=2,
        min=1,
        max=64,
        help="Instances that leave a host at once. Of those whose disks are copied "
        "max_transfers are on their way at once.",
    ),
    cfg.IntOpt(
        "drain_target_concurrency",
        default=1,
        min=1,
        max=64,
        help="Instances that go to one host at once. libvirtd does all TLS in one "
        "thread, so more than one of them slow each other down.",
    ),
    cfg.IntOpt(
        "drain_tries",
        default=2,
        min=1,
        max=10,
        help="Times that each way is tried before the next one that the policy names.",
    ),
    cfg.FloatOpt(
        "drain_move_timeout",
        default=6 * 3600.0,
        min=10,
        max=7 * 86400,
        help="Seconds that one try may take until the hand-over begins. Then it is "
        "undone, and the guest runs here again.",
    ),
    cfg.StrOpt(
        "drain_order",
        default="fill",
        choices=[
            ("fill", "few hosts, full ones first: what is large still finds room"),
            ("spread", "all hosts alike"),
        ],
        help="How instances are distributed over the hosts that they may go to.",
    ),
    cfg.IntOpt(
        "drain_memory_reserve_mib",
        default=1024,
        min=0,
        help="MiB of memory that a drain leaves free at each host it fills, for the "
        "host itself and for QEMU beside its guest's memory.",
    ),
]
