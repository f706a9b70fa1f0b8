# SPDX-License-Identifier: Apache-2.0
"""Leased locks of several hosts in a RADOS pool: an object each, in our namespace.

The object goes with its lock. The cluster knows a holder by its connection and a word
of its own, so that a renewal says whether the lock was lost meanwhile.
"""

import uuid

from virtmigrate import errors
from virtmigrate.backends.cluster import Cluster
from virtmigrate.backends.objects import NAMESPACE
from virtmigrate.locks import Grip


class ObjectLocks:
    """Locks in a pool of a cluster. Safe to share between threads.

    Arguments:
        lease: seconds, at least one.
        backend: its name, for errors.
    """

    def __init__(self, cluster: Cluster, lease: float, backend: str) -> None:
        self.cluster = cluster
        self.lease: float | None = max(1, int(lease))
        self.backend = backend

    def take(self, name: str) -> Grip | None:
        """Take a lock; None while another one has it. StorageDown, StorageError."""
        cookie = uuid.uuid4().hex
        assert self.lease is not None
        with self.cluster.translated(f"locking {name}"):
            if self.cluster.lock(NAMESPACE, _object(name), cookie, self.lease):
                return _ObjectGrip(self, name, cookie, self.lease)
        return None


# Private


class _ObjectGrip:
    def __init__(
        self, locks: ObjectLocks, name: str, cookie: str, lease: float
    ) -> None:
        self._locks = locks
        self._name = name
        self._cookie = cookie
        self._lease = lease

    def renew(self) -> None:
        cluster, name = self._locks.cluster, self._name
        try:
            with cluster.translated(f"renewing the lock {name}", name):
                cluster.renew_lock(NAMESPACE, _object(name), self._cookie, self._lease)
        except errors.VolumeNotFound as e:
            raise errors.LockLost(
                host=cluster.host, backend=self._locks.backend, name=name
            ) from e

    def release(self) -> None:
        cluster, name = self._locks.cluster, self._name
        with cluster.translated(f"unlocking {name}", name):
            cluster.unlock(NAMESPACE, _object(name), self._cookie)


def _object(name: str) -> str:
    return f"lock.{name}"
