# SPDX-License-Identifier: Apache-2.0
"""What a guest sees of a disk that is a chain of files, to be read as one raw volume.

The chain, its formats and its size come from records. A header is looked at only to
refuse one whose data would lie in yet another file.
"""

import bisect
import contextlib
import queue
import stat
import threading
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from virtmigrate import domainxml, errors, nbdserver, qcow2
from virtmigrate.formats import DiskFormat
from virtmigrate.units import MiB

_CONNECTIONS = 4
"""Ranges that are read at once; more threads than that wait for each other."""

_MAP = 256 * MiB
_MAPS = 4
"""Bytes whose data is asked for at once, and how many such answers are kept."""


class GuestView:
    """A chain of files as its guest sees it. Safe to share between threads.

    Arguments:
        layers: the chain, top first, as records describe it.
        size: of the disk, by its record; SourceChanged when it is another one.

    Entering it raises SourceUnreadable when this process cannot read the files.
    """

    def __init__(self, layers: Sequence[domainxml.Layer], size: int) -> None:
        self.name = Path(layers[0].source).name
        self.size = size
        self._layers = layers
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._maps: dict[int, list[tuple[int, int]]] = {}
        self._before = self._look()
        self._free: queue.LifoQueue[nbdserver.Connection] = queue.LifoQueue()
        server = nbdserver.Server(self._layers, _CONNECTIONS)
        with contextlib.ExitStack() as stack:
            with self._translated():
                stack.enter_context(server)
            for each in server.connections:
                self._free.put(each)
                if each.size != self.size:
                    reason = f"its guest sees {each.size} bytes, not {self.size}"
                    raise self._changed(reason)
            self._running = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self._running.close()

    def read(self, start: int, end: int) -> bytes | None:
        if self.skip(start) >= end:
            return None
        with self._connection() as connection:
            return connection.read(start, end)

    def skip(self, start: int) -> int:
        while start < self.size:
            data = self._map(start // _MAP)
            following = bisect.bisect_right(data, start, key=lambda each: each[1])
            if following < len(data):
                return max(data[following][0], start)
            start = (start // _MAP + 1) * _MAP
        return self.size

    def demand_unchanged(self) -> None:
        if self._look() != self._before:
            raise self._changed("somebody wrote to a file of its chain")

    # Private

    def _map(self, number: int) -> list[tuple[int, int]]:
        """Return where the data of a part of the disk is."""
        with self._lock:
            if number not in self._maps:
                start = number * _MAP
                with self._connection() as connection:
                    found = connection.data(start, min(start + _MAP, self.size))
                while len(self._maps) >= _MAPS:
                    del self._maps[next(iter(self._maps))]
                self._maps[number] = found
            return self._maps[number]

    @contextlib.contextmanager
    def _connection(self) -> Iterator[nbdserver.Connection]:
        connection = self._free.get()
        try:
            with self._translated():
                yield connection
        finally:
            self._free.put(connection)

    def _look(self) -> list[tuple[int, int]]:
        """Return of all files how long they are, and when they were written to."""
        if reason := obstacle(self._layers, self.size):
            raise errors.SourceUnreadable(volume=self.name, reason=reason)
        found = [Path(layer.source).stat() for layer in self._layers]
        return [(each.st_size, each.st_mtime_ns) for each in found]

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except nbdserver.Failed as e:
            raise errors.SourceUnreadable(volume=self.name, reason=e) from e

    def _changed(self, reason: str) -> errors.SourceChanged:
        return errors.SourceChanged(volume=self.name, reason=reason)


def obstacle(layers: Sequence[domainxml.Layer], size: int) -> str | None:
    """Return why such a chain cannot be read by this process; None if it can.

    Arguments:
        size: of the disk, by its record.
    """
    if lacking := nbdserver.lacking():
        return f"reading a chain of files needs {', '.join(lacking)}"
    sizes = (size, *[None] * (len(layers) - 1))
    return next(filter(None, map(_objection, layers, sizes)), None)


# Private


def _objection(layer: domainxml.Layer, size: int | None) -> str | None:
    if layer.type is not domainxml.SourceType.FILE:
        return f"{layer.source} is no file"
    try:
        if not stat.S_ISREG(Path(layer.source).stat().st_mode):
            return f"{layer.source} is no file"
        with Path(layer.source).open("rb") as file:
            head = file.read(qcow2.HEADER)
    except OSError as e:
        return f"this process may not read {layer.source} ({e.strerror})"
    if layer.fmt is not DiskFormat.QCOW2:
        return None
    found = qcow2.objection(head)
    if not found and size not in (None, qcow2.size(head)):
        found = (
            f"has {qcow2.size(head)} bytes for its guest, and its record says {size}"
        )
    return f"{layer.source} {found}" if found else None
