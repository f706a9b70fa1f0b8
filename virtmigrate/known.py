# SPDX-License-Identifier: Apache-2.0
"""What a copy's target holds, block by block, while it is being filled.

A fresh raw volume holds zeros, a block device nobody knows what, an older copy
what its manifest says. Before a block is written, it becomes unknown; when libvirt
acknowledged the stream, it is what was sent. So a copy that is taken up again
sends what is not known to be there already, and nothing else.

With a file all of that survives this process: a head line, then entries of
(first block, count, digests), each with a digest of its own. An acknowledgement
need not be on disk, for losing one costs only bytes; that a block becomes unknown
is fsynced first, for many blocks at once. A torn last entry did not happen.
"""

import os
import struct
import threading
from pathlib import Path
from typing import BinaryIO

import blake3

from virtmigrate.manifest import LENGTH, UNKNOWN, ZERO, Manifest

_HEAD = "virtmigrate-known 1 {size} {block_size}\n"
_ENTRY = struct.Struct("<QQ")
_CHECK = 16

_AT_ONCE = 4096
"""Blocks of one entry at the beginning: copies of all would take much memory."""


class Known:
    """What a target holds. Different blocks may be changed by several threads.

    Arguments:
        initial: what it holds now; it is changed.
        path: a file to keep it in, which is made anew; None keeps nothing.
    """

    def __init__(self, initial: Manifest, path: Path | None = None) -> None:
        self._blocks = initial
        self._lock = threading.Lock()
        self._fd = -1
        # Whether the file has a block as it is here: the others are unknown there,
        # some of them ahead of their time.
        self._kept = bytearray(initial.count)
        if path is not None:
            try:
                self._create(path)
            except BaseException:
                self.close()
                raise

    @property
    def size(self) -> int:
        return self._blocks.size

    @property
    def block_size(self) -> int:
        return self._blocks.block_size

    def __getitem__(self, index: int) -> bytes:
        return self._blocks[index]

    def is_zero(self, first: int, last: int) -> bool:
        """Tell whether all blocks from first up to last are known to be zeros."""
        return self._blocks.slice(first, last) == ZERO * (last - first)

    def writing(self, index: int, last: int) -> None:
        """Note, before it happens, that a block's content will not be known.

        Arguments:
            last: one behind the blocks that this thread comes to next: the file
                forgets them all at once.
        """
        self._blocks[index] = UNKNOWN
        if self._fd >= 0 and self._kept[index]:
            with self._lock:
                self._forget(index, last)

    def settled(self, index: int, digest: bytes) -> None:
        """Note what a block holds now."""
        is_kept = self._kept[index] and self._blocks[index] == digest
        self._blocks[index] = digest
        if self._fd >= 0 and not is_kept:
            with self._lock:
                self._kept[index] = True
                self._append(index, digest)

    def close(self) -> None:
        """Close the file; it stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # Private

    def _create(self, path: Path) -> None:
        # By renaming: half of a file would say what nobody knows.
        new = path.with_name(f"{path.name}.new")
        new.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._fd = os.open(new, flags, 0o600)
        head = _HEAD.format(size=self.size, block_size=self.block_size)
        _write(self._fd, head.encode())
        for first in range(0, self._blocks.count, _AT_ONCE):
            last = min(first + _AT_ONCE, self._blocks.count)
            if not self.is_zero(first, last):
                self._append(first, self._blocks.slice(first, last))
            for index in range(first, last):
                self._kept[index] = self._blocks[index] != UNKNOWN
        os.fsync(self._fd)
        new.rename(path)
        # Else the older file might come back after a power cut.
        _sync_directory(path.parent)

    def _forget(self, first: int, last: int) -> None:
        self._kept[first:last] = bytes(last - first)
        self._append(first, UNKNOWN * (last - first))
        os.fsync(self._fd)

    def _append(self, first: int, digests: bytes) -> None:
        entry = _ENTRY.pack(first, len(digests) // LENGTH) + digests
        _write(self._fd, entry + _check(entry))


def forget(path: Path) -> None:
    """Remove a file for good: after a power cut it does not come back."""
    path.unlink(missing_ok=True)
    _sync_directory(path.parent)


def load(path: Path) -> Manifest | None:
    """Return what a file says of a target; None without a file that is whole."""
    try:
        with path.open("rb") as file:
            line = file.readline(200).decode()
            magic, version, size, block_size = line.split()
            if (magic, version, line[-1]) != ("virtmigrate-known", "1", "\n"):
                return None
            found = Manifest(int(size), int(block_size))
            return found if _replay(found, file) else None
    except (FileNotFoundError, ValueError, IndexError):
        return None


# Private


def _replay(found: Manifest, file: BinaryIO) -> bool:
    """Apply the entries; False when one before the last is damaged."""
    while head := file.read(_ENTRY.size):
        if len(head) < _ENTRY.size:
            return True
        first, count = _ENTRY.unpack(head)
        if first + count > found.count:
            return False
        digests, check = file.read(count * LENGTH), file.read(_CHECK)
        if check != _check(head + digests):
            # One that is torn is the last.
            return not file.read(1)
        for each in range(count):
            found[first + each] = digests[each * LENGTH : (each + 1) * LENGTH]
    return True


def _check(entry: bytes) -> bytes:
    return blake3.blake3(entry).digest(_CHECK)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
