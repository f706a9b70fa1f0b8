# SPDX-License-Identifier: Apache-2.0
"""What stands against recording files: names, records, other domains, pools."""

import os.path
from collections.abc import Iterable, Iterator

from virtmigrate import domainxml, errors, model, node
from virtmigrate.adopt.pools import Pools
from virtmigrate.adopt.values import Planned
from virtmigrate.backends import base
from virtmigrate.model import Role

NAME_LIMIT = 240
"""Bytes of a record's name: what a file name holds, less ".rec.GENERATION"."""

Users = dict[str, set[tuple[str, bool]]]
"""By file: names of domains, and whether they write to it."""


def problems(here: node.Node, uuid: str, volumes: Iterable[Planned]) -> list[str]:
    """Return all that stands against these volumes of one domain."""
    users, pools = _users(here, uuid), Pools(here.host)
    found: list[str] = []
    seen: dict[str, Planned] = {}
    for volume in volumes:
        found += _name(volume)
        found += _pool(volume, pools)
        found += _used(volume, users)
        found += _recorded(volume, here.files, uuid)
        found += _twin(volume, seen.setdefault(volume.name, volume))
    return found


def existing(backend: base.Backend, name: str) -> model.Volume | None:
    """Return a volume's record; a torn one is of a killed run, and counts as none."""
    try:
        stored = backend.volumes.find(name)
    except (errors.PoolNotFound, errors.RecordBroken):
        return None
    return stored.body if stored else None


# Private


def _name(volume: Planned) -> Iterator[str]:
    name, where = volume.name, volume.label
    if os.path.normpath(volume.path) != volume.path or not name:
        yield f"{where}: {volume.path} is no plain absolute path"
    if not name.isprintable() or " " in name or len(name.encode()) > NAME_LIMIT:
        yield (
            f"{where}: the file name {name!r} cannot name a record (no blanks, at most "
            f"{NAME_LIMIT} bytes): rename the file"
        )


def _pool(volume: Planned, pools: Pools) -> Iterator[str]:
    asleep = pools.asleep(volume.directory)
    if asleep:
        yield (
            f"{volume.label}: pool {asleep} lies at {volume.directory} and is not "
            f"active: `virsh pool-start {asleep}`"
        )


def _used(volume: Planned, users: Users) -> Iterator[str]:
    for name, written in sorted(users.get(volume.path, ())):
        if volume.owner or written:
            yield f"{volume.label}: domain {name} uses {volume.path}, too"


def _recorded(volume: Planned, backend: base.Backend, uuid: str) -> Iterator[str]:
    found = existing(backend, volume.name)
    if found is not None and not _fits(found, volume, uuid):
        yield (
            f"{volume.label}: the name {volume.name} is that of the record of "
            f"{found.path} ({found.format.value}, {found.size} bytes, owner "
            f"{found.owner or 'nobody'}): rename the file"
        )


def _fits(found: model.Volume, volume: Planned, uuid: str) -> bool:
    """Tell whether a record is of a killed run, or of a layer that others share."""
    if (found.path, found.format) != (volume.path, volume.format):
        return False
    if found.owner == uuid:
        return True
    alike = volume.size in (None, found.size) and found.backing == volume.backing
    return not found.owner and not volume.owner and alike


def _twin(volume: Planned, first: Planned) -> Iterator[str]:
    """Compare with the first volume of this name in the same domain."""
    if first is volume:
        return
    if first.path != volume.path:
        yield (
            f"{volume.label}: {volume.path} and {first.path} have one file name, and "
            "records need different ones: rename one of them"
        )
    elif (volume.role, volume.format, volume.backing) != (
        Role.LAYER,
        first.format,
        first.backing,
    ) or first.role is not Role.LAYER:
        yield f"{volume.label}: {volume.path} is also {first.label}"


def _users(here: node.Node, uuid: str) -> Users:
    users: Users = {}
    for other, name in here.domains.all():
        if other == uuid:
            continue
        for disk in domainxml.disks(here.domains.xml(other)):
            for depth, layer in enumerate(disk.chain):
                written = depth == 0 and not disk.readonly
                users.setdefault(layer.source, set()).add((name, written))
    return users
