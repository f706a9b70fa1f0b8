# SPDX-License-Identifier: Apache-2.0
"""What can be frozen how: one table, which the code asks and the docs print."""

import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from virtmigrate.backends.terms import Capabilities
from virtmigrate.formats import DiskFormat
from virtmigrate.snapshottree import Memory, Place, Taken


@dataclass(frozen=True)
class Case:
    """What is asked for."""

    places: frozenset[Place]
    """Of all disks that are not left out."""
    memory: Memory
    taken: Taken
    quiesced: bool = False
    variables: bool = False
    """The firmware keeps variables in a volume of its own (UEFI)."""
    left_out: bool = False
    """A disk that the guest writes to is left out."""


@dataclass(frozen=True)
class Verdict:
    """What comes of it."""

    possible: bool
    said: str
    """How it is done, or why it is refused."""


def place(
    can: Capabilities, fmt: DiskFormat, wanted: Place, *, is_clone: bool = False
) -> Verdict:
    """Tell whether a volume's state can be kept in a place.

    Arguments:
        is_clone: it shares the blocks of another volume of its storage.
    """
    if wanted is Place.OWN and can.snapshots and is_clone and not can.nested:
        return Verdict(False, _NOT_NESTED)
    if wanted is Place.EXTERNAL:
        return _verdict(can.overlays, "a layer is put over it", _NO_LAYERS)
    if wanted is Place.OWN:
        return _verdict(can.snapshots, "the backend keeps it", _NO_STATES)
    inside = can.overlays and fmt is DiskFormat.QCOW2
    return _verdict(inside, "inside of the qcow2 volume", _NOT_INSIDE)


def default_place(can: Capabilities) -> Place:
    """Return where a disk's state is kept if nobody says it."""
    return Place.OWN if can.snapshots and not can.overlays else Place.EXTERNAL


def create(case: Case) -> Verdict:
    """Tell how a snapshot is taken, or why it cannot be."""
    reason = next((why for is_so, why in _OBSTACLES if is_so(case)), None)
    return Verdict(reason is None, reason or _how(case))


def revert(places: Collection[Place], memory: Memory, taken: Taken) -> Verdict:
    """Tell how the disks come back."""
    if Place.INTERNAL in places and memory is not Memory.EXTERNAL:
        return Verdict(True, "libvirt goes back inside of the volumes")
    how = {
        Place.INTERNAL: "libvirt goes back inside of the volumes, off",
        Place.EXTERNAL: "new layers over the frozen volumes",
        Place.OWN: "the backend makes the volumes what they were",
    }
    said = "; ".join(how[each] for each in Place if each in places)
    if memory is Memory.EXTERNAL:
        said += "; the memory is restored from its file, paused, then resumed"
    return Verdict(True, said)


def branch(places: Collection[Place]) -> Verdict:
    """Tell whether several states can go on from a snapshot beside each other."""
    if Place.INTERNAL in places:
        return Verdict(True, "as a revert; what is to stay is kept inside")
    if Place.OWN in places:
        return Verdict(True, "as a revert; what is to stay is kept by the backend")
    return Verdict(True, "a new layer beside those that stand on the same volume")


def delete(places: Collection[Place]) -> Verdict:
    """Tell what becomes of the data."""
    how = {
        Place.INTERNAL: "the state is dropped inside of the volumes",
        Place.EXTERNAL: "the layer is merged into the volume that was frozen, once "
        "one only stands on it; it goes if none does",
        Place.OWN: "the backend drops it",
    }
    return Verdict(True, "; ".join(how[each] for each in Place if each in places))


def cases() -> Iterator[Case]:
    """Yield every case that the table has a line for."""
    sets = [
        frozenset(found)
        for count in (1, 2)
        for found in itertools.combinations(Place, count)
    ]
    for places, memory, taken, quiesced in itertools.product(
        [frozenset[Place](), *sets], Memory, Taken, (False, True)
    ):
        yield Case(places, memory, taken, quiesced)


# Private

_NO_LAYERS = "this backend has no layers; its own snapshots are what it has"
_NO_STATES = "this backend keeps no states itself; a layer is what it has"
_NOT_NESTED = (
    "it is a snapshot of its image itself, and this storage keeps none of such a one; "
    "`clones = copy` makes disks that can have snapshots"
)
_NOT_INSIDE = "only a qcow2 volume keeps a state inside"


def _verdict(possible: bool, how: str, reason: str) -> Verdict:
    return Verdict(possible, how if possible else reason)


def _inside(case: Case) -> bool:
    return Place.INTERNAL in case.places


_OBSTACLES: tuple[tuple[Callable[[Case], bool], str], ...] = (
    (
        lambda c: not c.places and c.memory is Memory.NONE,
        "there is nothing to keep: no disk, and no memory",
    ),
    (
        lambda c: not c.places,
        "memory without its disks is worth nothing once a disk has changed",
    ),
    (
        lambda c: c.taken is Taken.OFF and c.memory is not Memory.NONE,
        "a guest that is off has no memory",
    ),
    (
        lambda c: _inside(c) and (len(c.places) > 1 or c.left_out),
        "QEMU keeps all disks inside of their volumes, or none",
    ),
    (
        lambda c: c.memory is Memory.INTERNAL and not _inside(c),
        "memory is kept inside of a volume only with all disks",
    ),
    (
        lambda c: _inside(c) and c.variables and c.taken is not Taken.OFF,
        "libvirt keeps nothing inside of volumes where the firmware has variables",
    ),
    (
        lambda c: _inside(c) and c.taken is not Taken.OFF and c.memory is Memory.NONE,
        "disks of a running guest are kept inside only with its memory",
    ),
    (
        lambda c: c.quiesced and c.taken is Taken.OFF,
        "a guest that is off has nothing to quiesce",
    ),
    (
        lambda c: c.quiesced and c.taken is Taken.PAUSED,
        "the agent of a paused guest does not answer",
    ),
    (
        lambda c: c.quiesced and c.memory is not Memory.NONE,
        "with the memory all is consistent: a frozen guest would come back frozen",
    ),
)
"""What forbids a case, the plainest first."""


def _how(case: Case) -> str:
    if case.taken is Taken.OFF:
        return _how_off(case)
    steps = ["the agent freezes the file systems"] if case.quiesced else []
    if Place.INTERNAL in case.places:
        steps.append(
            "QEMU keeps disks and memory, the guest paused"
            if case.memory is Memory.INTERNAL
            else "the memory is saved and the guest ends, the disks are kept inside, "
            "and it is restored"
        )
        return ", then ".join(steps)
    if case.memory is Memory.EXTERNAL:
        steps.append("the memory is written while the guest runs")
    if Place.OWN in case.places:
        steps.append("the guest is paused, and the backend keeps the volumes")
    if Place.EXTERNAL in case.places:
        steps.append("QEMU goes on in new layers, all disks in one step")
    return ", then ".join(steps)


def _how_off(case: Case) -> str:
    how = {
        Place.INTERNAL: "libvirt keeps the disks inside",
        Place.EXTERNAL: "the configuration names new layers",
        Place.OWN: "the backend keeps the volumes",
    }
    return "; ".join(how[each] for each in Place if each in case.places)
