# SPDX-License-Identifier: Apache-2.0
"""Giving space back: what no snapshot and no disk names is merged, or removed.

The tree says what is needed, so that nothing else has to be remembered: deleting a
snapshot is taking it out of the tree, and this. A volume that nobody names goes when
nothing stands on it. When one layer does, that is written into it, and the two are one.
When several do, they share it, and it stays; so it does where a volume of another
instance is one of them. So does one whose only layer is shared itself: what a layer
stands on is named in its header, too, and only QEMU writes there.
A volume with states inside of it takes a layer in, but is never written into another
one: they would be lost. One that another instance's volumes stand on, a clone's, is not
touched at all; nor is what a guest reads that runs over a transient disk.
"""

import msgspec
from oslo_log import log as logging

from virtmigrate import domainxml, errors, model, snapshottree
from virtmigrate.backends import base
from virtmigrate.model import Role, VolumeState
from virtmigrate.progress import Progress
from virtmigrate.snapshot.terms import Step
from virtmigrate.snapshot.work import Work
from virtmigrate.snapshottree import Place, Taken

LOG = logging.getLogger(__name__)

Owned = tuple[base.Backend, model.Volume]
Names = set[tuple[str, str]]
"""Of volumes, each with its backend."""


class Tidying:
    """Tidies up the volumes of one instance, under its claim."""

    def __init__(self, work: Work, progress: Progress | None = None) -> None:
        self._work = work
        self._progress = progress or Progress()

    def plan(self, found: model.Instance) -> list[Step]:
        """Return what would be done if this were the instance's record."""
        steps, owned = [], self._work.owned()
        named, holders, kept = _named(found), _holders(found), self._kept(found)
        while (next_one := _first(owned, named, holders, kept)) is not None:
            (backend, volume), above = next_one
            owned = [each for each in owned if each[1].name != volume.name]
            if above is None:
                steps.append(Step("remove", volume.name, f"in {backend.name}"))
                continue
            steps.append(Step("merge", above.name, f"into {volume.name}"))
            # The two are one now, called as the lower one.
            merged = msgspec.structs.replace(above, backing=volume.backing)
            owned = [
                (each, merged) if body.name == above.name else (each, body)
                for each, body in owned
            ]
        return steps

    def run(self, found: model.Instance) -> model.Instance:
        """Do all of it; can be called again. Returns the record, without a change.

        Raises SnapshotPutOff where it was cancelled: the rest is done by the next call.
        """
        try:
            return self._run(found)
        except errors.Cancelled as e:
            raise errors.SnapshotPutOff(
                instance=self._work.uuid, host=self._work.here.name
            ) from e

    # Private

    def _run(self, found: model.Instance) -> model.Instance:
        assert found.change is not None
        if found.change.layer is not None:
            self._work.demand_unread("tidying up", found, found.change.layer)
            found = self._merge(found)
        while (next_one := self._next(found)) is not None:
            (backend, volume), above = next_one
            if above is None:
                backend.remove(volume.name)
                LOG.info("instance=%s volume=%s removed", found.uuid, volume.name)
                continue
            found = self._begin(found, backend, above)
            found = self._merge(found)
        return self._work.publish(found, change=None)

    def _next(self, found: model.Instance) -> tuple[Owned, model.Volume | None] | None:
        owned, kept = self._work.owned(), self._kept(found)
        return _first(owned, _named(found), _holders(found), kept)

    def _kept(self, found: model.Instance) -> Names:
        """Return what stays as it is, for others, or for a guest that runs over it."""
        return self._work.lent() | self._work.under_layers(found)

    def _begin(
        self, found: model.Instance, backend: base.Backend, above: model.Volume
    ) -> model.Instance:
        """Note which layer is about to be merged."""
        layer = model.DiskRef(
            target=self._target(found, backend, above.name),
            volume=above.name,
            backend=backend.name,
            role=above.role,
        )
        assert found.change is not None
        change = msgspec.structs.replace(
            found.change, layer=layer, power=self._power(found, layer)
        )
        return self._work.publish(found, change=change)

    def _power(self, found: model.Instance, layer: model.DiskRef) -> str:
        """Return what the guest does that has to stand still for a moment, else ""."""
        work = self._work
        is_top = layer.volume in {ref.volume for ref in found.disks}
        if not is_top or not work.here.tenures.concern(found):
            return ""
        return work.taken().value

    def _target(self, found: model.Instance, backend: base.Backend, name: str) -> str:
        """Return the disk in whose chain a layer is, "" if it is in none."""
        for ref in found.disks:
            chain = backend.chain(ref.volume) if ref.backend == backend.name else ()
            if name in {each.name for each in chain}:
                return ref.target
        return ""

    def _merge(self, found: model.Instance) -> model.Instance:
        """Write the noted layer into the one below it, and call it that."""
        work, change = self._work, found.change
        assert change is not None and change.layer is not None
        backend = work.backend(change.layer)
        stored = backend.volumes.find(change.layer.volume)
        if stored is None or stored.body.backing is None:
            return work.publish(found, change=_without_layer(change))
        above = stored.body
        below = work.volume(backend.name, str(above.backing))
        # Who took it over has what was foretold: the lower one is the disk there.
        is_disk = any(ref.volume in (above.name, below.name) for ref in found.disks)
        merged = msgspec.structs.replace(
            found,
            disks=tuple(_renamed(ref, backend, above, below) for ref in found.disks),
            snapshots=snapshottree.with_volume(
                found.snapshots, backend.name, above.name, below.name
            ),
        )
        self._write(backend, above, below, merged)
        if change.power == Taken.RUNNING.value:
            work.states.unpause(work.uuid)
        self._publish_merged(backend, above, below, is_disk=is_disk)
        # Before the record forgets the layer: a domain never names one that is gone.
        work.foretell(merged)
        work.define(work.states.xml(work.uuid), merged)
        found = work.publish(merged, change=_without_layer(change))
        backend.remove(above.name)
        LOG.info(
            "instance=%s layer=%s merged into %s", found.uuid, above.name, below.name
        )
        return found

    def _write(
        self,
        backend: base.Backend,
        above: model.Volume,
        below: model.Volume,
        merged: model.Instance,
    ) -> None:
        work, change = self._work, merged.change
        assert change is not None and change.layer is not None
        disk = change.layer.target
        top, base_path = backend.path(above), backend.path(below)
        if work.states.tops(work.uuid).get(disk) == base_path:
            return  # it was merged, and the guest went on below
        if disk and not work.states.is_off(work.uuid):
            told = None
            if change.power:

                def told() -> None:
                    backend.persist(below.pool, below.name)
                    work.foretell(merged)

            is_done = work.states.merge(
                work.uuid, disk, top, base_path, told, self._progress
            )
            self._demand_merged(is_done, top)
            backend.persist(below.pool, below.name)
            return
        arch = domainxml.arch(work.states.xml(work.uuid))
        # The one that stands on it, if any: QEMU writes into it what it stands on then.
        head = next(iter(_standing_on(self._work.owned(), backend, above)), above)
        with work.states.stand_in(work.uuid, backend.layers(head.name), arch) as uuid:
            is_done = work.states.merge(
                uuid, "vda", top, base_path, progress=self._progress
            )
            self._demand_merged(is_done, top)
        backend.persist(below.pool, below.name)

    def _demand_merged(self, is_done: bool, top: str) -> None:
        if not is_done:
            raise errors.SnapshotError(
                instance=self._work.uuid,
                host=self._work.here.name,
                reason=f"QEMU gave up merging {top} into what it stands on: is there "
                "room for it? Nothing is lost, and `virtmigrate host settle` goes on "
                "with it",
            )

    def _publish_merged(
        self,
        backend: base.Backend,
        above: model.Volume,
        below: model.Volume,
        *,
        is_disk: bool,
    ) -> None:
        """Publish what stood on the layer first, then what the lower volume is."""
        for each, volume in self._work.owned():
            if each.name == backend.name and volume.backing == above.name:
                each.update(msgspec.structs.replace(volume, backing=below.name))
        state = VolumeState.USABLE if is_disk else VolumeState.FROZEN
        backend.update(
            msgspec.structs.replace(
                below, size=above.size, state=state, digest=None, durable=False
            )
        )


