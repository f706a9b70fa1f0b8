# SPDX-License-Identifier: Apache-2.0
"""Where a volume's bytes come from: a file of this machine, or libvirt.

Sources are read in ranges, by several threads at once. What changes while it is
read is refused, not copied torn.
"""

import errno
import os
import stat
import threading
import types
from pathlib import Path
from typing import Protocol, Self

import libvirt

from virtmigrate import errors, storagepool, wire, xml
from virtmigrate.host import Session
from virtmigrate.units import MiB

WINDOW = 8 * MiB
"""Bytes that one download fetches: what a thread keeps of a volume."""


class Source(Protocol):
    """A volume that does not change while it is read. Safe to share."""

    name: str
    size: int

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None: ...

    def read(self, start: int, end: int) -> bytes | None:
        """Return a range of at most WINDOW bytes; None when all of it is a hole."""

    def skip(self, start: int) -> int:
        """Return where the next data may begin, `size` when there is none."""

    def demand_unchanged(self) -> None:
        """Raise SourceChanged if it changed since it was entered."""


class FileSource:
    """A file or a block device of this machine; holes of files are not read.

    Arguments:
        path: it must not change between entering and leaving `with`.
        size: its length in bytes; SourceChanged when it is another one.
        fd: open for reading, by who closes it; by default the path is opened.
    """

    def __init__(self, path: Path, size: int, fd: int | None = None) -> None:
        self.name = path.name
        self.size = size
        self._path = path
        self._given = fd
        self._fd = -1
        self._has_holes = True
        self._before = (0, 0)
        self._hole = (0, 0)

    def __enter__(self) -> Self:
        if self._given is None:
            self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        else:
            self._fd = self._given
        try:
            self._has_holes = stat.S_ISREG(os.fstat(self._fd).st_mode)
            self._hole = (0, 0)
            self._before = self._look()
            self._expect(self._before[0])
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if self._given is None:
            os.close(self._fd)
        self._fd = -1

    def read(self, start: int, end: int) -> bytes | None:
        if self.skip(start) >= end:
            return None
        data = os.pread(self._fd, end - start, start)
        while len(data) < end - start:
            position = start + len(data)
            more = os.pread(self._fd, end - position, position)
            if not more:
                raise self._changed(f"it ends at {position}")
            data += more
        return data

    def skip(self, start: int) -> int:
        # Only where data begins is asked for: looking for its end takes as long as
        # the data is (tmpfs).
        first, until = self._hole
        if not first <= start < until:
            until = self._data(start)
            self._hole = start, until
        return until

    def demand_unchanged(self) -> None:
        now = self._look()
        self._expect(now[0])
        if now != self._before:
            raise self._changed("somebody wrote to it")

    # Private

    def _look(self) -> tuple[int, int]:
        """Return its length, and when it was written to."""
        if self._has_holes:
            found = os.fstat(self._fd)
            return found.st_size, found.st_mtime_ns
        return os.lseek(self._fd, 0, os.SEEK_END), 0

    def _data(self, start: int) -> int:
        """Return where the data at or after start begins."""
        if not self._has_holes or start >= self.size:
            return min(start, self.size)
        try:
            return os.lseek(self._fd, start, os.SEEK_DATA)
        except OSError as e:
            if e.errno != errno.ENXIO:
                raise
            # No data from here on, or it shrank, which its length tells.
            self._expect(os.fstat(self._fd).st_size)
            return self.size

    def _expect(self, size: int) -> None:
        if size != self.size:
            raise self._changed(f"it has {size} bytes instead of {self.size}")

    def _changed(self, reason: str) -> errors.SourceChanged:
        return errors.SourceChanged(volume=self.name, reason=reason)


