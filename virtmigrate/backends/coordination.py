# SPDX-License-Identifier: Apache-2.0
"""Leased locks of several hosts by a coordinator, through tooz: etcd.

Only etcd is taken: what others call a lock may be held by two when they fail over.
"""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from virtmigrate import errors
from virtmigrate.locks import Grip


class CoordinatedLocks:
    """Locks in etcd. Safe to share between threads.

    Arguments:
        url: the coordinator's, as tooz has it.
        lease: seconds, at least one.
        storage: what tells the storage from others that the coordinator serves.
        where: host and backend, for errors.
    """

    def __init__(
        self, url: str, lease: float, storage: str, where: tuple[str, str]
    ) -> None:
        self.lease: float | None = lease
        self._storage = storage
        self._where = where
        self._tooz = _imported(url)
        seconds = max(1, int(lease))
        try:
            # It is not started: that would make this a member, and locks need none.
            self._coordinator = self._tooz.get_coordinator(
                url,
                b"virtmigrate",
                lock_timeout=str(seconds),
                # A renewal that hangs leaves time for another.
                timeout=str(max(1, seconds // 3)),
            )
        except (ImportError, RuntimeError) as e:
            raise _unusable(url, e) from e

    def take(self, name: str) -> Grip | None:
        """Take a lock; None while another one has it. Raises LockError."""
        path = f"/virtmigrate/{self._storage}/{name}"
        with self.translated(name):
            lock = self._coordinator.get_lock(path.encode())
            if lock.acquire(blocking=False):
                return _CoordinatedGrip(self, name, lock)
        return None

    @contextlib.contextmanager
    def translated(self, name: str) -> Iterator[None]:
        """Make tooz's errors ours."""
        host, backend = self._where
        try:
            yield
        except self._tooz.ToozError as e:
            raise errors.LockError(
                host=host, backend=backend, name=name, reason=f"lock_url: {e}"
            ) from e


# Private


class _CoordinatedGrip:
    def __init__(self, locks: CoordinatedLocks, name: str, lock: Any) -> None:
        self._locks = locks
        self._name = name
        self._lock = lock

    def renew(self) -> None:
        # It does not say that the lease had ended: whoever has it counts the time.
        with self._locks.translated(self._name):
            self._lock.heartbeat()

    def release(self) -> None:
        with self._locks.translated(self._name):
            self._lock.release()


def _imported(url: str) -> Any:
    try:
        return importlib.import_module("tooz.coordination")
    except ImportError as e:
        raise _unusable(url, e) from e


def _unusable(url: str, error: Exception) -> errors.ConfigurationError:
    return errors.ConfigurationError(
        reason=f"lock_url = {url} needs tooz and etcd3gw: install virtmigrate[etcd] "
        f"({error})"
    )
