# SPDX-License-Identifier: Apache-2.0
"""Reading a disk while its guest writes to it.

What is read so is not one moment of the disk, and proves nothing. It is worth
sending ahead, because afterwards only what differs by its digest is sent.
"""

import errno
import mmap
import os
import threading
import types
from pathlib import Path
from typing import Self

from virtmigrate.reading import WINDOW
from virtmigrate.units import KiB, round_up

_ALIGNMENT = 4 * KiB


class LiveSource:
    """A file that may change while it is read. Safe to share between threads.

    It is read past the page cache: QEMU writes past it, too, and a page that was
    read beside such a write could be old, and be found by those who read later.
    Where the file system has no direct reads (tmpfs), its pages are the storage.

    Arguments:
        size: bytes to read; what is missing of it then is read as zeros.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.name = path.name
        self.size = size
        self._path = path
        self._fd = -1
        self._thread = threading.local()

    def __enter__(self) -> Self:
        flags = os.O_RDONLY | os.O_CLOEXEC
        try:
            self._fd = os.open(self._path, flags | os.O_DIRECT)
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise
            self._fd = os.open(self._path, flags)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        os.close(self._fd)
        self._fd = -1
        self._thread = threading.local()

    def read(self, start: int, end: int) -> bytes | None:
        if self.skip(start) >= end:
            return None
        view = memoryview(self._buffer())[: round_up(end - start, _ALIGNMENT)]
        length = min(os.preadv(self._fd, [view], start), end - start)
        return bytes(view[:length]).ljust(end - start, b"\0")

    def skip(self, start: int) -> int:
        try:
            return min(os.lseek(self._fd, start, os.SEEK_DATA), self.size)
        except OSError as e:
            # A block device has no holes.
            return start if e.errno == errno.EINVAL else self.size

    def demand_unchanged(self) -> None:
        """Nothing: it may."""

    # Private

    def _buffer(self) -> mmap.mmap:
        """Return this thread's buffer, aligned as direct reads need it."""
        found: mmap.mmap | None = getattr(self._thread, "buffer", None)
        if found is None:
            found = self._thread.buffer = mmap.mmap(-1, WINDOW)
        return found