class VolumeSource:
    """A volume read through libvirt, each thread by bounded downloads of its own.

    Arguments:
        ahead: bytes that one download fetches; who reads here and there wants fewer.
    """

    def __init__(
        self, pool: storagepool.Pool, name: str, size: int, ahead: int = WINDOW
    ) -> None:
        self.name = name
        self.size = size
        self._pool = pool
        self._ahead = min(ahead, WINDOW)
        self._thread = threading.local()
        self._gap = (0, 0)
        self._before = (0, "")

    def __enter__(self) -> Self:
        self._gap = (0, 0)
        self._before = self._pool.patiently(self._look)
        if self._before[0] != self.size:
            raise self._changed(f"it has {self._before[0]} bytes, not {self.size}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self._thread = threading.local()

    def read(self, start: int, end: int) -> bytes | None:
        window = getattr(self._thread, "window", None)
        if window is None or not window.covers(start, end):
            window = self._pool.patiently(lambda: self._fetch(start, end))
            self._thread.window = window
        return window.cut(start, end)

    def skip(self, start: int) -> int:
        begin, end = self._gap
        return end if begin <= start < end else start

    def demand_unchanged(self) -> None:
        if self._pool.patiently(self._look) != self._before:
            raise self._changed("its length or its time of change did")

    # Private

    def _look(self) -> tuple[int, str]:
        """Return its length, and when it was written to: a stat, no header."""
        with self._pool.opened(self.name, f"looking at {self.name}") as (_, vol):
            changed = xml.text_at(xml.parse(vol.XMLDesc(0)), "target/timestamps/mtime")
        return self._pool.physical(self.name), changed or ""

    def _fetch(self, start: int, end: int) -> "_Window":
        window = _Window(start, min(max(end, start + self._ahead), self.size))
        with self._pool.opened(self.name, f"downloading {self.name}") as opened:
            session, vol = opened
            stream = session.conn.newStream(0)
            vol.download(stream, start, window.end - start, _SPARSE)
            with wire.aborting(stream):
                position = start
                while position < window.end:
                    data, skipped = wire.receive(stream, window.end - position)
                    if not data and not skipped:
                        raise self._short(position)
                    session.touch()
                    window.add(position, data)
                    position += len(data) + skipped
                stream.finish()
            if window.is_hole and window.end < self.size:
                self._gap = (start, self._hole_end(session, vol, window.end))
        return window

    def _hole_end(
        self, session: Session, vol: "libvirt.virStorageVol", start: int
    ) -> int:
        """Return where the hole at start ends, without fetching what follows."""
        stream = session.conn.newStream(0)
        vol.download(stream, start, self.size - start, _SPARSE)
        try:
            data, skipped = wire.receive(stream, 1)
        finally:
            wire.abort(stream)
        return start + (0 if data else skipped)

    def _short(self, position: int) -> errors.ShortTransfer:
        return errors.ShortTransfer(
            volume=self.name,
            host=self._pool.host.name,
            reason=f"it ends at {position} instead of {self.size}",
        )

    def _changed(self, reason: str) -> errors.SourceChanged:
        return errors.SourceChanged(volume=self.name, reason=reason)


_SPARSE = libvirt.VIR_STORAGE_VOL_DOWNLOAD_SPARSE_STREAM


class _Window:
    """What one download fetched."""

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self._pieces: list[tuple[int, bytes]] = []

    @property
    def is_hole(self) -> bool:
        return not self._pieces

    def add(self, offset: int, data: bytes) -> None:
        if data:
            self._pieces.append((offset, data))

    def covers(self, start: int, end: int) -> bool:
        return self.start <= start and end <= self.end

    def cut(self, start: int, end: int) -> bytes | None:
        """Return a range of it; None when all of that is a hole."""
        buffer: bytearray | None = None
        for offset, data in self._pieces:
            first, last = max(offset, start), min(offset + len(data), end)
            if first < last:
                buffer = buffer or bytearray(end - start)
                part = data[first - offset : last - offset]
                buffer[first - start : last - start] = part
        return None if buffer is None else bytes(buffer)
