# SPDX-License-Identifier: Apache-2.0
"""Images that are files of this host."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from virtmigrate import errors
from virtmigrate.sources.base import CHUNK, Check, Checksum, Described, Write


class LocalFile:
    """A regular file, whose format is declared by whoever names it."""

    def __init__(
        self, path: Path, fmt: str, checksum: Checksum | None = None, min_disk: int = 0
    ) -> None:
        self._path, self._format = path.absolute(), fmt
        self._checksum, self._min_disk = checksum, min_disk

    @property
    def origin(self) -> str:
        return str(self._path)

    def described(self) -> Described:
        """Return what was declared, and the size now. Raises ImageUnavailable."""
        with self._opened() as file:
            state = _state(file)
            size = os.fstat(file).st_size
        return Described(
            self._path.name,
            self._format,
            size,
            self._checksum,
            self._min_disk,
            version=".".join(str(each) for each in state),
        )

    def read(self, write: Write, check: Check, start: int = 0) -> None:
        """See Source.read(). Raises SourceChanged when the file changed meanwhile."""
        with self._opened() as file:
            before = _state(file)
            # Not to the end: one that grows would have none.
            for offset in range(start, before.size, CHUNK):
                check()
                write(self._piece(file, offset, min(CHUNK, before.size - offset)))
            if _state(file) != before:
                raise self._changed()

    # Private

    @contextmanager
    def _opened(self) -> Iterator[int]:
        try:
            file = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as e:
            raise self._unavailable(e.strerror) from e
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise self._unavailable("it is no regular file")
            yield file
        finally:
            os.close(file)

    def _piece(self, file: int, offset: int, count: int) -> bytes:
        try:
            data = os.pread(file, count, offset)
        except OSError as e:
            raise self._unavailable(e.strerror) from e
        if len(data) < count:
            raise self._changed()
        return data

    def _changed(self) -> errors.SourceChanged:
        reason = "its size or time of change is another"
        return errors.SourceChanged(volume=self._path, reason=reason)

    def _unavailable(self, reason: object) -> errors.ImageUnavailable:
        return errors.ImageUnavailable(image=self._path, reason=reason)


class _State(NamedTuple):
    inode: int
    size: int
    written: int
    changed: int


def _state(file: int) -> _State:
    found = os.fstat(file)
    return _State(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
