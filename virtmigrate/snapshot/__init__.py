# SPDX-License-Identifier: Apache-2.0
"""Snapshots of instances: taken, gone back to, branched, deleted.

The tree is ours, in the instance's record: libvirt's own would forbid migration, and
libvirt 9.0 can go back to few. Each change is noted there before its first step, and
finish() goes on with what a kill left.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import msgspec
from oslo_log import log as logging

from virtmigrate import errors, model, node, snapshottree
from virtmigrate.model import Changing
from virtmigrate.progress import Progress
from virtmigrate.snapshot.creation import Creation
from virtmigrate.snapshot.reverting import Plan as ReturnPlan
from virtmigrate.snapshot.reverting import Reverting
from virtmigrate.snapshot.terms import Return, Step, Wanted
from virtmigrate.snapshot.tidying import Tidying
from virtmigrate.snapshot.work import FIXED, Demand, Work, new_operation
from virtmigrate.snapshottree import Kind, Memory, Place, Snapshot, Taken

LOG = logging.getLogger(__name__)

__all__ = ["Kind", "Memory", "Place", "Return", "Snapshots", "Step", "Wanted"]


class Snapshots:
    """The snapshots of the instances of one host. Safe to share between threads.

    Arguments:
        demand_no_move: raises InvalidState while a move of an instance, by its UUID, is
            open on this host.
    """

    def __init__(self, here: node.Node, demand_no_move: Demand) -> None:
        self._here = here
        self._demand_no_move = demand_no_move

    def all(self, uuid: str) -> tuple[snapshottree.Snapshots, str | None]:
        """Return an instance's snapshots, and the id of the current one."""
        found = self._here.entitled(uuid)
        return found.snapshots, found.current

    def create(
        self, uuid: str, wanted: Wanted, progress: Progress | None = None
    ) -> Snapshot:
        """Take a snapshot. On failure all is as before.

        Raises SnapshotRefused, SnapshotExists, SnapshotFailed, Cancelled.
        """
        with self._work(uuid) as work:
            return self._create(work, wanted, progress)

    def revert(
        self, uuid: str, wanted: Return, progress: Progress | None = None
    ) -> list[model.DiskRef]:
        """Go back to a snapshot; return disks that were taken away by that.

        What is not needed any more is removed. On a failure before the guest was
        touched all is as before; later ones are finished by finish(). Raises
        SnapshotRefused, SnapshotNotFound.
        """
        with self._work(uuid) as work:
            plan = Reverting(work).plan(wanted)
            last = self._last(work, wanted, plan) if wanted.keep else None
            if wanted.delete_children:
                gone = snapshottree.descendants(work.found.snapshots, plan.snapshot.id)
                for each in gone:
                    self._delete(work, (each,))
            if last is not None:
                Creation(work, progress).run(last)
            # What the two changed, the plan has to know.
            plan = Reverting(work).plan(wanted)
            Reverting(work).run(plan)
            Tidying(work).run(work.found)
            return list(plan.detached)

    def delete(
        self, uuid: str, key: str, *, children: bool = False, itself: bool = True
    ) -> None:
        """Delete a snapshot; what was taken after it stays, on what it stood on.

        Arguments:
            children: delete all that was taken after it, too, the last ones first.
            itself: delete it; False, with children: only those.
        """
        with self._work(uuid) as work:
            gone = self._doomed(work, key, children, itself)
            outside = tuple(each for each in gone if not snapshottree.is_inside(each))
            if outside or not gone:
                self._delete(work, outside)
            # What stood on these is merged into their volumes by now.
            for each in gone:
                if each not in outside:
                    self._delete(work, (each,))

    def plan_create(self, uuid: str, wanted: Wanted) -> list[Step]:
        """Return what create() would do."""
        with self._work(uuid) as work:
            return Creation(work).plan(wanted).steps()

    def plan_revert(self, uuid: str, wanted: Return) -> list[Step]:
        """Return what revert() would do."""
        with self._work(uuid) as work:
            found, steps = work.demand_idle("going back"), []
            plan = Reverting(work).plan(wanted)
            if wanted.keep:
                self._last(work, wanted, plan)
                steps.append(Step("keep", wanted.keep, "what there is now"))
            gone: tuple[Snapshot, ...] = ()
            if wanted.delete_children:
                gone = tuple(
                    snapshottree.descendants(found.snapshots, plan.snapshot.id)
                )
            steps += [Step("delete", each.name, "it stands on it") for each in gone]
            after = self._after(found, gone)
            if not wanted.keep:
                after = msgspec.structs.replace(after, disks=plan.disks)
            return [*steps, *plan.steps(), *Tidying(work).plan(after)]

    def plan_delete(
        self, uuid: str, key: str, *, children: bool = False, itself: bool = True
    ) -> list[Step]:
        """Return what delete() would do."""
        with self._work(uuid) as work:
            found = work.demand_idle("deleting")
            gone = self._doomed(work, key, children, itself)
            steps = [Step("delete", each.name, each.id) for each in gone]
            return [*steps, *Tidying(work).plan(self._after(found, gone))]

    def finish(self) -> list[str]:
        """Go on with what kills left, on this host; return what remains, and why."""
        left = []
        for name in self._here.instances.names():
            try:
                stored = self._here.instances.find(name)
                if stored is None or stored.body.change is None:
                    continue
                if stored.body.host == self._here.name:
                    with self._work(name) as work:
                        self._finish(work)
            except errors.InstanceBusy:
                continue
            except Exception as e:
                # What one record says keeps no other from being finished.
                LOG.exception("instance=%s its snapshots", name)
                left.append(f"snapshots of {name}: {e}")
        return left

    # Private

    @contextlib.contextmanager
    def _work(self, uuid: str) -> Iterator[Work]:
        with self._here.claimed(uuid):
            yield Work(self._here, uuid, self._demand_no_move)

    def _create(
        self, work: Work, wanted: Wanted, progress: Progress | None
    ) -> Snapshot:
        try:
            return Creation(work, progress).run(wanted)
        except errors.QuiesceFailed:
            left = snapshottree.find(work.found.snapshots, wanted.name)
            if left is not None:
                self._delete(work, (left,))
            raise

    def _finish(self, work: Work) -> None:
        found = work.found
        if found.change is None:
            return
        if found.change.what is not Changing.PREPARING:
            work.demand_unsaved(found.change.what.value)
        LOG.info("instance=%s goes on %s", found.uuid, found.change.what.value)
        if found.change.what is Changing.CREATING:
            Creation(work).recover(found)
        elif found.change.what is Changing.PREPARING:
            Reverting(work).undo(found)
        elif found.change.what is Changing.DELETING:
            self._drop(work, found)
        elif found.change.what is not Changing.TIDYING:
            Tidying(work).run(Reverting(work).finish(found))
        else:
            Tidying(work).run(found)

    def _last(self, work: Work, wanted: Return, plan: ReturnPlan) -> Wanted:
        """Return what keeps the state that a revert leaves.

        Inside, where the revert needs that volume as it is: a layer over it would be
        in its way. Raises what taking it would.
        """
        inside = {
            (disk.backend, disk.volume)
            for disk in plan.snapshot.disks
            if disk.place is Place.INTERNAL
        }
        found = work.found
        has_state = any((ref.backend, ref.volume) in inside for ref in found.disks)
        last = Wanted(name=wanted.keep, layer=wanted.layer, by=wanted.by)
        if has_state:
            is_off = work.taken() is Taken.OFF
            last = dataclasses.replace(
                last,
                kind=Kind.DISK if is_off else Kind.CHECKPOINT,
                memory=Memory.NONE if is_off else Memory.INTERNAL,
                places={
                    ref.target: Place.INTERNAL
                    for ref in found.disks
                    if ref.role not in FIXED
                },
            )
        Creation(work).plan(last)
        return last

    def _doomed(
        self, work: Work, key: str, children: bool, itself: bool
    ) -> tuple[Snapshot, ...]:
        chosen = work.snapshot(key)
        found: list[Snapshot] = []
        if children:
            found += snapshottree.descendants(work.found.snapshots, chosen.id)
        return tuple([*found, chosen] if itself else found)

    def _after(
        self, found: model.Instance, gone: tuple[Snapshot, ...]
    ) -> model.Instance:
        ids = {each.id for each in gone}
        return msgspec.structs.replace(
            found,
            snapshots=snapshottree.without(found.snapshots, ids),
            current=snapshottree.remaining_parent(found.snapshots, found.current, ids),
        )

    def _delete(self, work: Work, gone: tuple[Snapshot, ...]) -> None:
        found = work.demand_idle("deleting")
        self._demand_unread(work, gone)
        for each in gone:
            self._demand_droppable(work, each)
        ids = tuple(each.id for each in gone)
        change = model.Change(
            what=Changing.DELETING, operation=new_operation(), gone=ids
        )
        self._drop(work, work.publish(found, change=change))

    def _demand_unread(self, work: Work, gone: tuple[Snapshot, ...]) -> None:
        """Refuse to merge layers that somebody may be reading."""
        read = snapshottree.images(work.found.snapshots)
        # Who deletes one of these knows what is read.
        if read and gone and not any(each in read for each in gone):
            names = ", ".join(each.name for each in read)
            raise work.refused(
                "deleting", f"an image is being made of it ({names}): wait for that"
            )

    def _demand_droppable(self, work: Work, snapshot: Snapshot) -> None:
        for disk in snapshot.disks:
            if disk.place is Place.INTERNAL:
                users = work.backend(disk).users(disk.volume)
                if users and not work.states.is_off(work.uuid):
                    raise work.refused(
                        "deleting",
                        f"{snapshot.name} lies inside of {disk.volume}, and "
                        f"{', '.join(sorted(users))} stands on that: turn the guest "
                        "off, or delete what was taken after it first",
                    )

    def _drop(self, work: Work, found: model.Instance) -> None:
        assert found.change is not None
        change, ids = found.change, found.change.gone
        gone = tuple(each for each in found.snapshots if each.id in ids)
        for each in gone:
            work.drop_states(each)
        after = self._after(found, gone)
        change = model.Change(what=Changing.TIDYING, operation=change.operation)
        found = work.publish(after, change=change)
        work.define(work.states.xml(work.uuid), found)
        LOG.info(
            "instance=%s snapshots=%s deleted",
            found.uuid,
            ",".join(each.name for each in gone),
        )
        Tidying(work).run(found)
