# SPDX-License-Identifier: Apache-2.0
"""One instance's turn: its ladder climbed, rung by rung."""

import threading
import time

import msgspec
from oslo_log import log as logging

from virtmigrate import errors
from virtmigrate.drain.diary import Diary
from virtmigrate.drain.mover import Moved, Mover, Watch
from virtmigrate.drain.values import Instance, Outcome, Prospect, Result, Way

LOG = logging.getLogger(__name__)

_BETWEEN = (errors.MigrationUndecided, errors.NotArrived)
"""After these nothing else may be tried: who has it is not known here."""

_FINAL = (errors.MigrationRefused, errors.WayMissing)
"""After these the same way would be refused again."""


class Attempts:
    """Gives instances their turns. Safe to share between threads.

    Arguments:
        tries: of each way.
        seconds: for each try.
        abort: set when moves that run are to be put back.
    """

    def __init__(
        self,
        mover: Mover,
        diary: Diary,
        tries: int,
        seconds: float,
        abort: threading.Event,
    ) -> None:
        self._mover = mover
        self._diary = diary
        self._tries = tries
        self._seconds = seconds
        self._abort = abort

    def run(self, instance: Instance, rungs: tuple[Prospect, ...]) -> Result:
        """Try what can be tried, in its order; return how it ended.

        Whatever goes wrong is a result, too: a drain has other instances.
        """
        began, climb = time.monotonic(), _Climb(instance)
        for rung in rungs:
            if climb.result is None:
                self._try(climb, rung)
        result = msgspec.structs.replace(
            climb.result or climb.ended(Outcome.STAYED),
            seconds=round(time.monotonic() - began, 3),
        )
        self._diary.ended(result)
        LOG.info(
            "instance=%s drained: %s %s %s",
            instance.uuid,
            result.outcome.value,
            result.target,
            result.reason,
        )
        return result

    # Private

    def _try(self, climb: "_Climb", rung: Prospect) -> None:
        """Try one way, until it goes, cannot go, or has been tried often enough."""
        climb.rung = rung
        for _ in range(self._tries):
            if self._abort.is_set():
                climb.result = climb.ended(Outcome.CANCELLED)
                return
            climb.tries += 1
            if rung.target:
                # What this raises ends the drain: nothing may begin unknown.
                self._diary.moving(climb.instance.uuid, rung.target, rung.way)
            if self._is_over(climb, rung):
                return

    def _is_over(self, climb: "_Climb", rung: Prospect) -> bool:
        """Try a way once; tell whether it need not be tried again."""
        try:
            climb.result = self._once(climb.instance, rung, climb)
            return True
        except _BETWEEN as e:
            climb.undecided(e)
            return True
        except (errors.Error, errors.Cancelled) as e:
            return self._is_final(climb, e)
        except Exception as e:
            LOG.exception("instance=%s its move failed", climb.instance.uuid)
            climb.undecided(e)
            return True

    def _is_final(self, climb: "_Climb", error: BaseException) -> bool:
        """Note why a try failed; tell whether it would fail again."""
        cancelled = isinstance(error.__cause__ or error, errors.Cancelled)
        if cancelled and self._abort.is_set():
            climb.result = climb.ended(Outcome.CANCELLED)
            return True
        climb.failed(error, late=cancelled, seconds=self._seconds)
        return isinstance(error, _FINAL) and not cancelled

    def _once(self, instance: Instance, rung: Prospect, climb: "_Climb") -> Result:
        if rung.way is Way.LEAVE:
            return climb.ended(Outcome.LEFT)
        if rung.way is Way.STOP:
            self._mover.stop(instance)
            return climb.ended(Outcome.STOPPED)
        watch = Watch(self._abort, self._seconds)
        return climb.arrived(self._mover.move(instance, rung.target, rung.way, watch))


class _Climb:
    """How far one instance came."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.rung: Prospect | None = None
        self.tries = 0
        self.result: Result | None = None
        self._failures: list[str] = []

    def failed(
        self, error: BaseException, *, late: bool = False, seconds: float = 0.0
    ) -> None:
        way = self.rung.way.value if self.rung else "?"
        text = f"it took longer than {seconds:g} s" if late else str(error)
        self._failures.append(f"{way}: {text or type(error).__name__}")

    def undecided(self, error: BaseException) -> None:
        self.failed(error)
        self.result = self.ended(Outcome.UNDECIDED)

    def ended(self, outcome: Outcome) -> Result:
        return Result(
            uuid=self.instance.uuid,
            name=self.instance.name,
            outcome=outcome,
            way=self.rung.way if self.rung else None,
            target=self.rung.target if self.rung else "",
            tries=self.tries,
            reason="; ".join(self._failures),
        )

    def arrived(self, moved: Moved) -> Result:
        outcome = Outcome.ARRIVED if moved.kept else Outcome.MOVED
        if moved.kept:
            self._failures.append(moved.kept)
        return msgspec.structs.replace(
            self.ended(outcome), downtime=moved.downtime, sent=moved.sent
        )


def stayed(instance: Instance, reason: str) -> Result:
    """Return the result of an instance for which nothing could be tried."""
    return Result(
        uuid=instance.uuid, name=instance.name, outcome=Outcome.STAYED, reason=reason
    )


def joined(before: Result | None, after: Result) -> Result:
    """Return what an instance's later turn came to, with what failed before it."""
    if before is None:
        return after
    reasons = "; ".join(
        filter(None, (f"{before.target}: {before.reason}", after.reason))
    )
    return msgspec.structs.replace(
        after,
        tries=before.tries + after.tries,
        seconds=before.seconds + after.seconds,
        reason=reasons,
    )


def unknown(uuid: str) -> Instance:
    """Return an instance of which only the move is left here."""
    return Instance(uuid=uuid, name=uuid, power="off", memory=0, policy=())
