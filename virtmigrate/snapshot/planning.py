# SPDX-License-Identifier: Apache-2.0
"""What a snapshot will be: planned and refused before anything is touched."""

import time
from dataclasses import dataclass

import msgspec

from virtmigrate import errors, model, snapshottree
from virtmigrate.model import Role, VolumeState
from virtmigrate.snapshot import firmware, limits, rules
from virtmigrate.snapshot.terms import Step, Wanted
from virtmigrate.snapshot.work import FIXED, Layers, Work, new_operation
from virtmigrate.snapshottree import (
    Consistency,
    FrozenDisk,
    Memory,
    Place,
    Snapshot,
    Taken,
)

_DOING = "a snapshot"


@dataclass(frozen=True)
class Plan:
    """What a snapshot will be, before anything is touched."""

    snapshot: Snapshot
    disks: tuple[model.DiskRef, ...]
    """As they are afterwards."""
    layers: Layers
    how: str

    def steps(self) -> list[Step]:
        """Return what would be done."""
        found = [Step("freeze", self.snapshot.name, self.how)]
        found += [
            Step(each.place.value, each.target, f"{each.volume} in {each.backend}")
            for each in self.snapshot.disks
        ]
        found += [
            Step("layer", each.name, f"over {each.backing}") for _, each in self.layers
        ]
        if self.snapshot.memory_volume:
            found.append(Step("memory", self.snapshot.memory_volume, "written"))
        return found


class Planner:
    """Plans a snapshot of one instance, under its claim."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def plan(self, wanted: Wanted) -> Plan:
        """Return what would be done; SnapshotRefused, SnapshotExists."""
        found = self._work.demand_idle(_DOING)
        self._demand_name(found, wanted)
        self._demand_lasting(found, wanted)
        taken = self._work.taken()
        operation = new_operation()
        frozen = tuple(self._frozen(found, wanted))
        verdict = rules.create(
            rules.Case(
                places=frozenset(each.place for each in frozen),
                memory=wanted.memory,
                taken=taken,
                quiesced=wanted.quiesce,
                variables=any(ref.role is Role.NVRAM for ref in found.disks),
                left_out=any(ref.target in wanted.left_out for ref in _written(found)),
            )
        )
        if not verdict.possible:
            raise self._work.refused(_DOING, verdict.said)
        layers = tuple(self._layers(found, frozen, wanted.layer, operation))
        limits.demand(self._work, found, limits.Asked(frozen, layers, wanted.memory))
        return Plan(
            self._snapshot(found, wanted, taken, frozen, operation),
            _tops(found, layers),
            layers,
            verdict.said,
        )

    # Private

    def _demand_name(self, found: model.Instance, wanted: Wanted) -> None:
        self._work.demand_names(_DOING, wanted.name, wanted.layer)
        if snapshottree.find(found.snapshots, wanted.name) is not None:
            raise errors.SnapshotExists(
                instance=found.uuid, host=self._work.here.name, snapshot=wanted.name
            )

    def _demand_lasting(self, found: model.Instance, wanted: Wanted) -> None:
        """Refuse to keep what is thrown away when the guest is off."""
        targets = {ref.target for ref in found.disks if ref.transient}
        if kept := targets - wanted.left_out:
            raise self._work.refused(
                _DOING,
                f"{', '.join(sorted(kept))} is transient: what its guest writes goes "
                "when that is off. Leave it out (--leave-out), or make it permanent "
                "(`virtmigrate instance transient`)",
            )
        if targets and wanted.memory is not Memory.NONE:
            raise self._work.refused(
                _DOING,
                "the memory of a guest fits what is on its disks, and "
                f"{', '.join(sorted(targets))} is transient: leave the memory out",
            )

    def _frozen(self, found: model.Instance, wanted: Wanted) -> list[FrozenDisk]:
        known = {ref.target for ref in found.disks}
        strange = (set(wanted.places) | wanted.left_out) - known
        if strange:
            raise self._work.refused(_DOING, f"no disk {', '.join(sorted(strange))}")
        return [
            self._frozen_disk(ref, wanted.places.get(ref.target))
            for ref in _written(found)
            if ref.target not in wanted.left_out
        ]

    def _frozen_disk(self, ref: model.DiskRef, place: Place | None) -> FrozenDisk:
        backend = self._work.backend(ref)
        volume = self._work.volume(ref.backend, ref.volume)
        if volume.state is not VolumeState.USABLE:
            raise self._work.refused(
                _DOING, f"{ref.target}: {ref.volume} is {volume.state.value}"
            )
        place = place or rules.default_place(backend.capabilities)
        verdict = rules.place(
            backend.capabilities,
            volume.format,
            place,
            is_clone=volume.parent is not None,
        )
        if not verdict.possible:
            raise self._work.refused(
                _DOING, f"{ref.target} {place.value}: {verdict.said}"
            )
        return FrozenDisk(
            target=ref.target,
            backend=ref.backend,
            volume=ref.volume,
            place=place,
            size=volume.size,
        )

    def _layers(
        self,
        found: model.Instance,
        frozen: tuple[FrozenDisk, ...],
        prefix: str,
        operation: str,
    ) -> list[tuple[str, model.Volume]]:
        outside = {d.target for d in frozen if d.place is Place.EXTERNAL}
        return [
            (ref.backend, self._work.layer_over(ref, ref.volume, prefix, operation))
            for ref in found.disks
            if ref.target in outside
        ]

    def _snapshot(
        self,
        found: model.Instance,
        wanted: Wanted,
        taken: Taken,
        frozen: tuple[FrozenDisk, ...],
        operation: str,
    ) -> Snapshot:
        work, consistency = self._work, Consistency.CRASH
        if wanted.memory is not Memory.NONE:
            consistency = Consistency.MEMORY
        elif wanted.quiesce:
            consistency = Consistency.FILES
        outside = wanted.memory is Memory.EXTERNAL
        with_memory = wanted.memory is not Memory.NONE
        variables = firmware.name(found, operation)
        live = work.states.secure_xml(work.uuid) if with_memory else None
        return Snapshot(
            id=operation,
            name=wanted.name,
            kind=wanted.kind,
            disks=frozen,
            memory=wanted.memory,
            taken=taken,
            consistency=consistency,
            domain_xml=work.states.xml(work.uuid),
            created=time.time(),
            by=wanted.by,
            parent=found.current,
            live_xml=live,
            memory_backend=work.here.files.name if outside else "",
            memory_volume=f"memory.{operation}" if outside else "",
            description=wanted.description,
            automatic=wanted.automatic,
            variables_backend=work.here.files.name if variables else "",
            variables_volume=variables,
        )


# Private


def _written(found: model.Instance) -> list[model.DiskRef]:
    """Return the disks that a guest writes to."""
    return [ref for ref in found.disks if ref.role not in FIXED]


def _tops(found: model.Instance, layers: Layers) -> tuple[model.DiskRef, ...]:
    over = {(backend, volume.backing): volume.name for backend, volume in layers}
    return tuple(
        msgspec.structs.replace(
            ref, volume=over.get((ref.backend, ref.volume), ref.volume)
        )
        for ref in found.disks
    )
