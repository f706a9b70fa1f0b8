# SPDX-License-Identifier: Apache-2.0
"""What snapshots may take: their number, their space, room, and layers in a row."""

from collections.abc import Iterator
from dataclasses import dataclass

from virtmigrate import model, node
from virtmigrate.backends import base
from virtmigrate.model import Role
from virtmigrate.snapshot.work import FIXED, Layers, Work
from virtmigrate.snapshottree import FrozenDisk, Memory, Place
from virtmigrate.units import GiB, MiB, format_bytes

_DOING = "a snapshot"

_LAYER = MiB
"""Bytes that a new layer takes, its tables and its record; some 200 KiB did."""
_SLACK = 64 * MiB
"""Bytes that a file of memory has beside the guest's own: devices, firmware, video."""


@dataclass(frozen=True)
class Depth:
    """How many volumes a disk stands on each other, itself counted."""

    target: str
    count: int
    backend: base.Backend
    top: str


@dataclass(frozen=True)
class Asked:
    """What a snapshot would take."""

    frozen: tuple[FrozenDisk, ...]
    layers: Layers
    memory: Memory


def demand(work: Work, found: model.Instance, asked: Asked) -> None:
    """Raise SnapshotRefused for what would be more than is allowed, or than fits."""
    _demand_count(work, found)
    _demand_chains(work, asked)
    _demand_space(work, found, asked)
    _demand_room(work, found, asked)


def depths(here: node.Node, found: model.Instance) -> Iterator[Depth]:
    """Yield how deep the disks that snapshots can freeze by layers stand.

    Nothing of an instance that has no snapshots.
    """
    if not found.snapshots:
        return
    for ref in found.disks:
        backend = here.backend(ref.backend)
        if ref.role not in FIXED and backend.capabilities.overlays:
            count = len(backend.chain(ref.volume))
            yield Depth(ref.target, count, backend, ref.volume)


def slow(here: node.Node, found: model.Instance) -> Iterator[str]:
    """Yield what is to be said of chains that get slow (`warn_chain`)."""
    limit = here.options.warn_chain
    for each in depths(here, found):
        if limit and each.count > limit:
            yield (
                f"instance {found.uuid} on {here.name}: {each.target} stands on "
                f"{each.count} layers, and more than {limit} are slow (warn_chain; "
                f"max_chain is {here.options.max_chain}): delete snapshots that it "
                "stands on, or set flatten_chain"
            )


def taken(work: Work) -> int:
    """Return the bytes that an instance's layers and files of memory take.

    What lies inside of a volume, or is kept by its backend, cannot be told apart.
    """
    total, owned = 0, work.owned()
    ours = {(backend.name, volume.name) for backend, volume in owned}
    for backend, volume in owned:
        is_layer = (backend.name, volume.backing) in ours
        if is_layer or volume.role is Role.MEMORY:
            total += backend.pool(volume.pool).allocated(volume.name)
    return total


# Private


def _demand_count(work: Work, found: model.Instance) -> None:
    limit = work.here.options.max_snapshots
    if len(found.snapshots) >= limit:
        raise work.refused(
            _DOING, f"it has {len(found.snapshots)} (max_snapshots): delete some"
        )


def _demand_chains(work: Work, asked: Asked) -> None:
    limit = work.here.options.max_chain
    for disk in asked.frozen:
        depth = len(work.backend(disk).chain(disk.volume))
        if disk.place is Place.EXTERNAL and depth >= limit:
            raise work.refused(
                _DOING,
                f"{disk.target} has {depth} layers (max_chain): delete snapshots "
                "that it stands on",
            )


def _demand_space(work: Work, found: model.Instance, asked: Asked) -> None:
    limit = work.here.options.max_snapshot_space * GiB
    if not limit:
        return
    now, more = taken(work), _memory_size(found, asked)
    if now + more >= limit:
        raise work.refused(
            _DOING,
            f"its layers and files of memory take {format_bytes(now)}, "
            f"{format_bytes(more)} would come to that, and {format_bytes(limit)} are "
            "allowed (max_snapshot_space): delete some",
        )


def _demand_room(work: Work, found: model.Instance, asked: Asked) -> None:
    """Refuse what would fill a storage, also that of other instances."""
    needs: dict[str, int] = {}
    for name, _ in asked.layers:
        needs[name] = needs.get(name, 0) + _LAYER
    if asked.memory is not Memory.NONE:
        inside = asked.memory is Memory.INTERNAL and asked.frozen
        name = asked.frozen[0].backend if inside else work.here.files.name
        needs[name] = needs.get(name, 0) + _memory_size(found, asked)
    for name, need in needs.items():
        demand_room(work, _DOING, work.here.backend(name), need)


def demand_room(work: Work, doing: str, backend: base.Backend, need: int) -> None:
    """Raise SnapshotRefused where a backend has not so many bytes free."""
    room = work.here.room(backend)
    if room is None:
        raise work.refused(doing, f"backend {backend.name} is down")
    free = max(0, room.free - backend.settings.reserved)
    if free < need:
        raise work.refused(
            doing,
            f"backend {backend.name} has room for {format_bytes(free)}, and "
            f"{format_bytes(need)} are needed. Make room there",
        )


def _memory_size(found: model.Instance, asked: Asked) -> int:
    return found.memory + _SLACK if asked.memory is not Memory.NONE else 0
