# SPDX-License-Identifier: Apache-2.0
"""Doing what a plan says: it always ends, and says what became of each instance.

Each instance climbs its ladder: every way that its policy names and that is open, each
a set number of times, for a set time. What failed with one host is planned anew for
the others, each host once. Every move stands in the diary before its first step, so
that after a kill the next drain first ends what was begun, then plans the rest anew.
"""

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from oslo_log import log as logging

from virtmigrate import errors
from virtmigrate.drain import attempt, preflight
from virtmigrate.drain.attempt import Attempts
from virtmigrate.drain.diary import Diary
from virtmigrate.drain.lanes import Lanes
from virtmigrate.drain.mover import Mover
from virtmigrate.drain.values import (
    Instance,
    Leftovers,
    Line,
    Outcome,
    Plan,
    Prospect,
    Report,
    Result,
)

LOG = logging.getLogger(__name__)

Listener = Callable[[Result], object]


@dataclass(frozen=True)
class Limits:
    """What a drain may do at once, and how long it tries."""

    moves: int = 2
    """Instances at once."""
    per_target: int = 1
    """Of these, to one host."""
    tries: int = 2
    """Of each way."""
    seconds: float = 6 * 3600.0
    """For one try, until its hand-over."""


class Drain:
    """Empties a host. One at a time for each host; cancel() from any thread.

    Arguments:
        mover: what moves the instances.
        look: what makes its plans.
        state: the host's state_path, for the diary.
        limits: see there.
        listener: told of each instance whose turn is over, from several threads.
    """

    def __init__(
        self,
        mover: Mover,
        look: preflight.Preflight,
        state: Path,
        limits: Limits,
        listener: Listener = lambda result: None,
    ) -> None:
        self._mover = mover
        self._look = look
        self._state = state
        self._limits = limits
        self._listener = listener
        self._stopping = threading.Event()
        self._abort = threading.Event()
        self._lanes: Lanes | None = None

    def cancel(self, *, abort: bool) -> None:
        """Begin no more moves; those that run end as they would, or are put back.

        Arguments:
            abort: put those back that are not handed over.
        """
        if abort:
            self._abort.set()
        self._stopping.set()
        if lanes := self._lanes:
            lanes.close()

    def run(
        self,
        only: dict[str, str] | None = None,
        then: Callable[[Report], object] = lambda report: None,
    ) -> Report:
        """Move what can go, and return how that went. Never moves one twice.

        Arguments:
            only: see Preflight.plan.
            then: called with the report before the diary is closed: a kill before it
                ends makes the next drain report all of it again.

        Raises StorageError, HostError when not even a plan can be made; the diary then
        keeps what was done.
        """
        operation = secrets.token_hex(8)
        diary = Diary.open_in(self._state, operation, time=time.time())
        attempts = Attempts(
            self._mover, diary, self._limits.tries, self._limits.seconds, self._abort
        )
        here = {instance.uuid: instance for instance in self._mover.instances()}
        results = {r.uuid: r for r in diary.results() if r.uuid not in here}
        self._finish_begun(diary, attempts, here, results)
        self._climb(attempts, results, only)
        report = self._report(diary, results)
        then(report)
        if not report.count(Outcome.UNDECIDED, Outcome.ARRIVED):
            diary.close()
        return report

    # Private

    def _finish_begun(
        self,
        diary: Diary,
        attempts: Attempts,
        here: dict[str, Instance],
        results: dict[str, Result],
    ) -> None:
        """End the moves that a killed drain began."""
        for move in diary.open_moves():
            known = here.get(move.uuid)
            if self._mover.is_under_way(move.uuid):
                rung = Prospect(target=move.target, way=move.way)
                instance = known or attempt.unknown(move.uuid)
                result = attempts.run(instance, (rung,))
            elif known is None:
                # Killed between its end and the note of that.
                result = Result(
                    uuid=move.uuid,
                    name=move.uuid,
                    outcome=Outcome.MOVED,
                    way=move.way,
                    target=move.target,
                    tries=1,
                )
                diary.ended(result)
            else:
                continue
            if result.outcome is not Outcome.STAYED:
                results[move.uuid] = result
                self._listener(result)

    def _climb(
        self,
        attempts: Attempts,
        results: dict[str, Result],
        only: dict[str, str] | None,
    ) -> None:
        """Plan and move, until nothing that stays has a host left to try."""
        refused: dict[str, tuple[str, ...]] = {}
        wanted = only
        while True:
            plan = self._look.plan(only=wanted, refused=refused)
            lines = [
                line
                for line in plan.lines
                if line.instance.uuid not in results
                or (line.instance.uuid in refused and line.target)
            ]
            again = self._run_all(attempts, plan, lines, results)
            if not again or self._stopping.is_set():
                return
            for uuid, target in again.items():
                refused[uuid] = (*refused.get(uuid, ()), target)
            wanted = {uuid: (only or {}).get(uuid, "") for uuid in again}

    def _run_all(
        self,
        attempts: Attempts,
        plan: Plan,
        lines: list[Line],
        results: dict[str, Result],
    ) -> dict[str, str]:
        """Run lines, so many at once; return who failed with which target."""
        lanes = self._lanes = Lanes(lines, self._limits.per_target)
        if self._stopping.is_set():
            lanes.close()
        failed: dict[str, str] = {}

        def work() -> None:
            while (line := lanes.take()) is not None:
                try:
                    result = self._one(attempts, line, results.get(line.instance.uuid))
                    results[result.uuid] = result
                    if result.outcome is Outcome.STAYED and line.target:
                        failed[result.uuid] = line.target
                    self._listener(result)
                except BaseException:
                    # Without a diary nothing more may begin.
                    lanes.close()
                    raise
                finally:
                    lanes.done(line)

        with ThreadPoolExecutor(self._limits.moves, "drain") as pool:
            _await([pool.submit(work) for _ in range(self._limits.moves)])
        for line in lines:
            if line.instance.uuid not in results:
                results[line.instance.uuid] = _not_begun(line.instance)
        return failed

    def _one(self, attempts: Attempts, line: Line, before: Result | None) -> Result:
        """Give one instance its turn."""
        if line.blocked:
            return attempt.stayed(line.instance, line.blocked)
        result = attempts.run(line.instance, line.rungs)
        return attempt.joined(before, result)

    def _report(self, diary: Diary, results: dict[str, Result]) -> Report:
        self._mover.settle()
        gone = [uuid for uuid, r in results.items() if r.outcome is Outcome.MOVED]
        return Report(
            host=self._mover.host,
            began=diary.began(),
            ended=time.time(),
            results=tuple(sorted(results.values(), key=lambda each: each.uuid)),
            leftovers=self._leftovers(gone),
            cancelled=self._stopping.is_set(),
        )

    def _leftovers(self, gone: list[str]) -> Leftovers:
        try:
            return self._mover.leftovers(gone)
        except errors.Error as e:
            LOG.error("host=%s what is left is not known: %s", self._mover.host, e)
            return Leftovers(operations=(f"what is left is not known: {e}",))


# Private

_LOOK = 0.5
"""Seconds until a signal that another thread got is heard at the latest."""


def _await(works: Sequence[Future[None]]) -> None:
    """Wait for threads, and raise what one of them raised.

    Python calls a signal's handler in the main thread only, between two of its steps; a
    wait without end has none when the kernel gave the signal to another thread.
    """
    while futures.wait(works, timeout=_LOOK).not_done:
        pass
    for work in works:
        work.result()


def _not_begun(instance: Instance) -> Result:
    return Result(
        uuid=instance.uuid,
        name=instance.name,
        outcome=Outcome.CANCELLED,
        reason="it was not begun: the drain was cancelled",
    )
