# SPDX-License-Identifier: Apache-2.0
"""Taking a snapshot: planned, noted, done, published; else undone.

What is on its way stands in the instance's record. The domain's XML says whether the
guest has gone on in the new layers: then the snapshot is made, whatever was killed.
"""

import contextlib

import msgspec
from oslo_log import log as logging

from virtmigrate import domainstate, errors, model
from virtmigrate.instance import Power
from virtmigrate.model import Changing
from virtmigrate.progress import Progress
from virtmigrate.snapshot import firmware, memory, planning
from virtmigrate.snapshot.terms import Wanted
from virtmigrate.snapshot.tidying import Tidying
from virtmigrate.snapshot.work import Work
from virtmigrate.snapshottree import Consistency, Memory, Place, Snapshot, Taken

LOG = logging.getLogger(__name__)


class Creation:
    """Takes a snapshot of one instance, under its claim."""

    def __init__(self, work: Work, progress: Progress | None = None) -> None:
        self._work = work
        self._progress = progress or Progress()

    def plan(self, wanted: Wanted) -> planning.Plan:
        """Return what would be done; SnapshotRefused, SnapshotExists."""
        return planning.Planner(self._work).plan(wanted)

    def run(self, wanted: Wanted) -> Snapshot:
        """Take it. On failure all is as before.

        Raises SnapshotRefused, SnapshotExists, SnapshotFailed, Cancelled. QuiesceFailed
        may leave a snapshot behind, which is not consistent: the caller deletes it.
        """
        plan = self.plan(wanted)
        work, snapshot = self._work, plan.snapshot
        change = model.Change(
            what=Changing.CREATING,
            operation=snapshot.id,
            disks=plan.disks,
            snapshot=snapshot,
        )
        found = work.publish(work.found, change=change)
        try:
            self._prepare(plan)
            # Right before the guest goes on there, too: they are empty until then.
            work.foretell(found, disks=plan.disks, change=None)
            self._freeze(plan, wanted)
        except BaseException as e:
            if not self._undone(e, snapshot):
                # The guest had gone on in its layers all the same.
                LOG.exception("snapshot=%s was taken, with an error", snapshot.name)
                return work.snapshot(snapshot.id)
            if isinstance(e, errors.HostError | errors.InvalidState):
                raise self._failed(e) from e
            raise
        self._commit(found)
        return snapshot

    def recover(self, found: model.Instance) -> bool:
        """Finish a snapshot that was being taken, or undo it; tell which."""
        change, work = found.change, self._work
        if change is None or change.snapshot is None:
            return False
        off = work.states.is_off(work.uuid)
        if not off:
            work.states.end_job(work.uuid)
        if self._is_switched(change):
            if self._is_whole(change.snapshot):
                # Whether its file systems were frozen all the time, nobody knows.
                self._commit(_doubted(found))
                return True
            self._abandon(found, change.snapshot)
            return False
        self._restore(found, change.snapshot)
        self._wake(change.snapshot)
        # Who takes it over must not look for layers that are gone.
        work.foretell(found)
        work.drop_states(change.snapshot)
        work.drop_made(change.operation)
        # It may tell of the snapshot already.
        work.define(work.states.xml(work.uuid), found)
        work.publish(found, change=None)
        LOG.info("instance=%s snapshot=%s undone", work.uuid, change.snapshot.name)
        return False

    # Private

    def _undone(self, error: BaseException, snapshot: Snapshot) -> bool:
        """Undo what failed; tell whether there is no snapshot to go by.

        Raises SnapshotUndecided where that fails, too: it is settled later.
        """
        work = self._work
        try:
            is_taken = self.recover(work.found)
        except errors.Error as e:
            LOG.exception("snapshot=%s is not undone", snapshot.name)
            raise errors.SnapshotUndecided(
                doing=f"snapshot {snapshot.name}",
                instance=work.uuid,
                host=work.here.name,
                reason=str(error) or type(error).__name__,
                then=str(e),
            ) from error
        return not is_taken or isinstance(error, errors.QuiesceFailed)

    def _failed(self, error: errors.Error) -> errors.SnapshotFailed:
        power = self._work.states.power(self._work.uuid)
        return errors.SnapshotFailed(
            doing="snapshot",
            instance=self._work.uuid,
            host=self._work.here.name,
            reason=f"{error} (the guest is {power.value})",
        )

    def _prepare(self, plan: planning.Plan) -> None:
        self._progress.phase("making layers")
        self._work.make_layers(plan.layers)
        if not _needs_rest(plan.snapshot):
            firmware.copy(self._work, plan.snapshot)
        if plan.snapshot.memory_volume:
            volume = memory.planned(self._work, plan.snapshot)
            self._work.here.files.volumes.publish(volume.name, volume)

    def _freeze(self, plan: planning.Plan, wanted: Wanted) -> None:
        snapshot = plan.snapshot
        self._progress.phase("freezing")
        if any(each.place is Place.INTERNAL for each in snapshot.disks):
            self._keep_inside(plan, wanted)
        elif snapshot.taken is Taken.OFF:
            self._keep_own(snapshot)
        else:
            self._freeze_running(plan, wanted)
        if snapshot.taken is Taken.OFF and plan.layers:
            work = self._work
            text = work.with_chains(snapshot.domain_xml, plan.disks)
            work.states.define(text)

    def _keep_inside(self, plan: planning.Plan, wanted: Wanted) -> None:
        work, snapshot = self._work, plan.snapshot
        if snapshot.memory is Memory.EXTERNAL:
            work.states.save_to(work.uuid, memory.planned(work, snapshot).path)
            # What is kept inside next is worth nothing without it.
            memory.persist(work, snapshot)
        if work.states.is_off(work.uuid):
            work.restate(snapshot.disks)
        work.states.keep_inside(work.uuid, snapshot.id, self._progress, wanted.timeout)
        self._restore(work.found, snapshot)
        self._wake(snapshot)

    def _keep_own(self, snapshot: Snapshot) -> None:
        for disk in snapshot.disks:
            if disk.place is Place.OWN:
                self._work.backend(disk).keep_state(disk.volume, snapshot.id)

    def _freeze_running(self, plan: planning.Plan, wanted: Wanted) -> None:
        work, snapshot = self._work, plan.snapshot
        own = tuple(d.target for d in snapshot.disks if d.place is Place.OWN)
        path = memory.planned(work, snapshot).path if snapshot.memory_volume else None
        request = domainstate.Freeze(
            name=snapshot.id,
            layers=_paths(work, plan.disks, snapshot),
            held=own if path else (),
            memory=path,
        )
        with self._quiesced(wanted):
            if _needs_rest(snapshot):
                # Before the layers, which say that all is kept.
                work.states.pause(work.uuid)
                firmware.copy(work, snapshot)
            if own and not path:
                work.states.pause(work.uuid)
                self._keep_own(snapshot)
            if request.layers or path:
                work.states.freeze(work.uuid, request, self._progress, wanted.timeout)
            if path:
                self._keep_own(snapshot)
            self._wake(snapshot)

    def _quiesced(self, wanted: Wanted) -> contextlib.AbstractContextManager[None]:
        """Have the guest's file systems frozen, if that is asked for."""
        if not wanted.quiesce:
            return contextlib.nullcontext()
        return self._work.here.agents.frozen(self._work.uuid)

    def _restore(self, found: model.Instance, snapshot: Snapshot) -> None:
        """Start a guest again that was saved to have its disks kept inside; paused.

        Only once: what it writes when it goes on, its memory does not know. A guest
        that ended before its memory was written ended with its host, and stays off.
        """
        inside = any(each.place is Place.INTERNAL for each in snapshot.disks)
        work, change = self._work, found.change
        assert change is not None
        if not inside or snapshot.memory is not Memory.EXTERNAL or change.power:
            return
        path = memory.planned(work, snapshot).path
        if work.states.is_off(work.uuid) and work.states.has_memory(path):
            work.here.restore(work.uuid, path)
        change = msgspec.structs.replace(change, power=snapshot.taken.value)
        # Who takes it over finds what foretell() said, as before.
        work.here.publish_instance(msgspec.structs.replace(found, change=change))

    def _wake(self, snapshot: Snapshot) -> None:
        """Let a guest go on that was stopped for its snapshot."""
        if snapshot.taken is Taken.RUNNING:
            self._work.states.unpause(self._work.uuid)

    def _is_switched(self, change: model.Change) -> bool:
        """Tell whether the guest goes on, or would, in all layers of a change."""
        assert change.snapshot is not None
        layers = _paths(self._work, change.disks, change.snapshot)
        tops = self._work.states.tops(self._work.uuid)
        return bool(layers) and all(
            tops.get(target) == path for target, path in layers.items()
        )

    def _is_whole(self, snapshot: Snapshot) -> bool:
        """Tell whether the backends kept what they were to, beside the layers.

        After the memory that comes last. A guest that was let go on since is not held
        any more, and it is too late.
        """
        own = any(disk.place is Place.OWN for disk in snapshot.disks)
        if not own or snapshot.memory is Memory.NONE:
            return True
        if self._work.states.power(self._work.uuid) is Power.RUNNING:
            return False
        try:
            self._keep_own(snapshot)
        except errors.Error as e:
            LOG.warning("snapshot=%s is given up: %s", snapshot.name, e)
            return False
        return True

    def _abandon(self, found: model.Instance, snapshot: Snapshot) -> None:
        """Keep the layers that the guest goes on in, and merge them; no snapshot."""
        work, change = self._work, found.change
        assert change is not None
        self._wake(snapshot)
        work.drop_states(snapshot)
        work.settle_layers(change.disks, change.operation)
        for name in (snapshot.memory_volume, snapshot.variables_volume):
            if name:
                work.here.files.remove(name)
        tidying = model.Change(what=Changing.TIDYING, operation=change.operation)
        found = work.publish(found, disks=change.disks, change=tidying)
        work.define(work.states.xml(work.uuid), found)
        Tidying(work).run(found)
        LOG.info("instance=%s snapshot=%s undone", work.uuid, snapshot.name)

    def _commit(self, found: model.Instance) -> None:
        """Publish what was done: from here on it is a snapshot."""
        work, change = self._work, found.change
        assert change is not None and change.snapshot is not None
        snapshot = firmware.settled(work, change.snapshot)
        self._wake(snapshot)
        work.settle_layers(change.disks, change.operation)
        if snapshot.memory_volume:
            memory.publish(work, snapshot)
            # As it is now, made by this host's libvirt: it may come back from a peer.
            text = work.states.memory_xml(memory.planned(work, snapshot).path)
            snapshot = msgspec.structs.replace(snapshot, live_xml=text)
        made = msgspec.structs.replace(
            found,
            disks=change.disks,
            snapshots=(*found.snapshots, snapshot),
            current=snapshot.id,
        )
        # While the change is noted: nobody would do it afterwards.
        work.define(work.states.xml(work.uuid), made)
        work.publish(made, change=None)
        LOG.info(
            "instance=%s snapshot=%s id=%s taken", work.uuid, snapshot.name, snapshot.id
        )


