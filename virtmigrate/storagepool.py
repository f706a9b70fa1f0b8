# SPDX-License-Identifier: Apache-2.0
"""Storage pools and volumes over libvirt: exclusive creation, small reads and writes.

Nothing here reads a volume's format, backing file or capacity back: libvirt
finds them by looking into the bytes, and a guest may have written those.
"""

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import libvirt
from oslo_log import log as logging

from virtmigrate import (
    address,
    errors,
    nearby,
    poolcalls,
    poolxml,
    qcow2,
    translation,
    wire,
    xml,
)
from virtmigrate.host import Host, Session
from virtmigrate.units import MiB

LOG = logging.getLogger(__name__)

_NONCE_AGE = 3600.0
"""Seconds after which a nonce is one that a killed process left."""

_WIPE_RATE = 8 * MiB
"""Bytes per second that the slowest storage zeroes."""

_TICK = 2.0
"""Seconds that a file system's clock may stand still."""

Ownership = poolxml.Ownership


@dataclass(frozen=True)
class Room:
    """Bytes of a pool, after a refresh."""

    capacity: int
    free: int


class Pool(poolcalls.PoolCalls):
    """One storage pool of one host. Safe to share between threads.

    Arguments:
        host: whose pool.
        name: its name there.
        ownership: of volumes made in it.
        busy_timeout: seconds to wait while libvirt refreshes the pool.
        thick: its volumes take all of their size at once, and show what was there
            before, so they are zeroed when they are made.
        preallocate: its raw volumes are given all of their room when they are made,
            and read as zeros.
    """

    is_directory = True
    """Its volumes are the files of one directory."""

    def __init__(
        self,
        host: Host,
        name: str,
        *,
        ownership: Ownership | None = None,
        busy_timeout: float = 60.0,
        thick: bool = False,
        preallocate: bool = False,
    ) -> None:
        super().__init__(host, name, busy_timeout)
        self.ownership = ownership or Ownership()
        self.thick = thick
        self.preallocate = preallocate
        self._path: str | None = None
        self._local: bool | None = None
        self._nearby: nearby.Nearby | None = None
        self._is_asked = False
        self._lock = threading.Lock()

    # The pool

    def ensure_directory(self, path: str) -> None:
        """Define, build and start a dir pool at path, if it is not there yet.

        Raises ConfigurationError when a pool of this name lies elsewhere.
        """
        text = poolxml.directory(self.name, path, self.ownership)
        with self.host.session(f"making pool {self.name}", pool=self.name) as session:
            pool = self._define(session, text)
            if not pool.isActive():
                pool.create(libvirt.VIR_STORAGE_POOL_CREATE_WITH_BUILD)
            pool.setAutostart(1)
        if self.path != path:
            raise errors.ConfigurationError(
                reason=f"host {self.host.name}: pool {self.name} lies at "
                f"{self.path}, and the configuration says {path}"
            )

    def ensure_defined(self, definition: xml.Element) -> None:
        """Define and start a pool on storage that is there, if it is not there yet.

        Arguments:
            definition: libvirt's; its name is this pool's.
        """
        with self.host.session(f"making pool {self.name}", pool=self.name) as session:
            pool = self._define(session, xml.write(definition))
            if not pool.isActive():
                pool.create(0)
            pool.setAutostart(1)

    def exists(self) -> bool:
        """Tell whether the host has this pool, active."""
        try:
            with self._session("looking for it") as (_, pool):
                return bool(pool.isActive())
        except errors.PoolNotFound:
            return False

    @property
    def path(self) -> str:
        """Directory of the pool on its host."""
        if self._path is None:
            with self._session("reading its path") as (_, pool):
                tree = xml.parse(pool.XMLDesc(0))
                self._path = xml.text_at(tree, "target/path") or ""
        return self._path

    def refresh(self) -> None:
        """Make libvirt look at the directory again."""
        self._retry("refreshing", lambda _, pool: pool.refresh(0))

    def room(self) -> Room:
        """Return what the pool's storage holds and has free, now."""
        self.refresh()
        with self._session("asking for room") as (_, pool):
            _state, capacity, _allocation, free = pool.info()
        return Room(capacity, free)

    def names(self) -> list[str]:
        """Return the names of all volumes that are there now.

        Of a directory of this machine without libvirt, which would open every file
        of it. Else by one call: virStoragePoolListVolumes asks for the count first,
        and when a volume comes in between, it leaves out another.
        """
        near = self._near()
        if near is not None:
            with contextlib.suppress(OSError):
                return near.names()
        self.refresh()
        return self._retry(
            "listing", lambda _, pool: [vol.name() for vol in pool.listAllVolumes(0)]
        )

    # Volumes

    def volume_path(self, name: str) -> str:
        """Return where the volume lies on the host."""
        return f"{self.path}/{name}"

    def has(self, name: str) -> bool:
        """Tell whether the volume exists, after a refresh."""
        near = self._near()
        if near is not None:
            with contextlib.suppress(OSError):
                return near.has(name)
        return name in self.names()

    def stamp(self, quiet: float) -> int | None:
        """Return what is another one as soon as a volume comes or goes.

        Arguments:
            quiet: seconds for which none did.

        Returns None where one did, or where only libvirt can tell.
        """
        near = self._near()
        if near is not None:
            with contextlib.suppress(OSError):
                changed = near.changed()
                # In the same tick of its clock more may come, and would not show.
                age = time.time() - changed / 1e9
                return changed if age > max(quiet, _TICK) else None
        return None

    def create_raw(self, name: str, size: int) -> None:
        """Create a raw volume of size bytes, all zeros, exclusively.

        Raises VolumeExists when there is one of this name, NoSpace. A thick one that
        could not be zeroed is deleted, or stays when its host went away: whoever
        finds it must not believe its bytes.
        """
        self._create(name, size or int(self.thick), "raw")
        if self.thick and size:
            try:
                self.wipe(name, size)
            except BaseException:
                with contextlib.suppress(errors.Error):
                    self.delete(name)
                raise

    def wipe(self, name: str, size: int) -> None:
        """Write zeros over all of a volume, of size bytes, however long it takes."""
        timeout = self.host.timeouts.call + size / _WIPE_RATE

        def attempt() -> None:
            doing = f"zeroing {name}"
            with self._session(doing, volume=name, timeout=timeout) as (_, pool):
                self._lookup(pool, name).wipe(0)

        self.patiently(attempt)

    def create_overlay(
        self, name: str, size: int, base_path: str, base_format: str
    ) -> None:
        """Create a qcow2 volume of size bytes over a file that never changes again.

        Not exclusive: libvirt looks for the name, then creates (9.0). What it creates
        over a layer it opens with all that headers name below (qemu-img create -b),
        which may be gone, or be another's by now: so the layer says itself what it
        stands on.
        """
        if base_format != "raw":
            self._create(name, size, "qcow2")
            try:
                head = self._head(name)
                self.write(name, qcow2.with_backing(head, base_path, base_format))
            except BaseException:
                with contextlib.suppress(errors.Error):
                    self.delete(name)
                raise
            return
        backing = xml.element("backingStore")
        xml.add(backing, "path", base_path)
        xml.add(backing, "format", type=base_format)
        self._create(name, size, "qcow2", backing)

    def restate(self, name: str, base_path: str, base_format: str) -> None:
        """Have the header of a qcow2 layer that nobody has open name what it stands on.

        For what libvirt does by qemu-img, which goes by it. Nothing is written where
        it says so already. ValueError for a file that is no such layer.
        """
        head = self._head(name)
        written = qcow2.restated(head, base_path, base_format)
        if written != head:
            self.write(name, written)

    def delete(self, name: str) -> None:
        """Delete the volume; nothing happens when it is gone already."""
        with contextlib.suppress(errors.VolumeNotFound):
            self._retry(
                f"deleting {name}", lambda s, pool: self._lookup(pool, name).delete(0)
            )

    def physical(self, name: str) -> int:
        """Return the file's length or the device's size: a stat, no header."""
        return self._measure(name)[1]

    def allocated(self, name: str) -> int:
        """Return the bytes that the volume takes on its storage."""
        info = self._retry(
            f"measuring {name}", lambda s, pool: self._lookup(pool, name).info()
        )
        return int(info[2])

    def written(self, name: str) -> float:
        """Return when a volume was written last, by its host's clock; 0: unknown."""
        try:
            with self.opened(name, f"looking at {name}") as (_, vol):
                tree = xml.parse(vol.XMLDesc(0))
            return float(xml.text_at(tree, "target/timestamps/mtime") or 0)
        except (errors.VolumeNotFound, ValueError):
            return 0.0

    def read(self, name: str, *, limit: int) -> bytes:
        """Return a small volume's bytes.

        ValueError when they are more than limit, or it is a directory or the like:
        who may write to a pool can make one.
        """
        near = self._near()
        if near is not None:
            # One that is not there, or not for us to read, libvirt is asked for.
            with contextlib.suppress(OSError):
                return near.read(name, limit)
        kind, size = self._measure(name)
        if kind not in (libvirt.VIR_STORAGE_VOL_FILE, libvirt.VIR_STORAGE_VOL_BLOCK):
            raise ValueError(f"{name} is of kind {kind}, and holds no bytes")
        if size > limit:
            raise ValueError(f"{name} has {size} bytes, more than {limit}")
        # libvirt may still be making it, for somebody else.
        return self._retry(
            f"reading {name}",
            lambda s, pool: wire.download(s, self._lookup(pool, name), size),
            name,
        )

    def write(self, name: str, data: bytes, *, offset: int = 0) -> None:
        """Write to a small volume.

        What finish() says is not believed (libvirt forgets late errors): read it
        back.
        """
        # libvirt refuses while somebody else reads it.
        self._retry(
            f"writing {name}",
            lambda s, pool: wire.upload(s, self._lookup(pool, name), data, offset),
            name,
        )

    @contextlib.contextmanager
    def opened(
        self, name: str, doing: str
    ) -> Iterator[tuple[Session, "libvirt.virStorageVol"]]:
        """Yield a session and the volume, for a stream."""
        with self._session(doing, volume=name) as (session, pool):
            yield session, self._lookup(pool, name)

    # This machine's view

    def is_local(self) -> bool:
        """Tell whether the pool's directory is the one of this path on this machine.

        Paths and ids prove nothing, hosts are cloned from golden images: a
        volume of a random name made through libvirt must appear here.
        """
        with self._lock:
            # Only a proof is kept: without one, the next caller tries again.
            self._local = self._local or self._prove_local()
            return self._local

    def _near(self) -> nearby.Nearby | None:
        """Return the directory if it is proven to be one of this machine."""
        if not self._is_asked and self.is_directory:
            if address.parse(self.host.uri).is_local and self.is_local():
                self._nearby = nearby.Nearby(Path(self.path))
            self._is_asked = True
        return self._nearby

    @contextlib.contextmanager
    def nonce(self, size: int = 0) -> Iterator[str]:
        """Yield the name of a volume of so many bytes that only this caller can know.

        What a killed process leaves of it, `remove_nonces` removes.
        """
        name = f"{self._nonces}{time.time():.0f}.{uuid.uuid4().hex}"
        self.create_raw(name, size)
        try:
            yield name
        finally:
            self.delete(name)

    def remove_nonces(self) -> None:
        """Remove this host's old nonces; another process may be using a new one."""
        for name in self.names():
            if name.startswith(self._nonces):
                made = name.removeprefix(self._nonces).partition(".")[0]
                if made.isdecimal() and time.time() - int(made) > _NONCE_AGE:
                    self.delete(name)

    @property
    def _nonces(self) -> str:
        return f"nonce.{self.host.name}."

    # Private

    def _head(self, name: str) -> bytes:
        """Return the first cluster of a qcow2 volume."""
        return self._retry(
            f"reading {name}",
            lambda s, pool: wire.download(s, self._lookup(pool, name), qcow2.CLUSTER),
            name,
        )

    def _prove_local(self) -> bool:
        if not os.access(self.path, os.R_OK | os.X_OK):
            return False
        with self.nonce() as name:
            return (Path(self.path) / name).exists()

    def _define(self, session: Session, text: str) -> "libvirt.virStoragePool":
        try:
            return session.conn.storagePoolLookupByName(self.name)
        except libvirt.libvirtError as e:
            if translation.code(e) != libvirt.VIR_ERR_NO_STORAGE_POOL:
                raise
        return session.conn.storagePoolDefineXML(text, 0)

    def _create(
        self, name: str, size: int, fmt: str, backing: xml.Element | None = None
    ) -> None:
        whole = self.thick or (self.preallocate and fmt == "raw")
        volume = poolxml.Volume(name, size, fmt, allocation=size if whole else 0)
        text = poolxml.write(volume, self.ownership, backing)

        def create(_: Session, pool: "libvirt.virStoragePool") -> None:
            try:
                pool.createXML(text, 0)
            except libvirt.libvirtError as e:
                if translation.code(e) != libvirt.VIR_ERR_STORAGE_VOL_EXIST:
                    raise
                # It may be one that another host removed, which libvirt remembers.
                pool.refresh(0)
                pool.createXML(text, 0)

        self._retry(f"creating {name}", create, name)
