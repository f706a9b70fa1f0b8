# SPDX-License-Identifier: Apache-2.0
"""Chains that got too deep are made shorter, without touching a snapshot of a user.

First the snapshots go that were made as automatic ones, the oldest first, as long as
that shortens the chain: their layers are merged as after any delete. If that is not
enough, and the operator wants it (`flatten_by`), the active layer gets all that it
stands on, down to an image of the cache: it stands alone then, and what snapshots hold
below it stays. Each is one journaled change.
"""

from dataclasses import dataclass

import msgspec
from oslo_log import log as logging

from virtmigrate import domainxml, errors, model, snapshottree
from virtmigrate.backends import base
from virtmigrate.model import Changing
from virtmigrate.progress import Progress
from virtmigrate.snapshot import limits
from virtmigrate.snapshot.tidying import Tidying
from virtmigrate.snapshot.work import Work, new_operation
from virtmigrate.snapshottree import Place, Snapshot, Taken

LOG = logging.getLogger(__name__)

_DOING = "flattening"


@dataclass(frozen=True)
class _Below:
    """What a disk's top stands on."""

    ours: tuple[model.Volume, ...]
    """The instance's own, the upper ones first."""
    image: model.Volume | None
    """The first that is not: what stays below."""


class Flattening:
    """Shortens the chains of one instance, under its claim."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def depth(self, target: str) -> int:
        """Return how many volumes a disk stands on, itself counted."""
        depths = limits.depths(self._work.here, self._work.found)
        return max((each.count for each in depths if each.target == target), default=0)

    def disposable(self, target: str, limit: int) -> Snapshot | None:
        """Return the oldest automatic snapshot without which a deep chain is shorter.

        One that others share a layer with stays: nothing would be merged. None also
        where the chain is no deeper than the limit.
        """
        found = self._work.found
        if self.depth(target) <= limit:
            return None
        for each in sorted(found.snapshots, key=lambda each: each.created):
            may_go = each.automatic and not snapshottree.is_inside(each)
            if may_go and self._is_shorter(found, each, target):
                return each
        return None

    def pull(self, target: str) -> None:
        """Have a disk's active layer stand alone; SnapshotRefused.

        A kill, or QEMU that gives up, leaves what finish() goes on with.
        """
        found = self._work.demand_idle(_DOING)
        (ref,) = (each for each in found.disks if each.target == target)
        below = self._below(ref)
        if not below.ours:
            return
        if self._work.taken() is Taken.PAUSED:
            # QEMU holds back what it writes then, until the guest goes on and stops.
            LOG.info("instance=%s is paused: it is not flattened", self._work.uuid)
            return
        if (ref.backend, ref.volume) in self._work.under_layers(found):
            LOG.info(
                "instance=%s %s is transient: it is not flattened", found.uuid, target
            )
            return
        self._demand_possible(found, ref, below)
        change = model.Change(
            what=Changing.FLATTENING,
            operation=new_operation(),
            layer=ref,
            power=self._work.taken().value,
        )
        self.finish(self._work.publish(found, change=change))

    def finish(self, found: model.Instance) -> None:
        """Pull what was noted; can be called again."""
        work, change = self._work, found.change
        assert change is not None and change.layer is not None
        ref, backend = change.layer, work.backend(change.layer)
        below = self._below(ref)
        if below.ours:
            work.demand_unread(_DOING, found, ref)
            self._pull(ref, backend, below)
            if change.power == Taken.RUNNING.value:
                work.states.flush(work.uuid)
            backend.persist(work.volume(ref.backend, ref.volume).pool, ref.volume)
            top = work.volume(ref.backend, ref.volume)
            backing = below.image.name if below.image else None
            backend.update(msgspec.structs.replace(top, backing=backing, digest=None))
        if change.power == Taken.RUNNING.value:
            work.states.unpause(work.uuid)
        work.define(work.states.xml(work.uuid), found)
        tidying = model.Change(what=Changing.TIDYING, operation=change.operation)
        LOG.info("instance=%s %s stands alone", work.uuid, ref.target)
        Tidying(work).run(work.publish(found, change=tidying))

    # Private

    def _is_shorter(
        self, found: model.Instance, snapshot: Snapshot, target: str
    ) -> bool:
        (ref,) = (each for each in found.disks if each.target == target)
        chain = {each.name for each in self._work.backend(ref).chain(ref.volume)}
        left = snapshottree.without(found.snapshots, {snapshot.id})
        after = msgspec.structs.replace(found, snapshots=left)
        steps = Tidying(self._work).plan(after)
        return any(each.what == "merge" and each.where in chain for each in steps)

    def _below(self, ref: model.DiskRef) -> _Below:
        chain = self._work.backend(ref).chain(ref.volume)[1:]
        ours = tuple(each for each in chain if each.owner == self._work.uuid)
        rest = [each for each in chain if each.owner != self._work.uuid]
        return _Below(ours, rest[0] if rest else None)

    def _demand_possible(
        self, found: model.Instance, ref: model.DiskRef, below: _Below
    ) -> None:
        work, backend = self._work, self._work.backend(ref)
        inside = snapshottree.volumes(found.snapshots, Place.INTERNAL)
        if (ref.backend, ref.volume) in inside:
            raise work.refused(
                _DOING,
                f"states lie inside of {ref.volume}, and need what it stands on",
            )
        need = sum(backend.pool(v.pool).allocated(v.name) for v in below.ours)
        limits.demand_room(work, _DOING, backend, need)

    def _pull(self, ref: model.DiskRef, backend: base.Backend, below: _Below) -> None:
        work = self._work
        image = backend.path(below.image) if below.image else None
        top = backend.path(work.volume(ref.backend, ref.volume))
        if work.states.is_off(work.uuid):
            arch = domainxml.arch(work.states.xml(work.uuid))
            chain = backend.layers(ref.volume)
            with work.states.stand_in(work.uuid, chain, arch) as uuid:
                is_done = work.states.pull(uuid, "vda", top, image, Progress())
        else:
            is_done = work.states.pull(work.uuid, ref.target, top, image, Progress())
        if not is_done:
            raise errors.SnapshotError(
                instance=work.uuid,
                host=work.here.name,
                reason=f"QEMU gave up writing what {ref.target} stands on into {top}: "
                "is there room for it? Nothing is lost, and `virtmigrate host settle` "
                "goes on with it",
            )
