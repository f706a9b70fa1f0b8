# SPDX-License-Identifier: Apache-2.0
"""What the journals of live moves say.

At the source:

    begun       what the instance was; nothing is touched yet
    reserving   the transfer's record may stand at the peer
    leaving     the record says so, and the tenure names the peer beside this host
    migrating   libvirt may be at it
    giving      the source's QEMU is gone for good; the right may be given up
    given       it is: the transfer says TAKEN
    settled     so does the peer: its volumes are durable
    taken back  the right is here again: the transfer says WITHDRAWN
    lost        another host took it over: it is off, here and at the peer
    restored    the instance is what it was here; what is left is owed at the peer

At the peer:

    begun       it waits for this operation
    expected    its volumes are made, and the transfer says how it is to be here
    taken       it has the right
    started     the guest was let go on, or started anew
"""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from virtmigrate import model
from virtmigrate.journal import Journal, load_all
from virtmigrate.migration import facts

DEPARTURE = "live departure"
ARRIVAL = "live arrival"


def journals(directory: Path, kind: str) -> Iterator[Journal]:
    """Yield the journals of one kind, the oldest first."""
    for journal in load_all(directory):
        if facts.facts(journal, "begun").get("kind") == kind:
            yield journal


def begin(
    directory: Path,
    kind: str,
    transfer: model.Transfer,
    original: model.Instance,
    cards: dict[str, model.BackendCard],
) -> Journal:
    """Begin a journal."""
    return Journal.create(
        directory,
        transfer.operation,
        kind=kind,
        instance=original.uuid,
        dest=transfer.peer,
        original=msgspec.json.encode(original).decode(),
        transfer=msgspec.json.encode(transfer).decode(),
        cards=msgspec.json.encode(cards).decode(),
    )
