# SPDX-License-Identifier: Apache-2.0
"""The memory volume that all clones of one call are started from.

There is one, whatever their number: its head is made each clone's in turn. Only one
process may do that, and only while nobody else starts from it: the caller holds the
snapshot's instance. What the head was has to be kept before the first change.
"""

import os
from pathlib import Path

from oslo_log import log as logging

from virtmigrate import errors, model, node, saveimage, wire
from virtmigrate.saveimage import Head

LOG = logging.getLogger(__name__)


class Memory:
    """One memory volume of this host. Not safe to share between threads."""

    def __init__(self, here: node.Node, volume: model.Volume) -> None:
        self._pool = here.files.pool(volume.pool)
        self._name = volume.name
        self.path = here.files.path(volume)

    def head(self) -> bytes:
        """Return the head's bytes; SaveImageRefused."""
        length = saveimage.head_length(self._read(saveimage.LENGTH))
        data = self._read(length)
        saveimage.decode(data)
        return data

    def write(self, head: bytes) -> None:
        """Put a head in place of the one that is there, and read it back.

        Raises SaveImageRefused where it would not end where that does, or was not
        written: what is there then is neither, and the caller puts one back.
        """
        # Not the whole head that is there: it may be one that was half written.
        found = saveimage.decode(head)
        if found.length != len(head):
            raise errors.SaveImageRefused(reason="its head has another length")
        path = self._local()
        if path is not None:
            _write(path, head)
        else:
            self._pool.write(self._name, head)
        if self._read(len(head)) != head:
            raise errors.SaveImageRefused(
                reason=f"{self._name}: its head is not what was written"
            )

    def exists(self) -> bool:
        return self._pool.has(self._name)

    # Private

    def _local(self) -> Path | None:
        """Return its file where this process may write there.

        An upload would make libvirt open every file of the pool.
        """
        path = Path(self.path)
        is_ours = self._pool.is_local() and os.access(path, os.R_OK | os.W_OK)
        return path if is_ours else None

    def _read(self, size: int) -> bytes:
        path = self._local()
        if path is not None:
            with path.open("rb") as file:
                return file.read(size)
        with self._pool.opened(self._name, f"reading {self._name}") as (session, vol):
            return wire.download(session, vol, size)


def text_of(head: bytes) -> str:
    """Return the XML in a head."""
    return saveimage.decode(head).text


def with_text(head: bytes, text: str) -> bytes:
    """Return a head with another XML; SaveImageRefused where it has no room."""
    found: Head = saveimage.decode(head)
    return found.with_text(text).encode()


# Private


def _write(path: Path, head: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        view = memoryview(head)
        place = 0
        while place < len(head):
            place += os.pwrite(fd, view[place:], place)
        os.fsync(fd)
    finally:
        os.close(fd)
