# SPDX-License-Identifier: Apache-2.0
"""An instance's disks, standing still while an image is made of them.

A guest that runs, or may run, goes on in layers: its disks are a snapshot of the
instance, which goes as soon as it is not needed any more. So is what a backend keeps
itself. Of a guest that is off nothing is made: the instance is held instead.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from oslo_log import log as logging

from virtmigrate import (
    domainxml,
    errors,
    guestview,
    model,
    node,
    reading,
    snapshot,
    snapshottree,
)
from virtmigrate.formats import DiskFormat
from virtmigrate.instance import Power
from virtmigrate.livesnapshot.terms import Quiesce, Wanted
from virtmigrate.model import Role
from virtmigrate.progress import Progress
from virtmigrate.snapshot.work import FIXED, Demand, Work

LOG = logging.getLogger(__name__)

OFF = "off"
"""The consistency of a guest that was off."""

_TRIM = 600
"""Seconds that an agent may take to discard."""
_GONE = (errors.RecordMissing, errors.NotEntitled, errors.InstanceNotFound)


@dataclass(frozen=True)
class Still:
    """One disk that stands still."""

    target: str
    source: reading.Source
    layers: tuple[domainxml.Layer, ...] = ()
    """The chain that it is, top first; none where a backend keeps a state."""


@dataclass(frozen=True)
class Frozen:
    """All of them, of one moment."""

    disks: tuple[Still, ...]
    """The root disk first."""
    consistency: str


class Freezer:
    """Has disks of instances stand still. Safe to share between threads.

    Arguments:
        demand_no_move: raises InvalidState while a move of an instance is open here.
    """

    def __init__(
        self, here: node.Node, snapshots: snapshot.Snapshots, demand_no_move: Demand
    ) -> None:
        self._here = here
        self._snapshots = snapshots
        self._demand_no_move = demand_no_move

    def targets(self, uuid: str, *, all_disks: bool) -> list[str]:
        """Return the disks that images are made of, the root disk first."""
        found = [ref for ref in self._here.entitled(uuid).disks if _is_written(ref)]
        found.sort(key=lambda ref: (ref.role is not Role.ROOT, ref.target))
        if not found:
            raise errors.InvalidState(
                instance=uuid,
                host=self._here.name,
                state="without a disk that it writes to",
                reason="there is nothing to make an image of",
            )
        return [ref.target for ref in (found if all_disks else found[:1])]

    @contextlib.contextmanager
    def frozen(
        self, uuid: str, name: str, by: str, wanted: Wanted, progress: Progress
    ) -> Iterator[Frozen]:
        """Have them stand still; drop() has to follow, whatever happens.

        Arguments:
            name: of the snapshot.
            by: as the snapshot has it.

        Raises SnapshotRefused, InvalidState, QuiesceFailed, InstanceBusy.
        """
        targets = self.targets(uuid, all_disks=wanted.all_disks)
        if self._is_off(uuid) and not wanted.keep_layer:
            with self._here.claimed(uuid):
                if self._is_off(uuid):
                    yield self._held(uuid, targets)
                    return
        if wanted.trim:
            progress.phase("discarding")
            self._here.agents.trim(uuid, _TRIM)
        made = self._taken(uuid, name, by, wanted, targets, progress)
        yield Frozen(
            tuple(self._still(made, target) for target in targets),
            made.consistency.value,
        )

    def drop(self, uuid: str, name: str) -> None:
        """Drop the snapshot of that name; can be called again.

        The layers are merged into what they stand on, by the guest's QEMU if it runs.
        Nothing happens for an instance that is gone, or is not here any more.
        """
        with contextlib.suppress(errors.SnapshotNotFound):
            try:
                self._snapshots.delete(uuid, name)
            except _GONE as e:
                LOG.info("instance=%s snapshot=%s is gone: %s", uuid, name, e)

    # Private

    def _is_off(self, uuid: str) -> bool:
        return self._here.domains.power(uuid) is Power.OFF

    def _held(self, uuid: str, targets: list[str]) -> Frozen:
        """Return the disks of a guest that is off, under its claim."""
        work = Work(self._here, uuid, self._demand_no_move)
        refs = {ref.target: ref for ref in work.demand_idle("an image").disks}
        disks = tuple(
            self._stored(target, refs[target].backend, refs[target].volume)
            for target in targets
        )
        return Frozen(disks, OFF)

    def _taken(
        self,
        uuid: str,
        name: str,
        by: str,
        wanted: Wanted,
        targets: list[str],
        progress: Progress,
    ) -> snapshottree.Snapshot:
        """Take the snapshot, quiesced if that is asked for."""
        refs = self._here.entitled(uuid).disks
        others = {ref.target for ref in refs if _is_written(ref)} - set(targets)
        runs = self._here.domains.power(uuid) is Power.RUNNING
        demanded = wanted.quiesce is Quiesce.DEMAND and not self._is_off(uuid)
        asked = snapshot.Wanted(
            name=name,
            left_out=frozenset(others),
            quiesce=demanded or (runs and wanted.quiesce is Quiesce.TRY),
            layer="image",
            description="an image is made of it",
            by=by,
        )
        try:
            return self._snapshots.create(uuid, asked, progress)
        except errors.QuiesceFailed as e:
            if demanded:
                raise
            LOG.warning("instance=%s its image is not quiesced: %s", uuid, e)
        asked = _unquiesced(asked)
        return self._snapshots.create(uuid, asked, progress)

    def _still(self, made: snapshottree.Snapshot, target: str) -> Still:
        (disk,) = [each for each in made.disks if each.target == target]
        if disk.place is snapshottree.Place.OWN:
            backend = self._here.backend(disk.backend)
            return Still(target, backend.state(disk.volume, made.id, disk.size))
        return self._stored(target, disk.backend, disk.volume)

    def _stored(self, target: str, name: str, volume: str) -> Still:
        """Return what a guest sees of a volume and all below it."""
        backend = self._here.backend(name)
        chain, layers = backend.chain(volume), backend.layers(volume)
        top = chain[0]
        if len(chain) == 1 and top.format is DiskFormat.RAW:
            size = backend.pool(top.pool).physical(top.name)
            return Still(target, backend.source(top, size), layers)
        return Still(target, guestview.GuestView(layers, top.size), layers)


# Private


def _is_written(ref: model.DiskRef) -> bool:
    return ref.role not in FIXED


def _unquiesced(asked: snapshot.Wanted) -> snapshot.Wanted:
    return dataclasses.replace(asked, quiesce=False)
