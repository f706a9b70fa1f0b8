# SPDX-License-Identifier: Apache-2.0
"""Images that are files of this host."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
            os.lseek(file, start, os.SEEK_SET)
            while data := self._piece(file):
                check()
                write(data)
            if _state(file) != before:
                reason = "its size or time of change is another"
                raise errors.SourceChanged(volume=self._path, reason=reason)

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

    def _piece(self, file: int) -> bytes:
        try:
            return os.read(file, CHUNK)
        except OSError as e:
            raise self._unavailable(e.strerror) from e

    def _unavailable(self, reason: object) -> errors.ImageUnavailable:
        return errors.ImageUnavailable(image=self._path, reason=reason)


def _state(file: int) -> tuple[int, int, int, int]:
    found = os.fstat(file)
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
