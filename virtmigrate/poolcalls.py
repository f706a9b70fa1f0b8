# SPDX-License-Identifier: Apache-2.0
"""How libvirt is asked about one pool: in sessions, again while it is busy."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import libvirt
import tenacity

from virtmigrate import errors, translation
from virtmigrate.host import Host, Session

T = TypeVar("T")


class PoolCalls:
    """One pool of one host, for those who ask libvirt. Safe to share."""

    def __init__(self, host: Host, name: str, busy_timeout: float) -> None:
        self.host = host
        self.name = name
        self.busy_timeout = busy_timeout

    def patiently(self, call: Callable[[], T]) -> T:
        """Call, and call again while libvirt refreshes the pool in the background."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(errors.PoolBusy),
            wait=tenacity.wait_random_exponential(multiplier=0.005, max=0.5),
            stop=tenacity.stop_after_delay(self.busy_timeout),
            reraise=True,
        )
        return retrying(call)

    # Private

    def _measure(self, name: str) -> tuple[int, int]:
        """Return what kind of volume it is, and its length."""
        flags = libvirt.VIR_STORAGE_VOL_GET_PHYSICAL
        info = self._retry(
            f"measuring {name}",
            lambda s, pool: self._lookup(pool, name).infoFlags(flags),
        )
        # Of an image in a cluster libvirt knows only its size, and says 0 here (9.0).
        is_image = info[0] == libvirt.VIR_STORAGE_VOL_NETWORK
        return int(info[0]), int(info[1 if is_image else 2])

    def _lookup(
        self, pool: "libvirt.virStoragePool", name: str
    ) -> "libvirt.virStorageVol":
        try:
            return pool.storageVolLookupByName(name)
        except libvirt.libvirtError as e:
            if translation.code(e) != libvirt.VIR_ERR_NO_STORAGE_VOL:
                raise
        pool.refresh(0)
        try:
            return pool.storageVolLookupByName(name)
        except libvirt.libvirtError as e:
            if translation.code(e) != libvirt.VIR_ERR_NO_STORAGE_VOL:
                raise
            raise errors.VolumeNotFound(
                host=self.host.name, pool=self.name, volume=name
            ) from e

    @contextlib.contextmanager
    def _session(
        self, doing: str, *, volume: str = "?", timeout: float | None = None
    ) -> Iterator[tuple[Session, "libvirt.virStoragePool"]]:
        doing = f"pool {self.name}: {doing}"
        with self.host.session(
            doing, pool=self.name, volume=volume, timeout=timeout
        ) as session:
            yield session, session.conn.storagePoolLookupByName(self.name)

    def _retry(
        self,
        doing: str,
        call: "Callable[[Session, libvirt.virStoragePool], T]",
        volume: str = "?",
    ) -> T:
        """Call in a session, patiently."""

        def attempt() -> T:
            with self._session(doing, volume=volume) as (session, pool):
                return call(session, pool)

        return self.patiently(attempt)
