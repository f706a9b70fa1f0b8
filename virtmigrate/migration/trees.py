# SPDX-License-Identifier: Apache-2.0
"""An instance's snapshots on the move: what of them is sent, and what they are there.

Layers that no disk stands on any more, and files of memory, are volumes like others.
What a backend keeps itself stays where both hosts see it, and goes nowhere else.
"""

from collections.abc import Iterator, Mapping

import msgspec

from virtmigrate import domainxml, errors, model
from virtmigrate.migration.landing import Landing
from virtmigrate.model import Role
from virtmigrate.snapshottree import FrozenDisk, Place, Snapshot, Snapshots

Named = Mapping[tuple[str, str], tuple[str, str]]
"""Where (backend, volume) here is at the peer, likewise."""


def memories(record: model.Instance) -> Iterator[model.DiskRef]:
    """Yield the files that snapshots have beside disks, under names of their own.

    Those of memory, and copies of the firmware's variables.
    """
    for each in record.snapshots:
        if each.memory_volume:
            yield model.DiskRef(
                target=f"memory-{each.id}",
                volume=each.memory_volume,
                backend=each.memory_backend,
                role=Role.MEMORY,
            )
        if each.variables_volume:
            yield model.DiskRef(
                target=f"variables-{each.id}",
                volume=each.variables_volume,
                backend=each.variables_backend,
                role=Role.MEMORY,
            )


def layers(record: model.Instance) -> Iterator[model.DiskRef]:
    """Yield what snapshots hold of disks, each volume once."""
    seen = set()
    for disk in _disks(record):
        if disk.place is not Place.OWN and (disk.backend, disk.volume) not in seen:
            seen.add((disk.backend, disk.volume))
            yield model.DiskRef(
                target=disk.target,
                volume=disk.volume,
                backend=disk.backend,
                role=Role.LAYER,
            )


def demand_movable(record: model.Instance, landings: Mapping[str, Landing]) -> None:
    """Raise MigrationRefused for a tree that would not be whole at the peer."""
    for reason in _obstacles(record, landings):
        raise errors.MigrationRefused(instance=record.uuid, reason=reason)


def at_peer(
    snapshots: Snapshots, named: Named, backends: Mapping[str, str]
) -> Snapshots:
    """Return a tree as it is at the peer.

    Arguments:
        named: of what was sent.
        backends: by name, what the peer calls those that both see.
    """
    return tuple(_at_peer(each, named, backends) for each in snapshots)


def change_at_peer(change: model.Change, backends: Mapping[str, str]) -> model.Change:
    """Return a change that is not finished as who takes it over goes on with it."""

    def there(ref: model.DiskRef) -> model.DiskRef:
        name = backends.get(ref.backend, ref.backend)
        return msgspec.structs.replace(ref, backend=name)

    snapshot = change.snapshot and _at_peer(change.snapshot, {}, backends)
    kept = change.kept and _at_peer(change.kept, {}, backends)
    return msgspec.structs.replace(
        change,
        disks=tuple(map(there, change.disks)),
        snapshot=snapshot,
        kept=kept,
        layer=change.layer and there(change.layer),
    )


def obstacles(record: model.Instance, snapshot: Snapshot) -> list[str]:
    """Return what in a snapshot's configuration keeps it on one host.

    Or what would make it another instance's, or give it disks that are none of it.
    """
    texts = filter(None, (snapshot.domain_xml, snapshot.live_xml))
    known = {ref.target for ref in record.disks}
    known |= {disk.target for disk in snapshot.disks}
    return [found for text in texts for found in _amiss(text, record, known)]


def as_here(snapshots: Snapshots) -> Snapshots:
    """Return a tree that came from a peer, without what is that host's only."""
    return tuple(
        msgspec.structs.replace(
            each,
            domain_xml=_as_here(each.domain_xml),
            live_xml=_as_here(each.live_xml) if each.live_xml else None,
        )
        for each in snapshots
    )


# Private


def _amiss(text: str, record: model.Instance, known: set[str]) -> list[str]:
    found = list(domainxml.obstacles(text))
    if domainxml.uuid(text) != record.uuid:
        found.append("it is the configuration of another instance")
    disks = {disk.target for disk in domainxml.disks(text) if disk.chain}
    if disks - known:
        found.append(f"no record has its disks {', '.join(sorted(disks - known))}")
    return found


def _as_here(text: str) -> str:
    return domainxml.with_emulator(domainxml.without_runtime(text), None)


def _disks(record: model.Instance) -> Iterator[FrozenDisk]:
    for snapshot in record.snapshots:
        yield from snapshot.disks


def _obstacles(
    record: model.Instance, landings: Mapping[str, Landing]
) -> Iterator[str]:
    if record.change is not None:
        yield f"its snapshots are not settled: {record.change.what.value}"
    if record.detached:
        volumes = ", ".join(ref.volume for ref in record.detached)
        yield f"a revert detached {volumes}, which no disk of it is any more"
    for each in record.snapshots:
        if found := obstacles(record, each):
            yield f"snapshot {each.name} cannot be carried: {'; '.join(found)}"
    for disk in _disks(record):
        landing = landings.get(disk.target)
        if landing is None:
            yield f"a snapshot holds {disk.target}, which it has no more: delete it"
        elif landing.converted:
            yield f"{disk.target} would become one raw volume, and has snapshots"
        elif disk.place is Place.OWN and not landing.shared:
            yield (
                f"the states of {disk.target} are kept by backend {disk.backend}, "
                "and do not leave it: delete its snapshots"
            )


def _at_peer(each: Snapshot, named: Named, backends: Mapping[str, str]) -> Snapshot:
    def there(backend: str, volume: str) -> tuple[str, str]:
        return named.get((backend, volume), (backends.get(backend, backend), volume))

    disks = []
    for disk in each.disks:
        backend, volume = there(disk.backend, disk.volume)
        disks.append(msgspec.structs.replace(disk, backend=backend, volume=volume))

    def file_there(backend: str, volume: str) -> tuple[str, str]:
        return there(backend, volume) if volume else (backend, volume)

    memory = file_there(each.memory_backend, each.memory_volume)
    variables = file_there(each.variables_backend, each.variables_volume)
    return msgspec.structs.replace(
        each,
        disks=tuple(disks),
        memory_backend=memory[0],
        memory_volume=memory[1],
        variables_backend=variables[0],
        variables_volume=variables[1],
    )
