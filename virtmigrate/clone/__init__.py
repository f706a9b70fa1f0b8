# SPDX-License-Identifier: Apache-2.0
"""Clones: an instance becomes several, running or off.

A clone stands on its source's frozen disks, by layers of its own, and goes on from its
source's memory. Before it reaches a network it is somebody else, inside too, or it
stays off. The journal of a call lies in `state_path`/clones.
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from oslo_log import log as logging

from virtmigrate import draining, errors, journal, model, node
from virtmigrate import snapshot as snapshots
from virtmigrate.clone.agents import Agents
from virtmigrate.clone.course import Course
from virtmigrate.clone.detaching import Detaching
from virtmigrate.clone.planning import Planner
from virtmigrate.clone.terms import Identities, New, Outcome, Wanted
from virtmigrate.progress import Progress
from virtmigrate.snapshot.work import Demand, new_operation

LOG = logging.getLogger(__name__)

__all__ = ["Clones", "Identities", "New", "Outcome", "Wanted"]


class Clones:
    """The clones of one host. Safe to share between threads.

    Arguments:
        demand_no_move: raises InvalidState while a move of an instance is open here.
        identities: who makes guests somebody else; by default their agents.
    """

    def __init__(
        self,
        here: node.Node,
        known: snapshots.Snapshots,
        demand_no_move: Demand,
        identities: Identities | None = None,
    ) -> None:
        self._here = here
        self._snapshots = known
        self._demand_no_move = demand_no_move
        self.identities: Identities = identities or Agents(
            here.host, float(here.options.clone_identity_timeout)
        )

    def all(self) -> list[model.Instance]:
        """Return the records of this host's clones, those being made, too."""
        found = []
        for name in self._here.instances.names():
            stored = self._here.instances.find(name)
            if stored is not None and stored.body.cloned is not None:
                found.append(stored.body)
        return found

    def clone(
        self, wanted: Wanted, progress: Progress | None = None
    ) -> tuple[Outcome, ...]:
        """Make clones of an instance; the source goes on.

        A clone that fails leaves nothing, and the others go on. Raises CloneRefused:
        nothing was touched; CloneFailed when all failed, with the reason of the first;
        what the snapshot of the source raises: there is no clone; and Cancelled: those
        that were ready stay.
        """
        draining.demand_open(self._here.mailbox, self._here.name)
        course = self._course(progress)
        with self._claimed(new.uuid for new in wanted.new):
            self._demand_no_move(wanted.source)
            self._here.demand_settled(wanted.source)
            plan = Planner(self._here, self.identities).plan(wanted)
            made = [(twin.new.uuid, twin.operation) for twin in plan.twins]
            log = journal.Journal.create(
                self._directory, new_operation(), source=wanted.source, new=made
            )
            try:
                outcomes = course.run(wanted, plan, log)
            except BaseException:
                self._clear_after(course, log)
                raise
            self._clear_after(course, log)
        return self._demand_any(wanted, outcomes)

    def detach(self, uuid: str, progress: Progress | None = None) -> None:
        """Give a clone all that it has of other instances' volumes; it runs on.

        Can be called again after any failure: it is whole all the time. Raises
        CloneRefused, CloneError.
        """
        with self._here.claimed(uuid):
            owners = self._detaching.run(uuid, progress)
        for owner in sorted({*owners, uuid}):
            self.tidy(owner)

    def tidy(self, uuid: str) -> None:
        """Merge what an instance had lent and nobody stands on any more.

        What is not done now is done with its next change of snapshots.
        """
        try:
            if self._here.own_record(uuid) is not None:
                with self._here.claimed(uuid):
                    self._detaching.tidy(uuid)
        except errors.Error as e:
            LOG.warning("instance=%s is not tidied up: %s", uuid, e)

    def lenders(self, uuid: str) -> set[str]:
        """Return the instances whose volumes one's disks stand on.

        None of those whose records cannot be read: it has to be possible to destroy
        what is broken.
        """
        try:
            found = self._here.own_record(uuid)
            if found is None or found.cloned is None:
                return set()
            return self._detaching.lenders(found)
        except errors.Error as e:
            LOG.warning("instance=%s its chains cannot be read: %s", uuid, e)
            return set()

    def finish(self) -> list[str]:
        """Make an end of what kills left on this host; return what remains, and why."""
        left = []
        for log in journal.load_all(self._directory):
            try:
                self._finish(log)
            except errors.InstanceBusy as e:
                # The source: its other operation comes first.
                LOG.debug("clones=%s: %s", log.operation, e)
            except Exception as e:
                # What one journal says keeps no other from being finished.
                LOG.exception("clones=%s", log.operation)
                left.append(f"clones, operation {log.operation}: {e}")
        return left

    # Private

    @property
    def _directory(self) -> Path:
        return self._here.journals.with_name("clones")

    @property
    def _detaching(self) -> Detaching:
        return Detaching(self._here, self._demand_no_move, self._directory)

    def _finish(self, log: journal.Journal) -> None:
        facts = log.facts("begun")
        assert facts is not None
        named = [facts["held"]] if "held" in facts else [u for u, _ in facts["new"]]
        with self._idle(named) as is_idle:
            if not is_idle or not log.path.exists():
                return
            if "held" in facts:
                self._detaching.finish(log)
            else:
                self._course(None).clear(log)

    def _course(self, progress: Progress | None) -> Course:
        return Course(
            self._here, self._snapshots, self.identities, progress or Progress()
        )

    def _clear_after(self, course: Course, log: journal.Journal) -> None:
        """Make an end; what fails is left to finish(), and the first error counts."""
        try:
            course.clear(log)
        except errors.Error:
            LOG.exception("clones=%s: settling goes on with it", log.operation)

    def _demand_any(
        self, wanted: Wanted, outcomes: list[Outcome]
    ) -> tuple[Outcome, ...]:
        if any(each.state is not None for each in outcomes):
            return tuple(outcomes)
        raise errors.CloneFailed(
            instance=wanted.source,
            clone=", ".join(each.uuid for each in outcomes),
            host=self._here.name,
            reason=outcomes[0].reason,
        )

    @contextlib.contextmanager
    def _claimed(self, uuids: Iterable[str]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for uuid in sorted(set(uuids)):
                stack.enter_context(self._here.claimed(uuid))
            yield

    @contextlib.contextmanager
    def _idle(self, uuids: Iterable[str]) -> Iterator[bool]:
        """Claim instances without waiting; yield False where one is in work."""
        with contextlib.ExitStack() as stack:
            names = [f"instance-{uuid}" for uuid in sorted(set(uuids))]
            locks = self._here.locks
            idle = [stack.enter_context(locks.only(name)) for name in names]
            yield all(idle)
