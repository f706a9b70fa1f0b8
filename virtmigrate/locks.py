# SPDX-License-Identifier: Apache-2.0
"""Locks: how several are taken in order, waited for and kept, and those of this host.

What several hosts change is published by compare-and-swap (record.py). A lock only
spares them work that one of them would lose, and keeps this host's own threads and
processes apart. So whoever loses a lock may not publish, and need not be stopped.

A backend hands in how one lock is taken (`Mechanism`). Two kinds differ in what
becomes of a holder:

- A file's lock ends with the process that has it.
- A lease ends some time after it was renewed last: by its end the storage lets others
  have it, and before that its holder holds it for lost.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import tenacity
from oslo_concurrency import lockutils
from oslo_log import log as logging

from virtmigrate import errors

LOG = logging.getLogger(__name__)

_LOOK = 0.2
"""Seconds between two looks for a free lock: it tells nobody."""

_RENEWALS = 4
"""Times that a lease is renewed while it lasts."""


class Grip(Protocol):
    """One lock that somebody has."""

    def renew(self) -> None:
        """Have it for another lease; LockLost, or an error of the storage."""

    def release(self) -> None:
        """Give it up; nothing happens when it was lost."""


class Mechanism(Protocol):
    """How one lock is taken. Safe to share between threads."""

    @property
    def lease(self) -> float | None:
        """Seconds that one lasts unless it is renewed; None: as long as its process."""

    def take(self, name: str) -> Grip | None:
        """Take a lock; None, without waiting, while another one has it."""


class Lease(Protocol):
    """Locks that are held."""

    def demand(self) -> None:
        """Raise LockLost when one of them is not ours any more."""


class Locks:
    """The locks of one backend. Safe to share between threads.

    One holder may not take the same name twice: it would wait for itself.

    Arguments:
        mechanism: how one is taken.
        host, backend: names, for errors.
    """

    def __init__(self, mechanism: Mechanism, host: str, backend: str) -> None:
        self._mechanism = mechanism
        self._where = {"host": host, "backend": backend}

    @property
    def lease(self) -> float | None:
        """Seconds until a dead holder's lock is free; None: it is free at once."""
        return self._mechanism.lease

    @contextlib.contextmanager
    def held(
        self,
        names: Iterable[str],
        *,
        timeout: float,
        check: Callable[[], object] = lambda: None,
    ) -> Iterator[Lease]:
        """Hold all of these, taken in the order of their names.

        Two holders that want the same ones never wait for each other in a circle,
        unless one takes more while it has some.

        Arguments:
            timeout: seconds to wait for all of them.
            check: called while waiting; what it raises ends the wait.

        Raises LockBusy when one did not become free, LockLost when one was lost
        meanwhile, and StorageError when the storage cannot say: none is held then.
        That one was lost later is said by demand(), and never when they are released.
        """
        deadline = time.monotonic() + timeout
        with _Held(self._mechanism, self._where) as held:
            for name in sorted(set(names)):
                while not held.take(name):
                    self._wait(name, deadline, timeout, check)
                    held.demand()
            yield held

    # Private

    def _wait(
        self, name: str, deadline: float, timeout: float, check: Callable[[], object]
    ) -> None:
        check()
        left = deadline - time.monotonic()
        if left <= 0:
            raise errors.LockBusy(**self._where, name=name, seconds=timeout)
        time.sleep(min(_LOOK, left))


class FileLocks:
    """File locks in one directory: of this host, or of a file system that hosts share.

    They end with their process. Their files stay. Safe to share between threads.

    Arguments:
        directory: the same one for all that are to exclude each other.
    """

    lease = None

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def take(self, name: str) -> Grip | None:
        """Take a lock; None while another one has it. Raises OSError."""
        self._directory.mkdir(parents=True, exist_ok=True)
        stack = contextlib.ExitStack()
        try:
            stack.enter_context(
                lockutils.lock(
                    name,
                    external=True,
                    lock_path=str(self._directory),
                    # The kernel keeps processes apart, and this keeps threads.
                    semaphores=self._semaphores(),
                    blocking=False,
                    do_log=False,
                )
            )
        except lockutils.AcquireLockFailedException:
            return None
        return _FileGrip(stack)

    # Private

    def _semaphores(self) -> lockutils.Semaphores:
        """Return those of this directory: two objects may be of the same."""
        return _semaphores.setdefault(self._directory.resolve(), lockutils.Semaphores())


