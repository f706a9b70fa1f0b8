# SPDX-License-Identifier: Apache-2.0
"""A disk that stands still, as the bytes of an image, from the first to the last.

Ranges are read ahead, by a few threads or by the kernel. The last piece goes when it is
known that the disk did not change: before that no sink has a whole image.
"""

import collections
import concurrent.futures
import contextlib
import itertools
from collections.abc import Generator, Iterator
from typing import Protocol

from virtmigrate import errors, manifest, qcow2image, reading, sinks
from virtmigrate.units import KiB, MiB

_SPAN = MiB
_AHEAD = 8
"""Ranges that are read before they are needed: what is kept in memory."""
_READERS = 3

Span = tuple[int, int]
Pieces = Generator[sinks.Piece, None, None]
Read = Generator[tuple[Span, bytes | None], None, None]


class Meter(Protocol):
    """Who lets bytes pass, and counts them."""

    def check(self) -> None:
        """Raise what ends the work."""
        ...

    def count(self, passed: int, *, sent: int) -> None:
        """Wait until so many bytes may be sent; `passed` has the zeros, too."""
        ...


class Outgoing:
    """One image. Belongs to one thread; the disk has to be entered.

    Arguments:
        fmt: raw or qcow2.
    """

    def __init__(self, source: reading.Source, fmt: str, meter: Meter) -> None:
        self._source, self._meter = source, meter
        self._layout: qcow2image.Layout | None = None
        if fmt == "qcow2":
            self._layout = qcow2image.Layout(source.size, self._skip)
        self.size = self._layout.length if self._layout else source.size
        self._digests: dict[str, str] = {}

    def pieces(self, algorithm: str) -> Pieces:
        """Yield all bytes, and keep their digest."""
        found = sinks.Print(algorithm, self.size)
        with contextlib.closing(self._sealed()) as pieces:
            for piece in pieces:
                if isinstance(piece, int):
                    self._meter.count(piece, sent=0)
                else:
                    self._meter.count(len(piece), sent=len(piece))
                found.add(piece)
                yield piece
        self._digests[algorithm] = found.hex()

    def digest(self, algorithm: str) -> str:
        """Return the digest of what was sent; read again for one that was not kept."""
        if algorithm not in self._digests:
            for _ in self.pieces(algorithm):
                pass
        return self._digests[algorithm]

    # Private

    def _skip(self, start: int) -> int:
        self._meter.check()
        return min(self._source.skip(start), self._source.size)

    def _sealed(self) -> Pieces:
        """Yield all pieces, the last one when the disk is known to be unchanged."""
        kept: sinks.Piece | None = None
        read = self._qcow2() if self._layout else self._raw()
        with contextlib.closing(read) as pieces:
            for piece in pieces:
                if kept is not None:
                    yield kept
                kept = piece
        self._source.demand_unchanged()
        if kept is not None:
            yield kept

    def _raw(self) -> Pieces:
        with contextlib.closing(self._read(self._raw_spans())) as found:
            for (start, end), data in found:
                yield from (end - start,) if data is None else _split(data)

    def _raw_spans(self) -> Iterator[Span]:
        size = self._source.size
        position = 0
        while position < size:
            # A hole is one span, however long.
            data = self._skip(position)
            end = data if data > position else min(position + _SPAN, size)
            yield position, end
            position = end

    def _qcow2(self) -> Pieces:
        assert self._layout is not None
        yield from self._layout.tables()
        most = max(_SPAN, self._layout.cluster)
        with contextlib.closing(self._read(self._layout.spans(most))) as found:
            for (start, end), data in found:
                if data is None:
                    yield end - start
                    continue
                yield from _split(data.ljust(end - start, b"\0"))

    def _read(self, spans: Iterator[Span]) -> Read:
        """Yield each span with its bytes, None for zeros."""
        if isinstance(self._source, reading.FileSource):
            # The kernel reads ahead: a thread would only wait for its turn.
            for span in spans:
                yield span, self._piece(*span)
            return
        waiting: collections.deque[tuple[Span, _Promise]] = collections.deque()
        # Through libvirt each thread fetches far more than it is asked for.
        is_far = isinstance(self._source, reading.VolumeSource)
        pool = concurrent.futures.ThreadPoolExecutor(1 if is_far else _READERS)
        try:
            for span in spans:
                waiting.append((span, pool.submit(self._piece, *span)))
                if len(waiting) >= _AHEAD:
                    first, promise = waiting.popleft()
                    yield first, promise.result()
            while waiting:
                first, promise = waiting.popleft()
                yield first, promise.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _piece(self, start: int, end: int) -> bytes | None:
        last = min(end, self._source.size)
        if self._source.skip(start) >= last:
            return None
        try:
            data = self._source.read(start, last)
        except OSError as e:
            # A sink would take it for its own.
            raise errors.SourceUnreadable(
                volume=self._source.name, reason=e.strerror or e
            ) from e
        return None if data is None or manifest.is_zero(data) else data


# Private

_Promise = concurrent.futures.Future[bytes | None]
_GRAIN = 64 * KiB
"""Bytes of zeros that are worth a hole."""
_ZEROS = bytes(_GRAIN)


def _split(data: bytes) -> Iterator[sinks.Piece]:
    """Yield bytes with the zeros in them told apart."""
    start = 0
    for is_zero, run in itertools.groupby(
        range(0, len(data), _GRAIN), lambda at: _is_zero(data, at)
    ):
        end = min(list(run)[-1] + _GRAIN, len(data))
        if is_zero:
            yield end - start
        else:
            yield data if end - start == len(data) else data[start:end]
        start = end


def _is_zero(data: bytes, at: int) -> bool:
    # Most data begins with something else, and is not copied to be looked at.
    return data[at] == 0 and data[at : at + _GRAIN] == _ZEROS[: len(data) - at]
