# SPDX-License-Identifier: Apache-2.0
"""How the bytes of a backend's volumes are reached.

The defaults are right wherever volumes are files or devices of a pool whose streams
work: directly where this process may, else through libvirt.
"""

import abc
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from oslo_log import log as logging

from virtmigrate import errors, live, model, reading, storagepool, writing
from virtmigrate.backends.terms import Arrived, Settings
from virtmigrate.host import Host

LOG = logging.getLogger(__name__)


class Access(abc.ABC):
    """Reads and writes volumes. Safe to share between threads."""

    def __init__(self, host: Host, settings: Settings) -> None:
        self.host = host
        self.settings = settings
        self.name = settings.name
        self.disks = self.pool(f"virtmigrate-{self.name}-disks")
        self.incoming = self.pool(f"virtmigrate-{self.name}-incoming")

    @abc.abstractmethod
    def local_file(self, pool: storagepool.Pool, name: str) -> Path | None:
        """Return the volume's file if this process may read it directly."""

    @property
    def preallocates(self) -> bool:
        """Tell whether raw volumes get all of their room when they are made."""
        return False

    def pool(self, name: str) -> storagepool.Pool:
        """Return one of the host's pools by name."""
        return storagepool.Pool(
            self.host,
            name,
            ownership=self.settings.ownership,
            busy_timeout=self.settings.busy_timeout,
            preallocate=self.preallocates and name.endswith(("-disks", "-incoming")),
        )

    @contextlib.contextmanager
    def arrived(self, name: str, ahead: int = reading.WINDOW) -> Iterator[Arrived]:
        """Open an incoming volume to read it.

        Arguments:
            ahead: bytes that are fetched at once where only libvirt may read it.

        Raises StorageError for what is no volume of ours but leads elsewhere.
        """
        with self.readable(name) as fd:
            if fd is not None:
                size = os.lseek(fd, 0, os.SEEK_END)
                source = reading.FileSource(Path(name), size, fd)
                yield Arrived(size, source, lambda: _flushed(fd))
                return
        size = self.incoming.physical(name)
        far = reading.VolumeSource(self.incoming, name, size, ahead)
        yield Arrived(size, far, self._flush_all)

    @contextlib.contextmanager
    def readable(self, name: str) -> Iterator[int | None]:
        """Yield a descriptor of an incoming volume, None when only libvirt may read it.

        Raises StorageError for what is no volume of ours but leads elsewhere.
        """
        path = self.local_file(self.incoming, name)
        if path is None:
            yield None
            return
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)

    def target(self, name: str, size: int) -> writing.Target:
        """Return an incoming volume, to write to from this host."""
        return writing.VolumeTarget(self.incoming, name, size)

    def source(self, volume: model.Volume, size: int) -> reading.Source:
        """Return a volume of size bytes, to read while nobody writes to it."""
        pool = self.pool(volume.pool)
        path = self.local_file(pool, volume.name)
        if path is not None:
            return reading.FileSource(path, size)
        LOG.info(
            "volume=%s is read through libvirt: this process may not read the file, "
            "which would be faster",
            volume.name,
        )
        return reading.VolumeSource(pool, volume.name, size)

    def live(self, volume: model.Volume, size: int) -> reading.Source | None:
        """Return a volume to read beside its guest; None where that gains nothing."""
        path = self.local_file(self.pool(volume.pool), volume.name)
        return live.LiveSource(path, size) if path else None

    def grow(self, name: str, size: int) -> None:
        """Make an incoming volume longer; zeros are added.

        Not by libvirt's resize, which acts on the format that it finds in the bytes.
        """
        if self.incoming.physical(name) >= size:
            return
        self.incoming.write(name, b"\0", offset=size - 1)
        # libvirt may have forgotten the error.
        length = self.incoming.physical(name)
        if length != size:
            raise errors.ShortTransfer(
                volume=name,
                host=self.host.name,
                reason=f"it has {length} bytes and not {size} after it grew",
            )

    # Private

    def _flush_all(self) -> bool:
        """Have all that was written to incoming on its storage."""
        if not self.incoming.is_local():
            return False
        # Waits for all of the machine's file systems, and needs no right.
        os.sync()
        return True


# Private


def _flushed(fd: int) -> bool:
    os.fsync(fd)
    return True
