# SPDX-License-Identifier: Apache-2.0
"""An instance's snapshots as values, and the tree that they make.

Words and dimensions are those of Eric Blake's proposal for libvirt (2011): a disk
snapshot or a checkpoint; each disk's state inside or outside of its volume; the VM
state none, inside or outside.
"""

import enum
import re
from collections.abc import Collection, Iterator

import msgspec

from virtmigrate.schema import Struct


class Kind(enum.Enum):
    """What going back to it brings back."""

    DISK = "disk"
    """The disks. The configuration stays as it is, unless asked for."""
    CHECKPOINT = "checkpoint"
    """The disks and the configuration, and the memory if it has one."""


class Place(enum.Enum):
    """Where the state of a disk is kept."""

    INTERNAL = "internal"
    """In the same qcow2 volume, under the snapshot's id."""
    EXTERNAL = "external"
    """The volume itself is frozen, and the guest writes to a layer over it."""
    OWN = "own"
    """The backend keeps it: a snapshot of LVM or RBD, named by the snapshot's id."""


class Memory(enum.Enum):
    """Where the VM state is."""

    NONE = "none"
    INTERNAL = "internal"
    """In the first qcow2 volume with an internal state."""
    EXTERNAL = "external"
    """In a volume of its own."""


class Taken(enum.Enum):
    """What the guest did when it was taken."""

    OFF = "off"
    PAUSED = "paused"
    RUNNING = "running"


class Consistency(enum.Enum):
    """What a guest finds that starts from it."""

    CRASH = "crash"
    """What a power cut would have left."""
    FILES = "file system"
    """The guest's agent had frozen its file systems."""
    MEMORY = "memory"
    """All: it goes on where it was."""


class FrozenDisk(Struct, frozen=True):
    """The state of one disk."""

    target: str
    backend: str
    volume: str
    """What holds it."""
    place: Place
    size: int
    """Virtual size at the time, in bytes."""


class Snapshot(Struct, frozen=True):
    """One snapshot of an instance."""

    id: str
    """16 hex digits: what it is called where names cannot be chosen."""
    name: str
    kind: Kind
    disks: tuple[FrozenDisk, ...]
    """Those that it froze; others were left out."""
    memory: Memory
    taken: Taken
    consistency: Consistency
    domain_xml: str
    """The whole configuration that the next start would have used."""
    created: float
    """Seconds since the epoch."""
    by: str
    """The request or the user that made it."""
    parent: str | None = None
    """The id of the one that it was taken after."""
    live_xml: str | None = None
    """The configuration that its memory fits, where that is kept."""
    memory_backend: str = ""
    memory_volume: str = ""
    description: str = ""
    automatic: bool = False
    """Nobody will ask for it: it may go where chains get too deep."""
    variables_backend: str = ""
    variables_volume: str = ""
    """A copy of the firmware's variables, where it has some."""


Snapshots = tuple[Snapshot, ...]

IN_THE_MAKING = "image in the making "
"""What `by` begins with of one that is there only until an image was made of it."""


def find(snapshots: Snapshots, key: str) -> Snapshot | None:
    """Return the one of this name or id."""
    for each in snapshots:
        if key in (each.name, each.id):
            return each
    return None


def children(snapshots: Snapshots, parent: str | None) -> Snapshots:
    """Return those that were taken after one, the oldest first; None: the roots."""
    found = [each for each in snapshots if each.parent == parent]
    return tuple(sorted(found, key=lambda each: each.created))


def descendants(snapshots: Snapshots, parent: str) -> Iterator[Snapshot]:
    """Yield all that stand on one; each after those that stand on it."""
    for child in children(snapshots, parent):
        yield from descendants(snapshots, child.id)
        yield child


def without(snapshots: Snapshots, gone: Collection[str]) -> Snapshots:
    """Return a tree without some ids: their children stand on what they stood on."""
    return tuple(
        _moved(each, remaining_parent(snapshots, each.parent, gone))
        for each in snapshots
        if each.id not in gone
    )


def remaining_parent(
    snapshots: Snapshots, parent: str | None, gone: Collection[str]
) -> str | None:
    """Return the nearest of one and those that it stands on that is not gone."""
    while parent is not None and parent in gone:
        found = find(snapshots, parent)
        parent = found.parent if found else None
    return parent


def volumes(snapshots: Snapshots, *places: Place) -> set[tuple[str, str]]:
    """Return (backend, volume) of the disks that they hold in some places."""
    return {
        (disk.backend, disk.volume)
        for each in snapshots
        for disk in each.disks
        if disk.place in places
    }


def memories(snapshots: Snapshots) -> set[tuple[str, str]]:
    """Return (backend, volume) of the files that they hold outside of disks.

    Of memory, and of the firmware's variables.
    """
    found = {(each.memory_backend, each.memory_volume) for each in snapshots}
    found |= {(each.variables_backend, each.variables_volume) for each in snapshots}
    return found - {("", "")}


def is_inside(snapshot: Snapshot) -> bool:
    """Tell whether it keeps anything inside of volumes."""
    return any(disk.place is Place.INTERNAL for disk in snapshot.disks)


def problem(snapshots: Snapshots, current: str | None) -> str | None:
    """Return why these are no tree; None if they are one."""
    ids = [each.id for each in snapshots]
    names = [each.name for each in snapshots]
    if not all(_ID.fullmatch(each) for each in ids) or len(set(ids)) != len(ids):
        return "their ids are not unique, or not 16 hex digits"
    if not all(map(is_name, names)) or len(set(names)) != len(names):
        return "their names are not unique, or no names"
    if not {current, *(each.parent for each in snapshots)} <= {None, *ids}:
        return "one stands on a snapshot that is not there"
    reached: set[str | None] = {None}
    for _ in ids:
        reached |= {each.id for each in snapshots if each.parent in reached}
    return None if reached == {None, *ids} else "they stand on each other in a circle"


def images(snapshots: Snapshots) -> Snapshots:
    """Return those that go as soon as an image was made of them."""
    return tuple(each for each in snapshots if each.by.startswith(IN_THE_MAKING))


def is_name(text: str) -> bool:
    """Tell whether a snapshot may be called so."""
    return _NAME.fullmatch(text) is not None


def with_volume(snapshots: Snapshots, backend: str, old: str, new: str) -> Snapshots:
    """Return a tree in which one volume holds what another one did."""
    return tuple(_with_volume(each, backend, old, new) for each in snapshots)


# Private

_ID = re.compile(r"[0-9a-f]{16}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _moved(each: Snapshot, parent: str | None) -> Snapshot:
    return msgspec.structs.replace(each, parent=parent)


def _with_volume(each: Snapshot, backend: str, old: str, new: str) -> Snapshot:
    disks = tuple(
        msgspec.structs.replace(disk, volume=new)
        if (disk.backend, disk.volume) == (backend, old)
        else disk
        for disk in each.disks
    )
    return msgspec.structs.replace(each, disks=disks)
