# SPDX-License-Identifier: Apache-2.0
"""What all changes of snapshots do: records, layers, states, configuration."""

import itertools
import uuid as uuids
from collections.abc import Callable, Iterable

import msgspec

from virtmigrate import (
    domainstate,
    domainxml,
    errors,
    lending,
    model,
    node,
    scratch,
    snapshottree,
)
from virtmigrate.backends import base, making
from virtmigrate.instance import Power
from virtmigrate.model import Role, VolumeState
from virtmigrate.snapshottree import Memory, Place, Snapshot, Taken

FIXED = (Role.CONFIG, Role.NVRAM)
"""Disks that no snapshot freezes: the guest cannot write to the one, and QEMU keeps
the other with the memory only."""


Layers = tuple[tuple[str, model.Volume], ...]
"""Layers that are to be made, each with the name of its backend."""

Demand = Callable[[str], None]

_TAKEN = {Power.RUNNING: Taken.RUNNING, Power.PAUSED: Taken.PAUSED}


class Work:
    """One instance of this host, under its claim. Not safe to share.

    Arguments:
        demand_no_move: raises InvalidState while a move of an instance is open here.
    """

    def __init__(self, here: node.Node, uuid: str, demand_no_move: Demand) -> None:
        self.here = here
        self.uuid = uuid
        self._demand_no_move = demand_no_move
        self.states = domainstate.States(here.host)

    @property
    def found(self) -> model.Instance:
        """The instance's record, as it is now; NotEntitled if it is not here."""
        return self.here.entitled(self.uuid)

    def backend(self, ref: model.DiskRef | snapshottree.FrozenDisk) -> base.Backend:
        return self.here.backend(ref.backend)

    def volume(self, backend: str, name: str) -> model.Volume:
        return self.here.backend(backend).volumes.read(name).body

    def own(self, backend: str, name: str) -> model.Volume:
        """Return the record of a volume of this instance; SnapshotRefused."""
        found = self.volume(backend, name)
        if found.owner != self.uuid or found.role is Role.IMAGE:
            raise self.refused("a change", f"volume {name} is not this instance's")
        return found

    def owned(self) -> list[tuple[base.Backend, model.Volume]]:
        """Return all volumes of the instance, in any backend that is up.

        Raises RecordError for any record that cannot be read: it may be of a layer
        that stands on one of these.
        """
        return [
            (backend, stored.body)
            for backend in self.here.up()
            for stored in backend.catalog.all(strict=True)
            if stored.body.owner == self.uuid
        ]

    def lent(self) -> set[tuple[str, str]]:
        """Return (backend, volume) of those that other instances' volumes stand on."""
        return {
            (backend.name, name)
            for backend in self.here.up()
            for name in lending.lent(backend, self.uuid)
        }

    def under_layers(self, found: model.Instance) -> set[tuple[str, str]]:
        """Return (backend, volume) of what layers of a guest that runs stand on.

        Those over transient disks: their records name it, and they go when it is off.
        """
        refs = scratch.transient(found)
        if not refs or self.states.is_off(self.uuid):
            return set()
        return {
            (ref.backend, volume.name)
            for ref in refs
            for volume in self.backend(ref).chain(ref.volume)
        }

    def demand_unread(
        self, doing: str, found: model.Instance, ref: model.DiskRef
    ) -> None:
        """Refuse to go on with a change of what a guest was started over since."""
        if (ref.backend, ref.volume) in self.under_layers(found):
            raise self.refused(
                doing,
                f"the guest runs over transient disk {ref.target}, which stands on "
                f"{ref.volume}: turn it off first",
            )

    def taken(self) -> Taken:
        """Return what the guest does; InvalidState for what cannot be frozen."""
        power = self.states.power(self.uuid)
        if power in (Power.SAVED, Power.CRASHED):
            raise self.refused(
                "a snapshot", f"the guest is {power.value}: start it, or turn it off"
            )
        return _TAKEN.get(power, Taken.OFF)

    def refused(self, doing: str, reason: str) -> errors.SnapshotRefused:
        return errors.SnapshotRefused(
            doing=doing, instance=self.uuid, host=self.here.name, reason=reason
        )

    def demand_names(self, doing: str, name: str, layer: str) -> None:
        """Refuse names that are none; layers need not be named."""
        for each in (name, layer) if layer else (name,):
            if not snapshottree.is_name(each):
                raise self.refused(
                    doing,
                    f"{each!r} is no name: letters, digits, dot, dash and underscore, "
                    "64 at most",
                )

    def snapshot(self, key: str) -> Snapshot:
        """Return a snapshot by name or id; SnapshotNotFound."""
        known = snapshottree.find(self.found.snapshots, key)
        if known is None:
            raise errors.SnapshotNotFound(
                instance=self.uuid, host=self.here.name, snapshot=key
            )
        return known

    # The record

    def publish(self, found: model.Instance, **changes: object) -> model.Instance:
        """Publish the instance's next record, and return it.

        Who takes it over, where other hosts see its disks, finds it there, too.
        """
        changed: model.Instance = msgspec.structs.replace(found, **changes)
        self.here.tenures.amend(changed)
        self.here.publish_instance(changed)
        return changed

    def foretell(self, found: model.Instance, **changes: object) -> None:
        """Say what the disks are if this host fails before the next publish()."""
        changed: model.Instance = msgspec.structs.replace(found, **changes)
        self.here.tenures.amend(changed)

    def demand_idle(self, doing: str) -> model.Instance:
        """Return the record while nothing else is open.

        Raises SnapshotRefused; InvalidState for a move, also one that is half undone:
        it brings back the record that it began with.
        """
        self.here.demand_settled(self.uuid)
        self._demand_no_move(self.uuid)
        found = self.found
        if found.cloned and found.cloned.state is model.CloneState.MAKING:
            raise self.refused(doing, "it is a clone that is still being made")
        if found.change is not None:
            raise self.refused(
                doing,
                f"{found.change.what.value} is not finished: `virtmigrate host settle` "
                "goes on with it",
            )
        self.demand_unsaved(doing)
        busy = [] if self.states.is_off(self.uuid) else self.states.busy(self.uuid)
        if busy:
            raise self.refused(doing, f"a block job works on {', '.join(busy)}")
        return found

    def demand_unsaved(self, doing: str, remedy: str | None = None) -> None:
        """Refuse what would change the disks that a saved guest goes on with.

        Arguments:
            remedy: what to do where it cannot just be resumed.
        """
        if self.states.power(self.uuid) is Power.SAVED:
            raise self.refused(
                doing,
                remedy
                or "the guest is saved, with the disks that it has now: resume "
                "it first, or drop its memory (`virsh managedsave-remove`)",
            )

    # Layers

    def layer_over(
        self, ref: model.DiskRef, below: str, prefix: str, operation: str
    ) -> model.Volume:
        """Return the record of a layer that is to be made over a volume."""
        base_volume = self.own(ref.backend, below)
        name = f"{prefix}-{ref.target}" if prefix else ref.target
        return making.layer_over(
            base_volume,
            f"{name}.{operation}",
            role=ref.role,
            size=base_volume.size,
            owner=self.uuid,
            operation=operation,
            origin=self.here.name,
        )

    def make_layers(self, layers: Layers) -> None:
        """Make layers over what the guest does not write to, or will not any more."""
        for name, volume in layers:
            backend = self.here.backend(name)
            below = backend.volumes.read(str(volume.backing)).body
            made = backend.overlay(volume, below)
            backend.persist(made.pool, made.name)
            backend.update(msgspec.structs.replace(made, state=VolumeState.USABLE))

    def settle_layers(self, refs: Iterable[model.DiskRef], operation: str) -> None:
        """Publish that what new layers stand on is frozen."""
        for ref in refs:
            if not ref.volume.endswith(f".{operation}"):
                continue
            backend, layer = self.backend(ref), self.volume(ref.backend, ref.volume)
            below = self.volume(ref.backend, str(layer.backing))
            if below.state is not VolumeState.FROZEN and below.owner == self.uuid:
                frozen = msgspec.structs.replace(below, state=VolumeState.FROZEN)
                backend.update(frozen)

    def drop_made(self, operation: str) -> None:
        """Remove all volumes that were made for an operation."""
        for backend, volume in self.owned():
            if volume.operation == operation and volume.name.endswith(f".{operation}"):
                backend.remove(volume.name)

    def drop_disk(self, ref: model.DiskRef) -> None:
        """Remove a volume that is no disk any more; can be called again.

        One that layers stand on is tidied up as they are.
        """
        backend = self.backend(ref)
        stored = backend.volumes.find(ref.volume)
        if stored is None or stored.body.owner != self.uuid:
            return
        if not backend.users(ref.volume):
            backend.remove(ref.volume)

    # Configuration

    def with_chains(self, text: str, refs: Iterable[model.DiskRef]) -> str:
        """Return a configuration whose disks have the chains that records say."""
        targets = {disk.target for disk in domainxml.disks(text)}
        chains = {
            ref.target: self.backend(ref).layers(ref.volume)
            for ref in refs
            if ref.target in targets
        }
        return domainxml.with_disks(text, chains)

    def define(self, text: str, found: model.Instance) -> None:
        """Define the domain with a record's disks, and the tree in its metadata."""
        values = dict(domainxml.metadata_of(text) or {})
        values["snapshots"] = told(found)
        self.states.define(domainxml.with_metadata(self.as_here(text, found), values))

    def as_here(self, text: str, found: model.Instance) -> str:
        """Return an earlier configuration with what this host has for it now.

        Chains and UEFI variables are the record's; what an interface is plugged into is
        what the domain has.
        """
        if domainxml.uuid(text) != found.uuid:
            raise self.refused("a change", "its configuration is another instance's")
        text = self.with_chains(text, found.disks)
        for ref in found.disks:
            if ref.role is Role.NVRAM:
                (layer,) = self.backend(ref).layers(ref.volume)
                text = domainxml.with_nvram(text, layer.source)
        plugged = {
            each.mac.lower(): each
            for each in domainxml.interfaces(self.states.xml(self.uuid))
        }
        macs = [each.mac.lower() for each in domainxml.interfaces(text)]
        ends = [plugged[mac] for mac in macs if mac in plugged]
        text = domainxml.with_interfaces(text, ends)
        return domainxml.with_transient(
            text, (ref.target for ref in found.disks if ref.transient)
        )

    def described(self, snapshot: Snapshot) -> str:
        """Return libvirt's description of a state inside of volumes."""
        text = snapshot.live_xml or snapshot.domain_xml
        refs = [
            model.DiskRef(
                target=disk.target,
                volume=disk.volume,
                backend=disk.backend,
                role=Role.DATA,
            )
            for disk in snapshot.disks
        ]
        return domainstate.inside_xml(
            snapshot.id,
            snapshot.created,
            snapshot.taken.value if snapshot.memory is Memory.INTERNAL else "off",
            self.with_chains(text, refs),
            memory=snapshot.memory is Memory.INTERNAL,
        )

    def restate(self, disks: Iterable[snapshottree.FrozenDisk]) -> None:
        """Have headers name the chains that records say, of an instance that is off.

        libvirt 9.0 works inside of its volumes by qemu-img then, which opens what they
        name: after a move that may be nothing, or somebody else's. Raises
        SnapshotRefused for a header that cannot be written.
        """
        for disk in disks:
            backend = self.backend(disk)
            chain = backend.chain(disk.volume)
            for above, below in itertools.pairwise(chain):
                try:
                    pool = backend.pool(above.pool)
                    pool.restate(above.name, backend.path(below), below.format.value)
                except ValueError as e:
                    raise self.refused("a change inside", f"{above.name}: {e}") from e

    def drop_states(self, snapshot: Snapshot) -> None:
        """Drop what backends and volumes keep of a snapshot; can be called again."""
        for disk in snapshot.disks:
            if disk.place is Place.OWN:
                self.backend(disk).drop_state(disk.volume, snapshot.id)
        inside = [disk for disk in snapshot.disks if disk.place is Place.INTERNAL]
        if not inside:
            return
        tops = {} if self.states.is_off(self.uuid) else self.states.tops(self.uuid)
        paths = {disk.target: self._path(disk) for disk in inside}
        if not tops:
            self.restate(inside)
        if not tops or all(tops.get(each) == path for each, path in paths.items()):
            self.states.drop_inside(self.uuid, self.described(snapshot))
            return
        for disk in inside:
            self._drop_aside(snapshot, disk)

    # Private

    def _path(self, disk: snapshottree.FrozenDisk) -> str:
        return self.backend(disk).path(self.volume(disk.backend, disk.volume))

    def _drop_aside(self, snapshot: Snapshot, disk: snapshottree.FrozenDisk) -> None:
        """Drop a state inside of a volume that the guest does not run with."""
        states = self.states
        arch = domainxml.arch(states.xml(self.uuid))
        chain = self.backend(disk).layers(disk.volume)
        with states.stand_in(self.uuid, chain, arch) as uuid:
            described = domainstate.inside_xml(
                snapshot.id,
                snapshot.created,
                Taken.PAUSED.value,
                states.secure_xml(uuid),
                memory=True,
            )
            states.drop_inside(uuid, described)


def told(found: model.Instance) -> str:
    """Return the tree as the domain's metadata has it: id, parent, name."""
    rows = [[each.id, each.parent or "", each.name] for each in found.snapshots]
    return msgspec.json.encode([found.current or "", rows]).decode()


def new_operation() -> str:
    return uuids.uuid4().hex[:16]
