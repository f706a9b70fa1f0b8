# SPDX-License-Identifier: Apache-2.0
"""Move the bytes of one volume, and prove that they arrived.

The target is created raw at its full size, so it reads as zeros, and the blocks
that hold data are uploaded at their offsets: no sparse flag is needed, whose
holes are only safe in one pass over a fresh volume. A stream is bounded and
finished: that is the acknowledgement, and what libvirtd may have to queue. What
finish() says is not believed: the copy is read back, and its manifest must be
the source's.
"""

import contextlib
import errno
import os
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import libvirt

from virtmigrate import errors, manifest, storagepool
from virtmigrate.progress import Progress
from virtmigrate.units import MiB

_HOLE = -3
"""What recvFlags returns at a hole (virStreamRecvFlags)."""


class Reader(Protocol):
    """Yields a volume's data, in order; what lies between is zeros."""

    def pieces(self) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, data); no piece is longer than a block."""
        ...


class FileReader:
    """Reads a file of this machine, skipping its holes.

    Arguments:
        path: the file; it must not change meanwhile.
        size: its length in bytes; SourceChanged when it is another one.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._size = size

    def pieces(self) -> Iterator[tuple[int, bytes]]:
        with self._path.open("rb", buffering=0) as file:
            self._expect(os.fstat(file.fileno()).st_size)
            before = os.fstat(file.fileno()).st_mtime_ns
            for start, end in _extents(file.fileno(), self._size):
                yield from self._range(file.fileno(), start, end)
            after = os.fstat(file.fileno())
            self._expect(after.st_size)
            if after.st_mtime_ns != before:
                raise self._changed("somebody wrote to it")

    # Private

    def _range(self, fd: int, start: int, end: int) -> Iterator[tuple[int, bytes]]:
        while start < end:
            # Never across a block's end, so that blocks are put together simply.
            length = min(end, (start // MiB + 1) * MiB) - start
            data = os.pread(fd, length, start)
            if len(data) < length:
                raise self._changed(f"it ends at {start + len(data)}")
            yield start, data
            start += length

    def _expect(self, size: int) -> None:
        if size != self._size:
            raise self._changed(f"it has {size} bytes instead of {self._size}")

    def _changed(self, reason: str) -> errors.SourceChanged:
        return errors.SourceChanged(
            volume=self._path.name, host="?", reason=f"the source changed: {reason}"
        )


class VolumeReader:
    """Downloads a volume in bounded streams, skipping its holes."""

    def __init__(
        self, pool: storagepool.Pool, name: str, size: int, bound: int
    ) -> None:
        self._pool = pool
        self._name = name
        self._size = size
        self._bound = bound

    def pieces(self) -> Iterator[tuple[int, bytes]]:
        for start in range(0, self._size, self._bound):
            length = min(self._bound, self._size - start)
            yield from self._download(start, length)

    # Private

    def _download(self, start: int, length: int) -> list[tuple[int, bytes]]:
        """Return a bounded range whole: no session waits while data is consumed."""
        doing = f"downloading {self._name}"
        found: list[tuple[int, bytes]] = []
        with self._pool.opened(self._name, doing) as (session, vol):
            stream = session.conn.newStream(0)
            flags = libvirt.VIR_STORAGE_VOL_DOWNLOAD_SPARSE_STREAM
            vol.download(stream, start, length, flags)
            with _aborting(stream):
                position, end = start, start + length
                while position < end:
                    data, skipped = _receive(stream, end - position)
                    if not data and not skipped:
                        raise self._short(position)
                    session.touch()
                    if data:
                        found.append((position, data))
                    position += len(data) + skipped
                stream.finish()
        return found

    def _short(self, position: int) -> errors.ShortTransfer:
        return errors.ShortTransfer(
            volume=self._name,
            host=self._pool.host.name,
            reason=f"it ends at {position} instead of {self._size}",
        )


class VolumeWriter:
    """Uploads blocks to a fresh raw volume; contiguous ones share a stream.

    Not safe to share between threads. Leaving `with` without an error finishes
    the last stream.
    """

    def __init__(
        self, pool: storagepool.Pool, name: str, size: int, bound: int
    ) -> None:
        self._pool = pool
        self._name = name
        self._size = size
        self._bound = bound
        self._open: contextlib.ExitStack | None = None
        self._next = self._end = 0

    def __enter__(self) -> "VolumeWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if kind is None:
            self._finish()
        elif self._open is not None:
            opened, self._open = self._open, None
            # Aborting waits for an answer, so the clock must run again.
            self._session.touch()
            storagepool.abort(self._stream)
            # The session makes libvirt's errors ours.
            opened.__exit__(kind, error, trace)

    def write(self, offset: int, data: bytes) -> None:
        """Write a block; blocks come in the order of their offsets."""
        end = offset + len(data)
        if self._open is None or offset != self._next or end > self._end:
            self._finish()
            self._begin(offset, len(data))
        # The stream's length is a promise to nobody: libvirtd takes fewer bytes.
        storagepool.send_all(self._session, self._stream, data)
        self._next = end
        # What takes long now is the source, not this host.
        self._session.rest()

    # Private

    def _begin(self, offset: int, least: int) -> None:
        stack = contextlib.ExitStack()
        with stack:
            opened = self._pool.opened(self._name, f"uploading {self._name}")
            self._session, vol = stack.enter_context(opened)
            self._stream = self._session.conn.newStream(0)
            # Blocks of huge volumes may be longer than a stream should be.
            length = max(least, min(self._bound, self._size - offset))
            vol.upload(self._stream, offset, length, 0)
            self._open = stack.pop_all()
        self._end = offset + length

    def _finish(self) -> None:
        if self._open is None:
            return
        with self._open:
            self._open = None
            self._session.touch()
            with _aborting(self._stream):
                self._stream.finish()


def copy(
    reader: Reader, writer: VolumeWriter, size: int, progress: Progress
) -> manifest.Manifest:
    """Send what is not zeros and return the manifest of what was read.

    Arguments:
        size: bytes of the source.
    Raises Cancelled, TransferError, HostError; the target is then partial.
    """
    result = manifest.Manifest(size)
    position = 0
    with writer:
        for index, data in blocks(reader, result.block_size, size):
            start = index * result.block_size
            sent = 0
            if result.add(index, data):
                writer.write(start, data)
                sent = len(data)
            progress.advance(start + len(data) - position, sent=sent)
            position = start + len(data)
    progress.advance(size - position)
    return result


def survey(reader: Reader, size: int, progress: Progress) -> manifest.Manifest:
    """Read a volume and return its manifest."""
    result = manifest.Manifest(size)
    position = 0
    for index, data in blocks(reader, result.block_size, size):
        result.add(index, data)
        end = index * result.block_size + len(data)
        progress.advance(end - position)
        position = end
    progress.advance(size - position)
    return result


def blocks(reader: Reader, block_size: int, size: int) -> Iterator[tuple[int, bytes]]:
    """Yield (index, bytes) of each block that holds any data, in order."""
    current, buffer = -1, bytearray()
    for offset, data in reader.pieces():
        while data:
            index, inside = divmod(offset, block_size)
            if index != current:
                if current >= 0:
                    yield current, bytes(buffer)
                current = index
                buffer = bytearray(min(block_size, size - index * block_size))
            part = data[: block_size - inside]
            buffer[inside : inside + len(part)] = part
            offset, data = offset + len(part), data[len(part) :]
    if current >= 0:
        yield current, bytes(buffer)


# Private


def _extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
            position = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        except OSError as e:
            # No data from here on, or it shrank, which its length tells.
            if e.errno == errno.ENXIO:
                return
            raise
        yield start, position


def _receive(stream: "libvirt.virStream", wanted: int) -> tuple[bytes, int]:
    """Return data, or the length of the hole that comes next."""
    flags = libvirt.VIR_STREAM_RECV_STOP_AT_HOLE
    data = stream.recvFlags(min(wanted, storagepool.CHUNK), flags)
    if data == _HOLE:
        return b"", stream.recvHole(0)
    if isinstance(data, int):
        raise OSError(f"the stream gave {data}")
    return data, 0


@contextlib.contextmanager
def _aborting(stream: "libvirt.virStream") -> Iterator[None]:
    try:
        yield
    except BaseException:
        storagepool.abort(stream)
        raise
