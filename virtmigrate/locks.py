# SPDX-License-Identifier: Apache-2.0
"""Locks of this host: an instance, a place among few, what only one process does.

What several hosts change is not locked but published by compare-and-swap
(record.py); a lock here only keeps this host's own threads and processes apart.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import tenacity
from oslo_concurrency import lockutils

from virtmigrate import errors

_LOOK = 0.2
"""Seconds between two looks for a free slot: a file's lock tells nobody."""


class HostLocks:
    """File locks below one directory. Safe to share between threads.

    Arguments:
        directory: the same for all processes that drive this host.
        host: its name, for errors.
        timeout: seconds to wait for a lock.
    """

    def __init__(self, directory: Path, host: str, timeout: float) -> None:
        self._directory = directory
        self._host = host
        self._timeout = timeout

    @contextlib.contextmanager
    def instance(self, uuid: str) -> Iterator[None]:
        """Hold an instance; InstanceBusy when another operation keeps it too long."""
        self._directory.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                self._retrying()(self._enter, stack, f"instance-{uuid}")
            except lockutils.AcquireLockFailedException as e:
                raise errors.InstanceBusy(
                    instance=uuid,
                    host=self._host,
                    reason=f"it did not end within {self._timeout:g} s",
                ) from e
            yield

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
        self._directory.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + timeout
        with contextlib.ExitStack() as stack:
            while not self._take_any(stack, [f"{name}-{n}" for n in range(count)]):
                check()
                if time.monotonic() >= deadline:
                    raise errors.HostBusy(
                        host=self._host, count=count, what=name, seconds=timeout
                    )
                time.sleep(_LOOK)
            yield

    @contextlib.contextmanager
    def only(self, name: str) -> Iterator[bool]:
        """Be the only one of this host that does `name`; yield False where another
        one does, without waiting."""
        self._directory.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            yield self._take_any(stack, [name])

    # Private

    def _take_any(self, stack: contextlib.ExitStack, names: list[str]) -> bool:
        for name in names:
            with contextlib.suppress(lockutils.AcquireLockFailedException):
                self._enter(stack, name)
                return True
        return False

    def _retrying(self) -> tenacity.Retrying:
        return tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(
                lockutils.AcquireLockFailedException
            ),
            wait=tenacity.wait_random_exponential(multiplier=0.02, max=0.5),
            stop=tenacity.stop_after_delay(self._timeout),
            reraise=True,
        )

    def _enter(self, stack: contextlib.ExitStack, name: str) -> None:
        stack.enter_context(
            lockutils.lock(
                f"{self._directory}/{name}",
                external=True,
                lock_path=str(self._directory),
                blocking=False,
                do_log=False,
            )
        )
