# SPDX-License-Identifier: Apache-2.0
"""A running instance becomes an image.

1. The operation is noted in a journal of its own, before its first step.
2. The guest goes on in layers (frozen.py); paused only for that.
3. What it sees of the disks below is read, and goes straight to the sink
   (outgoing.py), while it runs. Nobody holds the instance meanwhile: it can be
   stopped, started, snapshotted. A move of it is refused.
4. The sink proves that what it has is what was read; then the image is let go.
5. The layers are merged back.

After a failure, and after a kill when recover() was called, the images are gone where
they were to be, and the guest has no layer of ours. One that was killed after the last
image was let go keeps them.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import msgspec
from oslo_log import log as logging

from virtmigrate import (
    errors,
    imagecache,
    journal,
    node,
    sinks,
    snapshot,
    snapshottree,
)
from virtmigrate.livesnapshot import frozen, places
from virtmigrate.livesnapshot.saving import Saving
from virtmigrate.livesnapshot.terms import Kind as Kind
from virtmigrate.livesnapshot.terms import Quiesce as Quiesce
from virtmigrate.livesnapshot.terms import Saved as Saved
from virtmigrate.livesnapshot.terms import Stage as Stage
from virtmigrate.livesnapshot.terms import Target as Target
from virtmigrate.livesnapshot.terms import Wanted as Wanted
from virtmigrate.progress import Progress
from virtmigrate.snapshot.work import Demand, new_operation

LOG = logging.getLogger(__name__)


class Images:
    """Makes images of the instances of one host. Safe to share between threads.

    Arguments:
        demand_no_move: raises InvalidState while a move of an instance is open here.
        service: where images of an image service come to be.
    """

    def __init__(
        self,
        here: node.Node,
        snapshots: snapshot.Snapshots,
        caches: imagecache.Caches,
        demand_no_move: Demand,
        service: sinks.Service,
    ) -> None:
        self._here = here
        self._freezer = frozen.Freezer(here, snapshots, demand_no_move)
        self._places = places.Places(here, caches, service)
        self._directory = Path(here.options.state_path) / "images"

    def save(
        self, uuid: str, wanted: Wanted, progress: Progress | None = None
    ) -> list[Saved]:
        """Make images of an instance; return them, that of the root disk first.

        The guest is as it was before, on success and on failure: what it writes
        meanwhile is merged into its disks. What cannot be cleared away at once, is by
        recover(), and the log says so.

        Raises ImageNotSaved, and no image is left; Cancelled, likewise. Before the
        guest is touched: SnapshotRefused, InvalidState, NotEntitled, QuiesceFailed,
        InstanceBusy, HostBusy, ImageNotTaken, ConfigurationError.
        """
        progress, options = progress or Progress(), self._here.options
        progress.phase("waiting for other images")
        with (
            self._here.locks.slot(
                "image-save",
                options.image_save_max,
                options.queue_timeout,
                progress.check,
            ),
            self._here.locks.only(_lock(uuid)) as is_alone,
        ):
            if not is_alone:
                raise errors.InstanceBusy(
                    instance=uuid,
                    host=self._here.name,
                    reason="another image is being made of it",
                )
            return self._save(uuid, new_operation(), wanted, progress)

    def recover(self) -> list[str]:
        """Clear away what killed processes left; return what remains, and why."""
        left = []
        for found in journal.load_all(self._directory):
            with self._here.locks.only(_lock(_instance(found))) as is_idle:
                # It may have ended until we had the lock.
                if not is_idle or not found.path.exists():
                    continue
                try:
                    noted = journal.Journal.load(found.path)
                    if noted is not None:
                        self._settle(noted)
                except Exception as e:
                    # One that stays keeps no other from being cleared away.
                    LOG.warning("operation=%s: %s", found.operation, e)
                    left.append(f"image {found.operation}: {e}")
        return left

    # Private

    def _save(
        self, uuid: str, operation: str, wanted: Wanted, progress: Progress
    ) -> list[Saved]:
        saving = Saving(self._here, self._places, operation, wanted, progress)
        targets = self._freezer.targets(uuid, all_disks=wanted.all_disks)
        goals = saving.goals(targets)
        name = f"image-{operation}"
        noted = journal.Journal.create(
            self._directory,
            operation,
            instance=uuid,
            snapshot=name,
            keep=wanted.keep_layer,
            targets=[msgspec.to_builtins(each) for each in goals.values()],
        )
        by = wanted.by if wanted.keep_layer else snapshottree.IN_THE_MAKING + operation
        touched = False
        try:
            with self._freezer.frozen(uuid, name, by, wanted, progress) as still:
                touched = True
                wanted.told(Stage.FROZEN)
                saved = saving.run(noted, goals, still)
        except BaseException as e:
            left = self._cleared(noted)
            if not touched or not isinstance(e, errors.Error):
                raise
            raise _failed(self._here, uuid, wanted, e, left) from e
        self._cleared(noted, progress)
        for each in saved:
            LOG.info("instance=%s disk=%s is image %s", uuid, each.disk, each.place)
        return saved

    def _cleared(self, noted: journal.Journal, progress: Progress | None = None) -> str:
        """Clear an operation away; return what could not be, which the log has, too."""
        try:
            if progress is not None:
                with contextlib.suppress(errors.Cancelled):
                    progress.phase("merging")
            self._settle(noted)
        except Exception as e:
            # The first error counts.
            LOG.exception("operation=%s is not cleared away", noted.operation)
            return str(e)
        return ""

    def _settle(self, noted: journal.Journal) -> None:
        """Undo an operation, or end one that came to its end; can be called again."""
        begun = noted.facts("begun") or {}
        is_saved = noted.has("saved")
        problems: list[errors.Error] = []
        if not is_saved:
            for target, mark in _begun(noted):
                with _collected(problems):
                    self._places.sink(target, noted.operation).abort(mark)
        if not (is_saved and begun["keep"]):
            with _collected(problems):
                self._freezer.drop(begun["instance"], begun["snapshot"])
        if problems:
            raise problems[0]
        noted.close()


# Private


def _lock(uuid: str) -> str:
    """Return the lock of who makes images of an instance, or clears them away.

    One at a time: the end of one merges layers that another one would be reading.
    """
    return f"image-of-{uuid}"


def _instance(noted: journal.Journal) -> str:
    return str((noted.facts("begun") or {})["instance"])


def _begun(noted: journal.Journal) -> Iterator[tuple[Target, str]]:
    """Yield what was begun to be filled, with what it is told by once published."""
    marks = {each["where"]: each["mark"] for each in noted.all("proven")}
    for each in noted.all("sending"):
        target = msgspec.convert(each["target"], Target)
        yield target, marks.get(target.where, "")


@contextlib.contextmanager
def _collected(problems: list[errors.Error]) -> Iterator[None]:
    try:
        yield
    except errors.Error as e:
        problems.append(e)


def _failed(
    here: node.Node, uuid: str, wanted: Wanted, cause: errors.Error, left: str
) -> errors.ImageNotSaved:
    rest = ""
    if left:
        rest = (
            f", but not all is cleared away ({left}): `virtmigrate host settle` goes "
            "on with it"
        )
    return errors.ImageNotSaved(
        image=wanted.target.where,
        instance=uuid,
        host=here.name,
        reason=cause,
        state=rest,
    )