class HostLocks:
    """Locks of this host: an instance, a place among few, what only one process does.

    Safe to share between threads. Each raises LockFileFailed where the directory takes
    no files: nothing is held then.

    Arguments:
        directory: the same for all processes that drive this host.
        host: its name, for errors.
        timeout: seconds to wait for a lock.
    """

    def __init__(self, directory: Path, host: str, timeout: float) -> None:
        self._directory = directory
        self._files = FileLocks(directory)
        self._host = host
        self._timeout = timeout

    @contextlib.contextmanager
    def instance(self, uuid: str) -> Iterator[None]:
        """Hold an instance; InstanceBusy when another operation keeps it too long."""
        grip = self._retrying()(self._take, f"instance-{uuid}")
        if grip is None:
            raise errors.InstanceBusy(
                instance=uuid,
                host=self._host,
                reason=f"it did not end within {self._timeout:g} s",
            )
        try:
            yield
        finally:
            grip.release()

    @contextlib.contextmanager
    def slot(
        self, name: str, count: int, timeout: float, check: Callable[[], object]
    ) -> Iterator[None]:
        """Hold one of `count` slots, which all processes of this host share.

        Arguments:
            timeout: seconds to wait for one.
            check: called while waiting; what it raises ends the wait.

        Raises HostBusy when none became free in time.
        """
        deadline = time.monotonic() + timeout
        names = [f"{name}-{n}" for n in range(count)]
        while (grip := self._take_any(names)) is None:
            check()
            if time.monotonic() >= deadline:
                raise errors.HostBusy(
                    host=self._host, count=count, what=name, seconds=timeout
                )
            time.sleep(_LOOK)
        try:
            yield
        finally:
            grip.release()

    @contextlib.contextmanager
    def only(self, name: str) -> Iterator[bool]:
        """Be the only one of this host that does `name`; yield False where another
        one does, without waiting."""
        grip = self._take(name)
        try:
            yield grip is not None
        finally:
            if grip is not None:
                grip.release()

    # Private

    def _take(self, name: str) -> Grip | None:
        try:
            return self._files.take(name)
        except OSError as e:
            raise errors.LockFileFailed(
                host=self._host, name=name, path=self._directory, reason=e
            ) from e

    def _take_any(self, names: list[str]) -> Grip | None:
        for name in names:
            if (grip := self._take(name)) is not None:
                return grip
        return None

    def _retrying(self) -> tenacity.Retrying:
        return tenacity.Retrying(
            retry=tenacity.retry_if_result(lambda grip: grip is None),
            wait=tenacity.wait_random_exponential(multiplier=0.02, max=0.5),
            stop=tenacity.stop_after_delay(self._timeout),
            retry_error_callback=lambda state: None,
        )


# Private

_semaphores: dict[Path, lockutils.Semaphores] = {}


class _FileGrip:
    """A file that is locked."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack

    def renew(self) -> None:
        """Nothing: it is ours as long as this process lives."""

    def release(self) -> None:
        self._stack.close()


class _Held:
    """Locks that one holder has, renewed by a thread.

    What counts is when a renewal was asked for, by a clock that goes on while the
    machine sleeps: the storage counts from later, so it never gives away what is held
    for ours here. What was late once stays lost, whatever a later renewal says.
    """

    def __init__(self, mechanism: Mechanism, where: dict[str, str]) -> None:
        self._mechanism = mechanism
        self._where = where
        self._grips: dict[str, Grip] = {}
        self._until: dict[str, float] = {}
        self._lost: set[str] = set()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "_Held":
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        for name, grip in reversed(self._grips.items()):
            try:
                grip.release()
            except errors.Error as e:
                # Its lease ends by itself.
                LOG.warning("lock=%s not released: %s", name, e)

    def take(self, name: str) -> bool:
        """Take one more; False while another one has it."""
        asked = _now()
        try:
            grip = self._mechanism.take(name)
        except OSError as e:
            raise errors.LockError(**self._where, name=name, reason=str(e)) from e
        if grip is None:
            return False
        if self._mechanism.lease is not None:
            self._until[name] = asked + self._mechanism.lease
        self._grips[name] = grip
        if self._until and self._thread is None:
            self._thread = threading.Thread(
                target=self._keep, name="virtmigrate-lease", daemon=True
            )
            self._thread.start()
        return True

    def demand(self) -> None:
        now = _now()
        lost = {name for name, until in list(self._until.items()) if now >= until}
        self._lost |= lost
        if self._lost:
            raise errors.LockLost(**self._where, name=", ".join(sorted(self._lost)))

    # Private

    def _keep(self) -> None:
        """Renew until they are released, or one is lost."""
        assert self._mechanism.lease is not None
        while not self._over.wait(self._mechanism.lease / _RENEWALS):
            for name, grip in list(self._grips.items()):
                self._renew(name, grip, self._mechanism.lease)
            if self._lost:
                LOG.warning("lock=%s lost", ", ".join(sorted(self._lost)))
                return

    def _renew(self, name: str, grip: Grip, lease: float) -> None:
        asked = _now()
        if asked >= self._until[name]:
            self._lost.add(name)
            return
        try:
            grip.renew()
        except errors.LockLost:
            self._lost.add(name)
        except errors.Error as e:
            LOG.warning("lock=%s not renewed, tried again: %s", name, e)
        else:
            if _now() >= self._until[name]:
                # It ended before the answer came: others may have had it.
                self._lost.add(name)
            else:
                self._until[name] = asked + lease


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
