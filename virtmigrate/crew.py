# SPDX-License-Identifier: Apache-2.0
"""Threads that work on one task, and their patience with hosts that go away."""

import concurrent.futures
import errno
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import tenacity
from oslo_log import log as logging

from virtmigrate import errors

LOG = logging.getLogger(__name__)

T = TypeVar("T")


class Work(Protocol):
    """What is gone on with when a host comes back."""

    stop: threading.Event
    """Set when the work is to end."""
    moved: float
    """When something was acknowledged last."""

    def check(self) -> None:
        """Raise Cancelled when this work is to end."""


class Task(Work, Protocol):
    """What a crew works on."""

    def handle(self, blocks: range) -> None:
        """Do one stretch; may be called again for the same."""


def persist(work: Work, retry: float, call: Callable[..., T], *args: object) -> T:
    """Call, and call again while a host is away.

    Arguments:
        retry: seconds for which it may be lost.
    """
    patience = _Patience(retry)
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_passes),
        wait=tenacity.wait_random_exponential(multiplier=0.1, max=5),
        stop=lambda _: work.stop.is_set() or patience.ends(work.moved),
        sleep=lambda seconds: _wait(work, seconds),
        before_sleep=_tell,
        reraise=True,
    )
    return retrying(call, *args)


class Crew:
    """Workers on one task: the first error wins, and stops the others.

    Arguments:
        feed: the stretches; asked by one thread at a time.
        retry: as for persist().
    """

    def __init__(self, task: Task, feed: Iterator[range], retry: float) -> None:
        self._task = task
        self._feed = feed
        self._retry = retry
        self._lock = threading.Lock()

    def run(self, workers: concurrent.futures.Executor, count: int) -> None:
        """Do all of the task; when this returns or raises, nobody works on it."""
        futures = [workers.submit(self._work) for _ in range(count)]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException:
            self._task.stop.set()
            raise
        finally:
            concurrent.futures.wait(futures)

    # Private

    def _work(self) -> None:
        while (blocks := self._next()) is not None:
            persist(self._task, self._retry, self._task.handle, blocks)
            self._task.moved = time.monotonic()

    def _next(self) -> range | None:
        with self._lock:
            return next(self._feed, None)


class _Patience:
    """How long a host has been lost: not how long it took until then."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since = float("-inf")

    def ends(self, moved: float) -> bool:
        """Tell, at a failure, whether to give up.

        Arguments:
            moved: when there was a sign of life; from then on it begins anew.
        """
        now = time.monotonic()
        if moved > self._since:
            self._since = now
        return now - self._since >= self._seconds


# Private


def _wait(work: Work, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        work.check()
        work.stop.wait(min(left, 0.2))


def _passes(error: BaseException) -> bool:
    """Tell whether an error may be over when it is tried again."""
    if isinstance(error, errors.LibvirtFailed):
        # Without a code: it got lost. A daemon that starts has its pools a bit later.
        return error.code is None or "is not active" in str(error)
    if isinstance(error, errors.CertificateRefused):
        # A connection that breaks at that moment looks the same (libvirt 9.0).
        return "the host hung up" in str(error)
    away = (errors.HostUnreachable, errors.HostTimeout, errors.PoolBusy)
    return isinstance(error, away) or _is_reset(error)


def _is_reset(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno == errno.ECONNRESET


def _tell(state: tenacity.RetryCallState) -> None:
    outcome = state.outcome
    LOG.warning("a copy tries again: %s", outcome.exception() if outcome else "?")
