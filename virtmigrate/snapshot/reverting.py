# SPDX-License-Identifier: Apache-2.0
"""Going back to a snapshot: new layers, then the record, then the domain.

Until the record says what the disks are to be, nothing of the guest was touched, and
all is undone. From then on it is finished, however often that takes: the guest's CPUs
do not run before.
"""

from dataclasses import dataclass

import msgspec
from oslo_log import log as logging

from virtmigrate import domainxml, model, snapshottree
from virtmigrate.model import Changing, VolumeState
from virtmigrate.snapshot import rules
from virtmigrate.snapshot.terms import Return, Step
from virtmigrate.snapshot.work import Layers, Work, new_operation
from virtmigrate.snapshottree import Kind, Memory, Place, Snapshot, Taken

LOG = logging.getLogger(__name__)

_DOING = "going back"
_POWERS = tuple(each.value for each in Taken)


@dataclass(frozen=True)
class Plan:
    """What going back will do, before anything is touched."""

    snapshot: Snapshot
    operation: str
    disks: tuple[model.DiskRef, ...]
    layers: Layers
    detached: tuple[model.DiskRef, ...]
    configuration: bool
    power: str
    how: str

    def steps(self) -> list[Step]:
        """Return what would be done."""
        found = [Step("restore", self.snapshot.name, self.how)]
        found += [
            Step("layer", each.name, f"over {each.backing}") for _, each in self.layers
        ]
        found += [
            Step("detach", each.target, f"{each.volume} stays, and nobody uses it")
            for each in self.detached
        ]
        if self.configuration:
            found.append(Step("configure", "domain", "as it was"))
        found.append(Step("power", "guest", self.power))
        return found


