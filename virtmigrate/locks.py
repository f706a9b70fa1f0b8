# SPDX-License-Identifier: Apache-2.0
"""Locks of this host: one operation at a time on an instance.

What several hosts change is not locked but published by compare-and-swap
(record.py); a lock here only keeps this host's own threads and processes apart.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import tenacity
from oslo_concurrency import lockutils

from virtmigrate import errors


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

    # Private

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
