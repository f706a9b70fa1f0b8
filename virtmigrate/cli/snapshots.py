# SPDX-License-Identifier: Apache-2.0
"""What is shown of snapshots: rows of a tree, and all of one."""

import datetime
from typing import Any

import cliff.columns

from virtmigrate import errors, model, node, snapshottree, units
from virtmigrate.cli import tree
from virtmigrate.snapshottree import Snapshot, Snapshots

COLUMNS = ("name", "kind", "disks", "memory", "taken", "consistency", "created")
MORE = ("id", "parent", "current", "description")
"""What rows have and the picture shows otherwise, or not."""


def drawn(
    snapshots: Snapshots, current: str | None, marks: tree.Marks
) -> list[tuple[Any, ...]]:
    """Return rows of COLUMNS with the picture in the first one."""
    if not snapshots:
        return []
    return [
        (line, *_cells(each)) for line, each in tree.lines(snapshots, current, marks)
    ]


def rows(snapshots: Snapshots, current: str | None) -> list[tuple[Any, ...]]:
    """Return rows of COLUMNS and MORE, in the order of their making."""
    return [
        (
            each.name,
            *_cells(each),
            each.id,
            _name(snapshots, each.parent),
            each.id == current,
            each.description,
        )
        for each in snapshots
    ]


def everything(here: node.Node, record: model.Instance, key: str) -> dict[str, Any]:
    """Return all that is recorded of a snapshot; SnapshotNotFound."""
    found = snapshottree.find(record.snapshots, key)
    if found is None:
        raise errors.SnapshotNotFound(
            instance=record.uuid, host=here.name, snapshot=key
        )
    children = snapshottree.children(record.snapshots, found.id)
    return {
        "name": found.name,
        "id": found.id,
        "description": found.description,
        "automatic": found.automatic,
        "kind": found.kind.value,
        "disks": _Disks([_disk(here, each) for each in found.disks]),
        "memory": found.memory.value,
        "memory file": _Memory(_memory_file(here, found)),
        "taken": found.taken.value,
        "consistency": found.consistency.value,
        "created": _time(found.created),
        "by": found.by,
        "parent": _name(record.snapshots, found.parent),
        "children": _Names([each.name for each in children]),
        "current": found.id == record.current,
    }


# Private


class _Names(cliff.columns.FormattableColumn[list[str]]):
    def human_readable(self) -> str:
        return ", ".join(self._value)


class _Disks(cliff.columns.FormattableColumn[list[dict[str, Any]]]):
    def human_readable(self) -> str:
        return "\n".join(map(_told, self._value))


class _Memory(cliff.columns.FormattableColumn[dict[str, Any] | None]):
    def human_readable(self) -> str:
        if self._value is None:
            return ""
        size = units.format_bytes(self._value["size"])
        return f"{self._value['volume']} in {self._value['backend']}, {size}"


def _told(disk: dict[str, Any]) -> str:
    size, takes = (units.format_bytes(disk[key]) for key in ("size", "takes"))
    where = f"{disk['volume']} in {disk['backend']}"
    return f"{disk['target']} {disk['place']}: {where}, {size}, takes {takes}"


def _disk(here: node.Node, frozen: snapshottree.FrozenDisk) -> dict[str, Any]:
    backend = here.backend(frozen.backend)
    volume = backend.volumes.read(frozen.volume).body
    return {
        "target": frozen.target,
        "place": frozen.place.value,
        "backend": frozen.backend,
        "volume": frozen.volume,
        "size": frozen.size,
        "takes": backend.pool(volume.pool).allocated(volume.name),
    }


def _memory_file(here: node.Node, found: Snapshot) -> dict[str, Any] | None:
    if not found.memory_volume:
        return None
    backend, name = found.memory_backend, found.memory_volume
    size = here.backend(backend).volumes.read(name).body.size
    return {"backend": backend, "volume": name, "size": size}


def _cells(each: Snapshot | None) -> tuple[str, ...]:
    """Return all of COLUMNS but the name."""
    if each is None:
        return ("",) * (len(COLUMNS) - 1)
    return (
        each.kind.value,
        ", ".join(f"{disk.target} {disk.place.value}" for disk in each.disks),
        each.memory.value,
        each.taken.value,
        each.consistency.value,
        _time(each.created),
    )


def _name(snapshots: Snapshots, key: str | None) -> str | None:
    found = snapshottree.find(snapshots, key) if key else None
    return found.name if found else None


def _time(seconds: float) -> str:
    at = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return at.strftime("%Y-%m-%d %H:%M:%SZ")