class Reverting:
    """Goes back to a snapshot of one instance, under its claim."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def plan(self, wanted: Return) -> Plan:
        """Return what would be done; SnapshotRefused, SnapshotNotFound."""
        found = self._work.demand_idle(_DOING)
        snapshot = self._work.snapshot(wanted.snapshot)
        self._work.demand_names(_DOING, wanted.keep or snapshot.name, wanted.layer)
        configuration = wanted.configuration
        if configuration is None:
            configuration = snapshot.kind is Kind.CHECKPOINT
        if snapshot.memory is not Memory.NONE and not configuration:
            raise self._work.refused(
                _DOING, "the memory of a guest fits its own configuration only"
            )
        operation = new_operation()
        disks, layers, detached = self._disks(
            found, snapshot, configuration, wanted.layer, operation
        )
        self._demand_chains(found, disks, snapshot)
        places = {each.place for each in snapshot.disks}
        return Plan(
            snapshot=snapshot,
            operation=operation,
            disks=disks,
            layers=layers,
            detached=detached,
            configuration=configuration,
            power=self._power(wanted, snapshot),
            how=rules.revert(places, snapshot.memory, snapshot.taken).said,
        )

    def run(self, plan: Plan) -> None:
        """Go back. What fails before the guest is touched is undone, else finished
        later, by the next call of finish()."""
        work = self._work
        change = model.Change(
            what=Changing.PREPARING,
            operation=plan.operation,
            disks=plan.disks,
            snapshot=plan.snapshot,
            power=plan.power,
            configuration=plan.configuration,
        )
        found = work.publish(work.found, change=change)
        try:
            work.make_layers(plan.layers)
            work.settle_layers(plan.disks, plan.operation)
        except BaseException:
            self.undo(found)
            raise
        self.finish(
            work.publish(
                found,
                disks=plan.disks,
                current=plan.snapshot.id,
                detached=_detached(found, plan),
                **_size(plan),
                change=msgspec.structs.replace(change, what=Changing.REVERTING),
            )
        )

    def undo(self, found: model.Instance) -> None:
        """Take away what was prepared: the guest was not touched."""
        assert found.change is not None
        self._work.drop_made(found.change.operation)
        self._work.publish(found, change=None)

    def finish(self, found: model.Instance) -> model.Instance:
        """Make the domain what the record says; can be called again.

        Returns the record, which asks for what is not needed any more to be tidied
        up.
        """
        work, change = self._work, found.change
        assert change is not None and change.snapshot is not None
        snapshot = change.snapshot
        if change.what is Changing.REVERTING:
            work.states.kill(work.uuid)
            self._thaw(found, snapshot)
            text = work.states.xml(work.uuid)
            if change.configuration:
                text = snapshot.domain_xml
            work.foretell(found, domain_xml=text)
            self._restore_states(found, snapshot, text)
            work.define(text, found)
            self._restore_memory(found, snapshot, change.power)
            change = msgspec.structs.replace(change, what=Changing.RESUMING)
            found = work.publish(found, change=change)
        self._set_power(change.power)
        LOG.info("instance=%s is back at snapshot=%s", work.uuid, snapshot.name)
        tidying = model.Change(what=Changing.TIDYING, operation=change.operation)
        return work.publish(found, change=tidying)

    # Private

    def _disks(
        self,
        found: model.Instance,
        snapshot: Snapshot,
        configuration: bool,
        prefix: str,
        operation: str,
    ) -> tuple[tuple[model.DiskRef, ...], Layers, tuple[model.DiskRef, ...]]:
        """Return the disks afterwards, layers to be made, and disks to detach."""
        frozen = {each.target: each for each in snapshot.disks}
        then = {disk.target for disk in domainxml.disks(snapshot.domain_xml)}
        disks, layers, detached = [], [], []
        for ref in self._candidates(found, snapshot, configuration):
            if configuration and ref.target not in then and ref.role in _SEEN:
                detached.append(ref)
                continue
            kept = frozen.get(ref.target)
            if kept is None:
                disks.append(ref)
                continue
            ref = msgspec.structs.replace(ref, backend=kept.backend)
            if kept.place is Place.EXTERNAL:
                layer = self._work.layer_over(ref, kept.volume, prefix, operation)
                layers.append((ref.backend, layer))
                disks.append(msgspec.structs.replace(ref, volume=layer.name))
            else:
                volume = self._work.own(kept.backend, kept.volume)
                disks.append(msgspec.structs.replace(ref, volume=volume.name))
        return tuple(disks), tuple(layers), tuple(detached)

    def _candidates(
        self, found: model.Instance, snapshot: Snapshot, configuration: bool
    ) -> list[model.DiskRef]:
        """Return the disks that there are, and those that come back."""
        here = {ref.target for ref in found.disks}
        back = [
            model.DiskRef(
                target=each.target,
                volume=each.volume,
                backend=each.backend,
                role=self._work.volume(each.backend, each.volume).role,
            )
            for each in snapshot.disks
            if configuration and each.target not in here
        ]
        return [*found.disks, *back]

    def _demand_chains(
        self,
        found: model.Instance,
        disks: tuple[model.DiskRef, ...],
        snapshot: Snapshot,
    ) -> None:
        """Refuse to change a volume that others stand on."""
        inside = {d.volume for d in snapshot.disks if d.place is not Place.EXTERNAL}
        frozen = snapshottree.volumes(found.snapshots, Place.EXTERNAL)
        for ref in disks:
            if ref.volume not in inside:
                continue
            users = self._work.backend(ref).users(ref.volume)
            if users or (ref.backend, ref.volume) in frozen:
                raise self._work.refused(
                    _DOING,
                    f"the state of {ref.target} lies in {ref.volume}, and "
                    f"{', '.join(sorted(users)) or 'another snapshot'} stands on that: "
                    "delete the snapshots that were taken after it first",
                )

    def _power(self, wanted: Return, snapshot: Snapshot) -> str:
        if wanted.power and wanted.power not in _POWERS:
            raise self._work.refused(_DOING, f"power {wanted.power!r} is not known")
        if wanted.power:
            return wanted.power
        if snapshot.kind is Kind.CHECKPOINT:
            return snapshot.taken.value
        return self._work.taken().value

    def _thaw(self, found: model.Instance, snapshot: Snapshot) -> None:
        """Say of the volumes that the guest writes to from now on that they change.

        Those that become what they were have their size of then, too.
        """
        then = {
            (each.backend, each.volume): each.size
            for each in snapshot.disks
            if each.place is not Place.EXTERNAL
        }
        for ref in found.disks:
            volume = self._work.volume(ref.backend, ref.volume)
            size = then.get((ref.backend, ref.volume), volume.size)
            usable = volume.state in (VolumeState.USABLE, VolumeState.FROZEN)
            thawed = msgspec.structs.replace(
                volume, state=VolumeState.USABLE, size=size
            )
            if usable and thawed != volume:
                self._work.backend(ref).update(thawed)

    def _restore_states(
        self, found: model.Instance, snapshot: Snapshot, text: str
    ) -> None:
        own = [disk for disk in snapshot.disks if disk.place is Place.OWN]
        if not own:
            return
        told = msgspec.structs.replace(found, domain_xml=text)
        with self._work.here.tenures.rewriting(told):
            for disk in own:
                backend = self._work.backend(disk)
                backend.restore_state(disk.volume, snapshot.id, keep=True)

    def _restore_memory(
        self, found: model.Instance, snapshot: Snapshot, power: str
    ) -> None:
        """Start the guest paused where it was, if its memory was kept and is wanted."""
        work = self._work
        inside = any(each.place is Place.INTERNAL for each in snapshot.disks)
        if inside:
            with work.here.starting(work.uuid):
                described = work.described(snapshot)
                work.states.revert_inside(work.uuid, described, paused=True)
        if power == Taken.OFF.value:
            work.states.kill(work.uuid)
        elif snapshot.memory is Memory.EXTERNAL:
            path = work.volume(snapshot.memory_backend, snapshot.memory_volume).path
            # Not what the file's head says now: it may have come from a peer, and
            # libvirt would do as it says.
            text = domainxml.without_runtime(str(snapshot.live_xml))
            text = work.as_here(text, found)
            with work.here.starting(work.uuid):
                work.states.restore_with(path, text)

    def _set_power(self, power: str) -> None:
        work = self._work
        if power == Taken.OFF.value:
            return
        work.here.begin(work.uuid, paused=power == Taken.PAUSED.value)
        if power == Taken.RUNNING.value:
            work.states.unpause(work.uuid)


def _detached(found: model.Instance, plan: Plan) -> tuple[model.DiskRef, ...]:
    """Return what no disk is any more."""
    disks = {(ref.backend, ref.volume) for ref in plan.disks}
    gone = (*found.detached, *plan.detached)
    return tuple(ref for ref in gone if (ref.backend, ref.volume) not in disks)


def _size(plan: Plan) -> dict[str, int]:
    """Return what the record says of a configuration that comes back."""
    text = plan.snapshot.domain_xml
    if not plan.configuration:
        return {}
    return {"memory": domainxml.memory(text), "vcpus": domainxml.vcpus(text)}


_SEEN = tuple(role for role in model.Role if role is not model.Role.NVRAM)
"""Roles of disks that the domain's XML names among its disks."""
