# SPDX-License-Identifier: Apache-2.0
"""What there is now becomes a snapshot on the way back to another one: a branch.

Volumes with layers need nothing for that: the guest is about to leave them, so they are
frozen as they are when it has ended. What is kept inside of volumes, or by a backend,
is kept while the guest stands still, before the record says that it goes back.
"""

import dataclasses

import msgspec

from virtmigrate import model
from virtmigrate.model import VolumeState
from virtmigrate.progress import Progress
from virtmigrate.snapshot import firmware, planning
from virtmigrate.snapshot.terms import Return, Wanted
from virtmigrate.snapshot.work import FIXED, Layers, Work
from virtmigrate.snapshottree import Kind, Memory, Place, Snapshot, Taken


class Leaving:
    """Keeps what an instance has now, under its claim."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def plan(self, back: Return, target: Snapshot) -> planning.Plan:
        """Return the snapshot that will keep it; SnapshotRefused, SnapshotExists."""
        return planning.Planner(self._work).plan(self._wanted(back, target))

    def keep(self, kept: Snapshot, progress: Progress) -> None:
        """Keep states, and leave the guest paused; undo() drops them again."""
        work, places = self._work, {each.place for each in kept.disks}
        if not _needs_rest(kept):
            return
        if kept.taken is Taken.RUNNING:
            work.states.pause(work.uuid)
        # What the guest does not change any more, until it ends.
        firmware.copy(work, kept)
        for disk in kept.disks:
            if disk.place is Place.OWN:
                work.backend(disk).keep_state(disk.volume, kept.id)
        if Place.INTERNAL in places:
            if kept.taken is Taken.OFF:
                work.restate(kept.disks)
            work.states.keep_inside(work.uuid, kept.id, progress, Wanted.timeout)

    def undo(self, kept: Snapshot) -> None:
        """Drop what was kept, and let the guest go on; can be called again."""
        if _needs_rest(kept):
            if not self._work.states.is_off(self._work.uuid):
                self._work.states.end_job(self._work.uuid)
            self._work.drop_states(kept)
            if kept.taken is Taken.RUNNING:
                self._work.states.unpause(self._work.uuid)

    def freeze(self, kept: Snapshot) -> None:
        """Publish that what it left is frozen; the guest has ended."""
        for disk in kept.disks:
            volume = self._work.volume(disk.backend, disk.volume)
            usable = volume.state is VolumeState.USABLE
            if disk.place is Place.EXTERNAL and usable:
                frozen = msgspec.structs.replace(volume, state=VolumeState.FROZEN)
                self._work.backend(disk).update(frozen)

    # Private

    def _wanted(self, back: Return, target: Snapshot) -> Wanted:
        """Return what keeps the state that a revert leaves.

        Inside, where the revert needs that volume as it is: a layer over it would be
        in its way.
        """
        found = self._work.found
        inside = {
            (disk.backend, disk.volume)
            for disk in target.disks
            if disk.place is Place.INTERNAL
        }
        last = Wanted(name=back.keep, layer=back.layer, by=back.by)
        if not any((ref.backend, ref.volume) in inside for ref in found.disks):
            return last
        is_off = self._work.taken() is Taken.OFF
        return dataclasses.replace(
            last,
            kind=Kind.DISK if is_off else Kind.CHECKPOINT,
            memory=Memory.NONE if is_off else Memory.INTERNAL,
            places=_all_inside(found),
        )


def with_left(
    disks: tuple[model.DiskRef, ...], layers: Layers, left: planning.Plan
) -> tuple[tuple[model.DiskRef, ...], Layers]:
    """Have disks that do not go back go on in layers over what is kept of them."""
    over = {
        (backend, str(layer.backing)): (backend, layer)
        for backend, layer in left.layers
    }
    going_on = [
        over[ref.backend, ref.volume]
        for ref in disks
        if (ref.backend, ref.volume) in over
    ]
    tops = {(backend, str(each.backing)): each.name for backend, each in going_on}
    refs = tuple(
        msgspec.structs.replace(
            ref, volume=tops.get((ref.backend, ref.volume), ref.volume)
        )
        for ref in disks
    )
    return refs, (*layers, *going_on)


# Private


def _needs_rest(kept: Snapshot) -> bool:
    """Tell whether the guest has to stand still to have it kept."""
    outside = all(each.place is Place.EXTERNAL for each in kept.disks)
    return bool(kept.variables_volume) or not outside


def _all_inside(found: model.Instance) -> dict[str, Place]:
    return {ref.target: Place.INTERNAL for ref in found.disks if ref.role not in FIXED}
