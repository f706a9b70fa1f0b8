# SPDX-License-Identifier: Apache-2.0
"""The requests that a receiver took in, and the threads that work on them.

Who waits, for a thread or for an fsync, is told so by a head that changes; who is
worked on, by the bytes that are done. A job that does neither for long looks dead to
its source, which then helps itself.
"""

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Protocol

from oslo_log import log as logging

from virtmigrate import errand, errors
from virtmigrate.request import Answer, Request, State, Verb

LOG = logging.getLogger(__name__)

_RUNNING = 4
"""Requests that are worked on at once."""

_RUNNING_EACH = 2
"""Of these, requests of one operation."""

_SLOW = (Verb.REUSE, Verb.RECLAIM, Verb.IMPORT, Verb.GROW)
"""Verbs that have threads of their own: proofs and hand-overs never wait for them."""

_RUNNING_SLOW = 2
"""Requests of these that are worked on at once."""

_PATIENCE = 3600.0
"""Seconds that a wait, for a thread or for an fsync, counts as life."""

_FAREWELL = 5.0
"""Seconds that threads get to end."""


class Write(Protocol):
    """Writes the answer of a request, its head last; VolumeNotFound without one."""

    def __call__(self, name: str, answer: Answer, payload: bytes = b"") -> None: ...


class Job:
    """A request that was taken in. Safe to share between threads."""

    def __init__(self, name: str, wanted: Request, digest: str) -> None:
        self.name = name
        self.request = wanted
        self.digest = digest
        self.is_running = False
        self.is_slow = wanted.verb in _SLOW
        self.lock = threading.Lock()
        """Held while its answer is written."""
        self.is_final = False
        self._done = 0
        self._told = -1
        self._beat = 0
        self._is_mute = False
        self._alive_until = time.monotonic() + _PATIENCE
        self._stopped = threading.Event()
        self._counting = threading.Lock()

    # errand.Work

    def advance(self, count: int) -> None:
        with self._counting:
            self._done += count

    def is_stopped(self) -> bool:
        return self._stopped.is_set()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        self._alive_until = time.monotonic() + _PATIENCE
        try:
            yield
        finally:
            self._alive_until = 0.0

    # For the receiver

    def begin(self) -> None:
        self.is_running, self._alive_until = True, 0.0

    def stop(self) -> None:
        self._stopped.set()

    def mute(self) -> bool:
        """Note that its answer cannot be written; tell whether that is new."""
        is_new, self._is_mute = not self._is_mute, True
        return is_new

    def sign(self) -> Answer | None:
        """Return a sign of life; None when nothing happened since the last."""
        done = self._done
        if done == self._told and time.monotonic() > self._alive_until:
            return None
        self._told, self._beat = done, self._beat + 1
        return Answer(
            request=self.digest, state=State.WORKING, beat=self._beat, done=done
        )

    def final(self, outcome: errand.Outcome) -> Answer:
        found = outcome.found
        return Answer(
            request=self.digest,
            state=State.DONE,
            done=self._done,
            name=outcome.name,
            size=outcome.size,
            durable=outcome.durable,
            digest=found.digest() if found is not None else outcome.digest,
        )

    def failed(self, reason: str) -> Answer:
        return Answer(request=self.digest, state=State.FAILED, reason=reason)


