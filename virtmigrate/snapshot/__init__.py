# SPDX-License-Identifier: Apache-2.0
"""Snapshots of instances: taken, gone back to, branched, deleted.

The tree is ours, in the instance's record: libvirt's own would forbid migration, and
libvirt 9.0 can go back to few. Each change is noted there before its first step, and
finish() goes on with what a kill left.
"""

import contextlib
from collections.abc import Iterator

import msgspec
from oslo_log import log as logging

from virtmigrate import errors, model, node, snapshottree
from virtmigrate.model import Changing, InstanceState
from virtmigrate.progress import Progress
from virtmigrate.snapshot import limits
from virtmigrate.snapshot.creation import Creation
from virtmigrate.snapshot.flattening import Flattening
from virtmigrate.snapshot.reverting import Reverting
from virtmigrate.snapshot.terms import Return, Step, Wanted
from virtmigrate.snapshot.tidying import Tidying
from virtmigrate.snapshot.work import Demand, Work, new_operation
from virtmigrate.snapshottree import Kind, Memory, Place, Snapshot

LOG = logging.getLogger(__name__)

_SAVED = {
    Changing.CREATING: "the guest was saved while its snapshot was being taken: start "
    "it with libvirt's own command (`virsh start`), so that its disks are known again, "
    "or drop its memory (`virsh managedsave-remove`); then settle again",
    Changing.REVERTING: "the guest was saved, with the disks that it is gone back "
    "from: that memory fits them only. Drop it (`virsh managedsave-remove`), then "
    "settle again",
}
"""What is to be done about a guest that cannot be resumed by us."""

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
        self._told: set[str] = set()
        """What the log has of chains already."""

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
        with self.held(uuid, wanted, progress) as made:
            return made

    @contextlib.contextmanager
    def held(
        self, uuid: str, wanted: Wanted, progress: Progress | None = None
    ) -> Iterator[Snapshot]:
        """Take a snapshot, and hold its instance while it is used; as create()."""
        with self._work(uuid) as work:
            made = self._create(work, wanted, progress)
            for said in limits.slow(self._here, work.found):
                LOG.warning("%s", said)
            yield work.snapshot(made.id)

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
            if wanted.delete_children and not plan.gone:
                # States of these have to go, and what stands on volumes, before.
                for each in self._doomed(work, plan.snapshot.id, True, False):
                    self._delete(work, (each,))
                plan = Reverting(work).plan(wanted)
            Reverting(work, progress).run(plan)
            # It is too late to cancel.
            Tidying(work, progress and progress.uncancelled()).run(work.found)
            return list(plan.detached)

    def delete(
        self,
        uuid: str,
        key: str,
        *,
        children: bool = False,
        itself: bool = True,
        progress: Progress | None = None,
    ) -> None:
        """Delete a snapshot; what was taken after it stays, on what it stood on.

        Raises SnapshotPutOff where it was cancelled while layers were merged: what is
        not merged yet stays until finish(). Cancelled before that: nothing was done.

        Arguments:
            children: delete all that was taken after it, too, the last ones first.
            itself: delete it; False, with children: only those.
        """
        with self._work(uuid) as work:
            gone = self._doomed(work, key, children, itself)
            if progress is not None:
                progress.phase("deleting")
            outside = tuple(each for each in gone if not snapshottree.is_inside(each))
            if outside or not gone:
                self._delete(work, outside, progress)
            # What stood on these is merged into their volumes by now.
            for each in gone:
                if each not in outside:
                    self._delete(work, (each,), progress)

    def detached(self, uuid: str) -> tuple[model.DiskRef, ...]:
        """Return the disks that reverts took away, and that are kept."""
        return self._here.entitled(uuid).detached

    def give_up(self, uuid: str, key: str) -> model.DiskRef:
        """Remove a disk that a revert took away, for good.

        What snapshots need of it stays with them. Raises SnapshotRefused.

        Arguments:
            key: its target if that is one disk's only, or its volume.
        """
        with self._work(uuid) as work:
            found = work.demand_idle("giving a disk up")
            ref = self._detached(work, found, key)
            change = model.Change(
                what=Changing.DELETING, operation=new_operation(), disks=(ref,)
            )
            left = tuple(each for each in found.detached if each != ref)
            self._drop(work, work.publish(found, detached=left, change=change))
            LOG.info("instance=%s volume=%s given up", uuid, ref.volume)
            return ref

    def plan_create(self, uuid: str, wanted: Wanted) -> list[Step]:
        """Return what create() would do."""
        with self._work(uuid) as work:
            return Creation(work).plan(wanted).steps()

    def plan_revert(self, uuid: str, wanted: Return) -> list[Step]:
        """Return what revert() would do."""
        with self._work(uuid) as work:
            found = work.demand_idle("going back")
            plan = Reverting(work).plan(wanted)
            gone: tuple[Snapshot, ...] = ()
            if wanted.delete_children:
                gone = self._doomed(work, plan.snapshot.id, True, False)
            steps = [Step("delete", each.name, "it stands on it") for each in gone]
            after = self._after(found, gone)
            kept = (plan.kept,) if plan.kept else ()
            after = msgspec.structs.replace(
                after, disks=plan.disks, snapshots=(*after.snapshots, *kept)
            )
            return [*plan.steps(), *steps, *Tidying(work).plan(after)]

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

    def tend(self) -> list[str]:
        """Shorten chains that are too deep, as the options say; return what failed.

        Chains that get slow are named in the log, once each time they grow; so are
        those that cannot be shortened as things are.
        """
        left = []
        for name in self._here.instances.names():
            try:
                self._tend(name)
            except (errors.InstanceBusy, errors.NotEntitled):
                # Another operation has it, or by now another host.
                continue
            except (
                errors.SnapshotRefused,
                errors.InvalidState,
                errors.StorageDown,
            ) as e:
                # It waits until its guest, its move or its storage lets it be done.
                self._tell(str(e))
            except Exception as e:
                LOG.exception("instance=%s its chains", name)
                left.append(f"chains of {name}: {e}")
        return left

    # Private

    def _tend(self, uuid: str) -> None:
        found = self._here.own_record(uuid)
        is_idle = found is not None and found.change is None
        if found is None or found.state is not InstanceState.HERE or not is_idle:
            return
        limit = self._here.options.flatten_chain
        for each in limits.depths(self._here, found) if limit else ():
            if each.count > limit:
                self._flatten(uuid, each.target, limit)
        for said in limits.slow(self._here, self._here.entitled(uuid)):
            self._tell(said)

    def _tell(self, said: str) -> None:
        if said not in self._told:
            LOG.warning("%s", said)
            self._told.add(said)

    def _flatten(self, uuid: str, target: str, limit: int) -> None:
        with self._work(uuid) as work:
            flattening = Flattening(work)
            while each := flattening.disposable(target, limit):
                self._delete(work, (each,))
            is_deep = flattening.depth(target) > limit
            if is_deep and self._here.options.flatten_by == "pull":
                flattening.pull(target)

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
            work.demand_unsaved(found.change.what.value, _SAVED.get(found.change.what))
        LOG.info("instance=%s goes on %s", found.uuid, found.change.what.value)
        if found.change.what is Changing.CREATING:
            Creation(work).recover(found)
        elif found.change.what is Changing.PREPARING:
            Reverting(work).undo(found)
        elif found.change.what is Changing.DELETING:
            self._drop(work, found)
        elif found.change.what is Changing.FLATTENING:
            Flattening(work).finish(found)
        elif found.change.what is not Changing.TIDYING:
            Tidying(work).run(Reverting(work).finish(found))
        else:
            Tidying(work).run(found)

    def _detached(self, work: Work, found: model.Instance, key: str) -> model.DiskRef:
        """Return the one that is named; refuse one whose states snapshots need."""
        named = [ref for ref in found.detached if key in (ref.target, ref.volume)]
        if len(named) != 1:
            told = ", ".join(f"{ref.target} ({ref.volume})" for ref in found.detached)
            raise work.refused(
                "giving a disk up",
                f"{key} names {len(named)} of the disks that reverts detached: "
                f"{told or 'there are none'}",
            )
        (ref,) = named
        for each in found.snapshots:
            if (ref.backend, ref.volume) in snapshottree.volumes((each,), *Place):
                raise work.refused(
                    "giving a disk up",
                    f"snapshot {each.name} holds {ref.volume}: delete that first",
                )
        return ref

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

    def _delete(
        self,
        work: Work,
        gone: tuple[Snapshot, ...],
        progress: Progress | None = None,
    ) -> None:
        found = work.demand_idle("deleting")
        self._demand_unread(work, gone)
        for each in gone:
            self._demand_droppable(work, each)
        ids = tuple(each.id for each in gone)
        change = model.Change(
            what=Changing.DELETING, operation=new_operation(), gone=ids
        )
        self._drop(work, work.publish(found, change=change), progress)

    def _demand_unread(self, work: Work, gone: tuple[Snapshot, ...]) -> None:
        """Refuse to merge layers that somebody may be reading."""
        read = snapshottree.images(work.found.snapshots)
        # Who deletes only these made them, or knows what is read.
        if read and gone and not all(each in read for each in gone):
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

    def _drop(
        self, work: Work, found: model.Instance, progress: Progress | None = None
    ) -> None:
        assert found.change is not None
        change, ids = found.change, found.change.gone
        gone = tuple(each for each in found.snapshots if each.id in ids)
        for each in gone:
            work.drop_states(each)
        for ref in change.disks:
            work.drop_disk(ref)
        after = self._after(found, gone)
        change = model.Change(what=Changing.TIDYING, operation=change.operation)
        found = work.publish(after, change=change)
        work.define(work.states.xml(work.uuid), found)
        LOG.info(
            "instance=%s snapshots=%s deleted",
            found.uuid,
            ",".join(each.name for each in gone),
        )
        Tidying(work, progress).run(found)