# Private


def _needs_rest(snapshot: Snapshot) -> bool:
    """Tell whether a running guest has to stand still for a copy of its variables."""
    is_running = snapshot.taken is Taken.RUNNING and snapshot.memory is Memory.NONE
    return is_running and bool(snapshot.variables_volume)


def _doubted(found: model.Instance) -> model.Instance:
    """Return a record whose new snapshot counts as taken from a running guest."""
    change = found.change
    assert change is not None and change.snapshot is not None
    if change.snapshot.consistency is not Consistency.FILES:
        return found
    snapshot = msgspec.structs.replace(change.snapshot, consistency=Consistency.CRASH)
    change = msgspec.structs.replace(change, snapshot=snapshot)
    return msgspec.structs.replace(found, change=change)


def _paths(
    work: Work, disks: tuple[model.DiskRef, ...], snapshot: Snapshot
) -> dict[str, str]:
    """Return by target where the new layers of a snapshot lie."""
    outside = {d.target for d in snapshot.disks if d.place is Place.EXTERNAL}
    found = {}
    for ref in disks:
        if ref.target in outside:
            stored = work.backend(ref).volumes.find(ref.volume)
            # One that was not made is nowhere.
            found[ref.target] = work.backend(ref).path(stored.body) if stored else ""
    return found
