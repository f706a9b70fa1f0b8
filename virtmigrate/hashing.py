# SPDX-License-Identifier: Apache-2.0
"""Digests of a volume of this host: read by threads, or through its libvirt.

What is kept in memory is a piece per thread, whatever the size of a block or of
the volume. Holes of files are blocks of zeros that nobody reads.
"""

import errno
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures

import blake3
import libvirt

from virtmigrate import errors, manifest, storagepool, wire
from virtmigrate.units import MiB

PIECE = MiB
"""Bytes that are read at once."""

_BATCH = 32
"""Blocks that a thread takes at once, at most."""

_BOUND = 32 * MiB
"""Bytes of data that one download brings."""

_ZEROS = bytes(PIECE)

Progress = Callable[[int], object]
"""Called with the bytes that were looked at since the last call, by any thread."""

Stop = Callable[[], bool]


def hash_file(
    fd: int,
    found: manifest.Manifest,
    indexes: Sequence[int],
    *,
    workers: int = 2,
    progress: Progress = lambda _: None,
    stop: Stop = lambda: False,
) -> None:
    """Set blocks of a manifest from a file or a block device.

    Arguments:
        fd: open for reading; its position is not used.
        indexes: the blocks, in order.
        stop: asked before each block; Cancelled when it says yes.

    Raises ShortTransfer when the file ends too early. The manifest is then
    partly set.
    """
    lanes = max(1, min(workers, len(indexes)))
    work = _Batches(indexes, max(1, min(_BATCH, len(indexes) // (4 * lanes))), stop)
    readers = [_Reader(fd, found) for _ in range(lanes)]
    if lanes == 1:
        readers[0].run(work, progress)
        return
    with futures.ThreadPoolExecutor(lanes, "hashing") as executor:
        running = [executor.submit(each.run, work, progress) for each in readers]
        try:
            for each in futures.as_completed(running):
                each.result()
        finally:
            # The first error stops the others at their next batch.
            work.close()


def hash_volume(
    pool: storagepool.Pool,
    name: str,
    found: manifest.Manifest,
    indexes: Sequence[int],
    *,
    progress: Progress = lambda _: None,
    stop: Stop = lambda: False,
) -> None:
    """Set blocks of a manifest as hash_file() does, of a volume read by libvirt."""
    for first, last in runs(indexes):
        position, end = found.span(first)[0], found.span(last)[1]
        folder = _Folder(found, first)
        while position < end:
            if stop():
                raise errors.Cancelled
            reached = _download(pool, name, folder, position, end)
            progress(reached - position)
            position = reached


def runs(indexes: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield the first and the last of each run of indexes that follow each other."""
    first = last = -1
    for index in indexes:
        if index != last + 1 or first < 0:
            if first >= 0:
                yield first, last
            first = index
        last = index
    if first >= 0:
        yield first, last


# Private


class _Batches:
    """Blocks to be read, handed out to threads."""

    def __init__(self, indexes: Sequence[int], length: int, stop: Stop) -> None:
        self._left = iter(indexes)
        self._length = length
        self._lock = threading.Lock()
        self._is_closed = False
        self.stop = stop

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            with self._lock:
                batch = list(itertools.islice(self._left, self._length))
            if self._is_closed or not batch:
                return
            yield batch

    def close(self) -> None:
        self._is_closed = True


class _Reader:
    """One thread's eye on a file."""

    def __init__(self, fd: int, found: manifest.Manifest) -> None:
        self._fd = fd
        self._found = found
        self._buffer = bytearray(PIECE)
        self._hole = (0, 0)

    def run(self, work: _Batches, progress: Progress) -> None:
        for batch in work:
            done = 0
            for index in batch:
                if work.stop():
                    raise errors.Cancelled
                start, end = self._found.span(index)
                self._found[index] = self._digest(start, end)
                done += end - start
            progress(done)

    def _digest(self, start: int, end: int) -> bytes:
        if self._is_hole(start, end):
            return manifest.ZERO
        folded = _Fold()
        for position in range(start, end, PIECE):
            folded.add(self._read(position, min(PIECE, end - position)))
        return folded.digest()

    def _is_hole(self, start: int, end: int) -> bool:
        first, last = self._hole
        if not first <= start < last:
            self._hole = first, last = start, self._data(start)
        return end <= last

    def _data(self, start: int) -> int:
        """Return where the next data begins."""
        try:
            return os.lseek(self._fd, start, os.SEEK_DATA)
        except OSError as e:
            if e.errno == errno.EINVAL:
                return start
            if e.errno != errno.ENXIO:
                raise
        # No data from here to the end, which may have come nearer.
        return os.lseek(self._fd, 0, os.SEEK_END)

    def _read(self, position: int, length: int) -> bytearray:
        if length < len(self._buffer):
            self._buffer = bytearray(length)
        elif length > len(self._buffer):
            self._buffer = bytearray(PIECE)
        view, done = memoryview(self._buffer), 0
        while done < length:
            read = os.preadv(self._fd, [view[done:]], position + done)
            if not read:
                raise _short("?", "this host", position + done)
            done += read
        return self._buffer


class _Fold:
    """Digest of one block, from its pieces."""

    def __init__(self) -> None:
        self._zeros = 0
        self._hasher: blake3.blake3 | None = None

    def add(self, data: bytes | bytearray) -> None:
        if self._hasher is None:
            if _is_zero(data):
                self._zeros += len(data)
                return
            self._hasher = blake3.blake3()
            self._add_zeros(self._hasher, self._zeros)
        self._hasher.update(data)

    def skip(self, length: int) -> None:
        """Add a hole."""
        if self._hasher is None:
            self._zeros += length
        else:
            self._add_zeros(self._hasher, length)

    def digest(self) -> bytes:
        return manifest.ZERO if self._hasher is None else self._hasher.digest()

    @staticmethod
    def _add_zeros(hasher: blake3.blake3, length: int) -> None:
        for start in range(0, length, PIECE):
            hasher.update(_ZEROS[: length - start])


class _Folder:
    """Sets one block after the other, from data and holes as they come."""

    def __init__(self, found: manifest.Manifest, first: int) -> None:
        self._found = found
        self._index = first
        self._position, self._end = found.span(first)
        self._fold = _Fold()

    def add(self, data: bytes) -> None:
        while data:
            length = min(len(data), self._end - self._position)
            self._fold.add(data[:length])
            self._advance(length)
            data = data[length:]

    def skip(self, length: int) -> None:
        while length:
            part = min(length, self._end - self._position)
            self._fold.skip(part)
            self._advance(part)
            length -= part

    def _advance(self, length: int) -> None:
        self._position += length
        if self._position == self._end:
            self._found[self._index] = self._fold.digest()
            self._index += 1
            self._fold = _Fold()
            self._end = self._found.span(self._index)[1]


def _download(
    pool: storagepool.Pool, name: str, folder: _Folder, start: int, end: int
) -> int:
    """Feed a volume's bytes until enough data came; return how far it is."""
    position, data = start, b""
    with pool.opened(name, f"reading {name}") as (session, vol):
        stream = session.conn.newStream(0)
        flags = libvirt.VIR_STORAGE_VOL_DOWNLOAD_SPARSE_STREAM
        vol.download(stream, start, end - start, flags)
        came = 0
        with wire.aborting(stream):
            while position < end and came < _BOUND:
                data, hole = wire.receive(stream, min(end - position, _BOUND - came))
                if not data and not hole:
                    raise _short(name, pool.host.name, position)
                session.touch()
                hole = min(hole, end - position)
                folder.skip(hole)
                folder.add(data)
                position += len(data) + hole
                came += len(data)
            if position == end:
                stream.finish()
            else:
                wire.abort(stream)
    return position


def _is_zero(data: bytes | bytearray) -> bool:
    if len(data) == PIECE:
        return data == _ZEROS
    return not data or (data[0] == 0 and data == bytes(len(data)))


def _short(name: str, host: str, position: int) -> errors.ShortTransfer:
    return errors.ShortTransfer(volume=name, host=host, reason=f"it ends at {position}")
