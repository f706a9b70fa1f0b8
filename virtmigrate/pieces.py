# SPDX-License-Identifier: Apache-2.0
"""Data for a volume that libvirt's streams do not reach, such as an RBD image.

It is sent in pieces of bounded size, as files into the peer's area for them, and the
peer's receiver writes each into the volume. A file is used again for the next piece,
so that no more than one for each worker lies there.
"""

import contextlib
import threading
import types
from collections.abc import Callable
from typing import Self

from virtmigrate import errors, request, storagepool, writing

Bring = Callable[[str, int, int], object]
"""Has a piece written: its file, its offset in the volume, its bytes."""


class PieceTarget:
    """A volume that is being filled in pieces. Safe to share between threads.

    Arguments:
        pool: where the pieces' files are made.
        length: bytes of a piece, at most.
    """

    def __init__(
        self, pool: storagepool.Pool, name: str, size: int, length: int, bring: Bring
    ) -> None:
        self.name = name
        self.size = size
        self.host = pool.host.name
        self.length = min(length, request.PIECE_LIMIT)
        self.bring = bring
        self._pool = pool
        self._made: set[int] = set()
        self._free = list(range(request.PIECES))
        self._lock = threading.Lock()

    def writer(self, until: int, acknowledge: writing.Acknowledge) -> "PieceWriter":
        """Return a writer for one thread."""
        return PieceWriter(self, acknowledge)

    def take(self) -> int:
        """Return the number of a piece that nobody uses."""
        with self._lock:
            return self._free.pop(0)

    def give_back(self, number: int) -> None:
        with self._lock:
            self._free.insert(0, number)

    def file(self, number: int) -> writing.VolumeTarget:
        """Return the file of a piece, made if it is not there."""
        name = request.piece_name(self.name, number)
        if number not in self._made:
            with contextlib.suppress(errors.VolumeExists):
                self._pool.create_raw(name, self.length)
            self._made.add(number)
        return writing.VolumeTarget(self._pool, name, self.length)


class PieceWriter:
    """Writes what is contiguous as one piece. Belongs to one thread."""

    def __init__(self, target: PieceTarget, acknowledge: writing.Acknowledge) -> None:
        self._target = target
        self._acknowledge = acknowledge
        self._number = target.take()
        self._file: writing.VolumeWriter | None = None
        self._begin = self._next = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        try:
            file, self._file = self._file, None
            if file is not None:
                file.__exit__(kind, error, trace)
        finally:
            self._target.give_back(self._number)

    def write(self, offset: int, data: bytes) -> None:
        position, left = 0, memoryview(data)
        while position < len(data):
            room = self._target.length - (self._next - self._begin)
            if self._file is not None and (offset + position != self._next or not room):
                self.finish()
            if self._file is None:
                self._start(offset + position)
                room = self._target.length
            part = bytes(left[position : position + room])
            self._file_at(part)
            position += len(part)

    def finish(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.finish()

    # Private

    def _start(self, offset: int) -> None:
        self._begin = self._next = offset
        target = self._target.file(self._number)
        self._file = target.writer(target.size, self._bring)

    def _file_at(self, data: bytes) -> None:
        assert self._file is not None
        self._file.write(self._next - self._begin, data)
        self._next += len(data)

    def _bring(self) -> None:
        name = request.piece_name(self._target.name, self._number)
        self._target.bring(name, self._begin, self._next - self._begin)
        self._acknowledge()
