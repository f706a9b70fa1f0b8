# SPDX-License-Identifier: Apache-2.0
"""Images that become files of this host."""

import concurrent.futures
import contextlib
import errno
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

from virtmigrate import errors, manifest
from virtmigrate.sinks.base import CHUNK, MANIFEST, Announced, Digest, Piece

_READERS = 3
"""Threads that read a file back."""
_STRETCH = 64
"""Blocks that one of them takes at once."""


class FileSink:
    """A file that has its name once it is whole, proven, and on disk.

    Until then it lies beside, under a name of its own. A file that is there is never
    replaced. Holes stay holes.

    Arguments:
        operation: what its first name ends with.
    """

    algorithm = MANIFEST

    def __init__(self, path: Path, operation: str) -> None:
        self._path = path.absolute()
        self._part = self._path.with_name(f".{self._path.name}.{operation}")
        self._size = 0

    @property
    def place(self) -> str:
        return f"file:{self._path}"

    def look(self) -> None:
        """See Sink.look(). Refuses a path where something is already."""
        if os.path.lexists(self._path):
            raise self._refused("there is such a file already")
        if not os.access(self._path.parent, os.W_OK | os.X_OK):
            raise self._refused(f"{self._path.parent} is no directory to write to")

    def begin(self, coming: Announced) -> None:
        self._size = coming.size
        with self._explained():
            # Who was killed here before its first byte comes again.
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            os.close(os.open(self._part, flags, 0o600))

    def take(self, pieces: Iterator[Piece]) -> None:
        with self._opened(os.O_WRONLY) as file:
            position = 0
            for piece in pieces:
                if isinstance(piece, int):
                    position += piece
                    continue
                with self._explained():
                    _write(file, piece, position)
                position += len(piece)
            with self._explained():
                os.ftruncate(file, position)
                os.fsync(file)

    def prove(self, digest: Digest) -> str:
        expected, found = digest(self.algorithm), self._read_back()
        if found != expected:
            raise self._refused(f"it reads back as {found}, and {expected} was written")
        with self._explained():
            return _mark(self._part)

    def publish(self) -> None:
        """Give it its name. Refuses when something has come there meanwhile."""
        with self._explained():
            # Not by renaming, which would replace that.
            os.link(self._part, self._path, follow_symlinks=False)
            self._part.unlink()
            self._persist_directory()

    def abort(self, mark: str = "") -> None:
        with self._explained():
            self._part.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                if mark and _mark(self._path) == mark:
                    self._path.unlink()

    # Private

    def _read_back(self) -> str:
        found = manifest.Manifest(self._size)
        with self._opened(os.O_RDONLY) as file, self._explained():
            size = os.fstat(file).st_size
            if size != self._size:
                raise self._refused(f"it has {size} bytes instead of {self._size}")
            _survey(file, found)
        return found.root()

    @contextlib.contextmanager
    def _opened(self, flags: int) -> Iterator[int]:
        with self._explained():
            file = os.open(self._part, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise self._refused("its part is no file")
            yield file
        finally:
            os.close(file)

    def _persist_directory(self) -> None:
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                reason = f"there is no room for it ({e.strerror})"
                raise self._refused(reason) from e
            raise self._refused(e.strerror or str(e)) from e

    def _refused(self, reason: str) -> errors.ImageNotTaken:
        return errors.ImageNotTaken(image=self.place, reason=reason)


# Private


def _write(file: int, data: bytes, position: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(file, view, position)
        view, position = view[count:], position + count


def _mark(path: Path) -> str:
    """Return what tells a file from one that took its name."""
    found = path.lstat()
    return f"{found.st_dev}:{found.st_ino}:{found.st_size}:{found.st_mtime_ns}"


def _survey(file: int, found: manifest.Manifest) -> None:
    """Have a manifest of a file, whose blocks are read by some threads."""
    kept = threading.local()

    def read(first: int) -> None:
        for index in range(first, min(first + _STRETCH, found.count)):
            found[index] = _digest(file, *found.span(index), kept)

    with concurrent.futures.ThreadPoolExecutor(_READERS) as readers:
        for _ in readers.map(read, range(0, found.count, _STRETCH)):
            pass


def _digest(file: int, start: int, end: int, kept: threading.local) -> bytes:
    """Return the digest of a block, read into a buffer that its thread keeps."""
    fold = manifest.Fold()
    if _data(file, start, end) == end:
        return fold.digest()
    if not hasattr(kept, "buffer"):
        kept.buffer = bytearray(CHUNK)
    for at in range(start, end, CHUNK):
        view = memoryview(kept.buffer)[: min(CHUNK, end - at)]
        _fill(file, view, at)
        fold.add(kept.buffer if len(view) == CHUNK else bytes(view))
    return fold.digest()


def _fill(file: int, view: memoryview, position: int) -> None:
    while view:
        count = os.preadv(file, [view], position)
        if not count:
            raise OSError(errno.EIO, f"it ends at {position}")
        view, position = view[count:], position + count


def _data(file: int, start: int, size: int) -> int:
    """Return where data begins at or after start, `size` if that is not before."""
    try:
        return min(os.lseek(file, start, os.SEEK_DATA), size)
    except OSError as e:
        if e.errno != errno.ENXIO:
            raise
        return size