class Desk:
    """Where the requests lie. Safe to share between threads."""

    def __init__(self, errands: errand.Errands, write: Write) -> None:
        self._errands = errands
        self._write = write
        self._jobs: dict[str, Job] = {}
        self._changed = threading.Condition()
        self._executors: dict[bool, futures.ThreadPoolExecutor] = {}
        self._wake: Callable[[], object] = lambda: None
        self.is_owing = False
        """A request was left without an answer, and has to be taken in again."""

    @contextlib.contextmanager
    def opened(self, wake: Callable[[], object]) -> Iterator[None]:
        """Work while in `with`; then stop, and leave what is not answered.

        Arguments:
            wake: called when a thread gets free.
        """
        self._wake = wake
        self._executors = {
            False: futures.ThreadPoolExecutor(_RUNNING, "receiver"),
            True: futures.ThreadPoolExecutor(_RUNNING_SLOW, "receiver-slow"),
        }
        try:
            yield
        finally:
            executors, self._executors = self._executors, {}
            with self._changed:
                self._close()
            for executor in executors.values():
                executor.shutdown(wait=False)

    def is_busy(self) -> bool:
        return bool(self._jobs)

    def is_full(self, limit: int) -> bool:
        return len(self._jobs) >= limit

    def rest(self, seconds: float) -> None:
        """Wait until a thread gets free."""
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs, seconds)

    def has(self, name: str, digest: str) -> bool:
        """Tell whether a request is being worked on; one that it replaced is ended."""
        with self._changed:
            job = self._jobs.get(name)
        if job is not None and job.digest != digest:
            job.stop()
        return job is not None

    def take(self, job: Job) -> bool:
        """Take a request in; raises errors.Error when its answer cannot be written."""
        self._tell(job)
        with self._changed:
            self._jobs[job.name] = job
        self._dispatch()
        return True

    def pulse(self) -> None:
        """Give a sign of life for each request; raises when the host is away."""
        with self._changed:
            jobs = list(self._jobs.values())
        for job in jobs:
            try:
                self._tell(job)
            except (errors.HostUnreachable, errors.HostTimeout):
                raise
            except errors.Error as e:
                if job.mute():
                    LOG.warning("request=%s gets no answer: %r", job.name, str(e))

    # Private

    def _close(self) -> None:
        """End all work; one that hangs in its storage is left to itself."""
        for name, job in list(self._jobs.items()):
            job.stop()
            if not job.is_running:
                del self._jobs[name]
        if not self._changed.wait_for(lambda: not self._jobs, _FAREWELL):
            LOG.warning("requests %s do not end", sorted(self._jobs))
            self._jobs.clear()

    def _tell(self, job: Job) -> None:
        if not job.lock.acquire(blocking=False):
            return
        try:
            sign = None if job.is_final else job.sign()
            if sign is not None:
                self._write(job.name, sign)
        except errors.VolumeNotFound:
            job.stop()
        finally:
            job.lock.release()

    def _dispatch(self) -> None:
        """Begin with those whose turn it is."""
        with self._changed:
            for is_slow, executor in self._executors.items():
                limit = _RUNNING_SLOW if is_slow else _RUNNING
                jobs = [j for j in self._jobs.values() if j.is_slow is is_slow]
                for job in _next(jobs, limit):
                    job.begin()
                    executor.submit(self._run, job)

    def _run(self, job: Job) -> None:
        try:
            self._work(job)
        except (errors.Cancelled, errors.VolumeNotFound) as e:
            LOG.debug("request=%s was left: %r", job.name, str(e))
            self.is_owing = True
        except errors.Error as e:
            LOG.warning("request=%s is not answered: %r", job.name, str(e))
            self.is_owing = True
        except Exception:
            LOG.exception("request=%s", job.name)
        finally:
            with self._changed:
                self._jobs.pop(job.name, None)
                self._changed.notify_all()
            self._dispatch()
            self._wake()

    def _work(self, job: Job) -> None:
        """Do the work and answer; Cancelled leaves the request as it is."""
        outcome = errand.Outcome()
        try:
            outcome = self._errands.perform(job.request, job)
            answer = job.final(outcome)
        except (errand.Refused, errors.Error) as e:
            answer = job.failed(str(e))
        except errors.Cancelled:
            raise
        except Exception:
            LOG.exception("request=%s", job.name)
            answer = job.failed("it failed; the log there says why")
        found = outcome.found
        with job.lock:
            job.is_final = True
            payload = found.digests() if found is not None else b""
            self._write(job.name, answer, payload)
        LOG.info(
            "operation=%s %s volume=%r: %s %r",
            job.request.operation,
            job.request.verb.value,
            job.request.volume,
            answer.state.value,
            answer.reason,
        )
        if outcome.after is not None:
            outcome.after()


# Private


def _next(jobs: list[Job], limit: int) -> list[Job]:
    """Return the jobs whose turn it is, fairly among operations."""
    running = collections.Counter(j.request.operation for j in jobs if j.is_running)
    found: list[Job] = []
    for job in jobs:
        operation = job.request.operation
        is_due = running.total() < limit and running[operation] < _RUNNING_EACH
        if is_due and not job.is_running:
            running[operation] += 1
            found.append(job)
    return found
