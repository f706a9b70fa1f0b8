# SPDX-License-Identifier: Apache-2.0
"""A round of hosts with one spare: each, once emptied and patched, is a next target.

Nothing runs the round but the operator. The same command is given on each host in its
turn; it sees in the mailboxes of the hosts before it whether these had theirs, and
refuses otherwise. So an instance moves once, to a host that is patched already.
"""

import hashlib
from collections.abc import Mapping, Sequence

from virtmigrate import drainnote
from virtmigrate.drain import packing
from virtmigrate.drain.values import Item, Packing, Target
from virtmigrate.schema import Struct


class Stage(Struct, frozen=True):
    """One host's turn."""

    host: str
    packing: Packing


def name(hosts: Sequence[str], spare: str) -> str:
    """Return what tells a round from another one; the same on each of its hosts."""
    return hashlib.sha256("\n".join([spare, *hosts]).encode()).hexdigest()[:16]


def before(host: str, hosts: Sequence[str], spare: str) -> tuple[str, ...]:
    """Return where instances of a host may go, the newest first.

    Raises ValueError when the host has no turn.
    """
    if host not in hosts or spare in hosts or len(set(hosts)) != len(hosts):
        raise ValueError(f"{host} has to be one of the hosts, the spare none of them")
    return (*reversed(hosts[: hosts.index(host)]), spare)


def waits_for(
    host: str, hosts: Sequence[str], round_name: str, notes: Mapping[str, object]
) -> str:
    """Return why a host has to wait for its turn; "" when it need not.

    Arguments:
        notes: what the mailboxes of the hosts before it say; None: nothing.
    """
    for other in hosts[: hosts.index(host)]:
        note = notes.get(other)
        if not isinstance(note, drainnote.Note) or note.rolling != round_name:
            return f"{other} had no turn yet: give the same command there first"
        if note.draining:
            return (
                f"{other} is not open yet: patch it, start it, and give `virtmigrate "
                "host drain --stop` there"
            )
    return ""


def plan(
    instances: Mapping[str, Sequence[Item]],
    hosts: Mapping[str, Target],
    spare: Target,
) -> list[Stage]:
    """Return who goes where in a whole round.

    Arguments:
        instances: those of each host, by its name, in the order of their turns.
        hosts: what each has for guests once it is empty.
    """
    bins = packing.Bins([spare])
    stages = []
    for host, items in instances.items():
        stages.append(Stage(host=host, packing=packing.fill(bins, items)))
        staying = set(stages[-1].packing.left)
        bins.add(_left(hosts[host], [item for item in items if item.uuid in staying]))
    return stages


# Private


def _left(host: Target, staying: Sequence[Item]) -> Target:
    """Return what a host has for others when some of its instances stay."""
    taken: dict[str, int] = {}
    for item in staying:
        for share in item.needs(host.name):
            taken[share.backend] = taken.get(share.backend, 0) + share.size
    return Target(
        name=host.name,
        memory=host.memory - sum(item.memory for item in staying),
        rooms=tuple(
            type(share)(
                backend=share.backend, size=share.size - taken.get(share.backend, 0)
            )
            for share in host.rooms
        ),
        groups=(*host.groups, *(group for item in staying for group in item.apart)),
    )