# Private


def _named(found: model.Instance) -> Names:
    """Return all that an instance has a use for as it is."""
    disks = {(ref.backend, ref.volume) for ref in (*found.disks, *found.detached)}
    frozen = snapshottree.volumes(found.snapshots, Place.EXTERNAL, Place.OWN)
    return disks | frozen | snapshottree.memories(found.snapshots)


def _holders(found: model.Instance) -> Names:
    """Return what states lie inside of: the rest of it may change."""
    return snapshottree.volumes(found.snapshots, Place.INTERNAL)


def _first(
    owned: list[Owned], named: Names, holders: Names, kept: Names
) -> tuple[Owned, model.Volume | None] | None:
    """Return a volume that nobody names, and the one layer on it, if there is one.

    Neither of them one that is kept.
    """
    for backend, volume in owned:
        if (backend.name, volume.name) in named | kept or not _is_ours(volume):
            continue
        above = _standing_on(owned, backend, volume)
        if not above and (backend.name, volume.name) not in holders:
            return (backend, volume), None
        if len(above) != 1 or (backend.name, above[0].name) in holders | kept:
            continue
        if len(_standing_on(owned, backend, above[0])) <= 1:
            return (backend, volume), above[0]
    return None


def _standing_on(
    owned: list[Owned], backend: base.Backend, volume: model.Volume
) -> list[model.Volume]:
    return [
        body
        for each, body in owned
        if each.name == backend.name and body.backing == volume.name
    ]


def _is_ours(volume: model.Volume) -> bool:
    """Tell whether snapshots have made or frozen a volume: all else is left alone."""
    made = volume.backing is not None or volume.role is Role.MEMORY
    usable = volume.state in (VolumeState.USABLE, VolumeState.FROZEN)
    return usable and (made or volume.state is VolumeState.FROZEN)


def _without_layer(change: model.Change) -> model.Change:
    return msgspec.structs.replace(change, layer=None, power="")


def _renamed(
    ref: model.DiskRef, backend: base.Backend, above: model.Volume, below: model.Volume
) -> model.DiskRef:
    if (ref.backend, ref.volume) != (backend.name, above.name):
        return ref
    return msgspec.structs.replace(ref, volume=below.name)
