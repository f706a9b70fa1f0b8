# SPDX-License-Identifier: Apache-2.0
"""Move the bytes of volumes, and know what arrived.

One rule sends everything that has to be sent, and nothing else: a block of the
source is written when its digest is not what the target is known to hold there.
Holes and zeros of a fresh target, blocks of an older copy, and what an earlier
attempt got through are not sent; what lies in a block device from before is
overwritten.

A few workers take stretches of the volume in turn, each with connections of its
own: while one reads and hashes, another sends. A stretch is what one libvirt
stream may be long: libvirtd queues what its disk does not take. When a host goes
away, the stretch is tried again, and only what was not acknowledged is sent again.
"""

import concurrent.futures
import contextlib
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

from virtmigrate import account, crew, errors, limit, manifest, reading, writing
from virtmigrate.known import Known
from virtmigrate.manifest import UNKNOWN, ZERO, Manifest
from virtmigrate.progress import Progress
from virtmigrate.units import MiB

T = TypeVar("T")

HELD = reading.WINDOW
"""Bytes of a block that a worker keeps; of longer ones it reads pieces, twice."""

PIECE = MiB


@dataclass(frozen=True)
class Tuning:
    """How a copy uses hosts and time."""

    workers: int = 2
    stretch: int = 32 * MiB
    """Bytes of one stream, and of what one worker takes at once."""
    retry: float = 0.0
    """Seconds without any acknowledgement after which a lost host is given up,
    counted from its loss."""


class Mover:
    """Copies volumes with a few workers that live as long as `with`.

    One copy at a time. Leaving `with` joins the workers.

    Arguments:
        limits: what bandwidth may be used; None is all.
    """

    def __init__(
        self,
        tuning: Tuning = Tuning(),
        *,
        progress: Progress | None = None,
        counted: account.Account | None = None,
        limits: limit.Limits | None = None,
    ) -> None:
        self.tuning = tuning
        self.progress = progress or Progress()
        self.account = counted or account.Account()
        self.limits = limits or limit.Limits()

    def __enter__(self) -> Self:
        self._workers = concurrent.futures.ThreadPoolExecutor(
            self.tuning.workers, thread_name_prefix="virtmigrate-mover"
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self._workers.shutdown()

    def copy(
        self,
        source: reading.Source,
        target: writing.Target,
        known: Known | None = None,
    ) -> Manifest:
        """Make the target equal to the source; return the source's manifest.

        Where the target is longer, the rest of it is made zeros.

        Arguments:
            known: what the target holds; by default zeros, as a fresh volume does.
                It tells afterwards, also after an error, what arrived.

        Raises Cancelled, TransferError, HostError, StorageError; the target is
        then partial. A source that is longer than the target is a TransferError,
        and nothing was written.
        """
        known = known or Known(Manifest(target.size))
        _demand_fit(source, target, known)
        task = _Copy(self, source, target, known)
        self._run(task, source, task.feed(known))
        return task.found

    def survey(
        self,
        source: reading.Source,
        blocks: Sequence[int] | None = None,
        waits: account.Wait = account.SOURCE,
    ) -> Manifest:
        """Read a volume and return its manifest.

        Arguments:
            blocks: the ones to read, the others stay unknown; None is all.
            waits: what reading counts as.
        """
        task = _Survey(self, source, source.size, waits)
        if blocks is None:
            feed = task.feed(None)
        else:
            feed = (range(index, index + 1) for index in blocks)
        self._run(task, source, feed)
        return task.found

    def persist(self, call: Callable[[], T]) -> T:
        """Call, and call again while a host is away, as a copy does."""
        return crew.persist(_Work(self), self.tuning.retry, call)

    # Private

    def _run(
        self, task: "_Survey", source: reading.Source, feed: Iterator[range]
    ) -> None:
        retry = self.tuning.retry
        with contextlib.ExitStack() as opened:
            crew.persist(task, retry, opened.enter_context, source)
            crew.Crew(task, feed, retry).run(self._workers, self.tuning.workers)
            # Whoever cancelled while the last block went hears of it.
            task.check()
            crew.persist(task, retry, source.demand_unchanged)


class _Work:
    """Work that ends when somebody cancels it, or a part of it fails."""

    def __init__(self, mover: Mover) -> None:
        self.stop = threading.Event()
        self.moved = time.monotonic()
        """When something was acknowledged last."""
        self._mover = mover

    def check(self) -> None:
        """Raise Cancelled when this work is to end."""
        self._mover.progress.check()
        if self.stop.is_set():
            raise errors.Cancelled


class _Survey(_Work):
    """Reads blocks and keeps their digests."""

    def __init__(
        self,
        mover: Mover,
        source: reading.Source,
        size: int,
        waits: account.Wait = account.SOURCE,
    ) -> None:
        super().__init__(mover)
        self.found = Manifest.unknown(size)
        self._source = source
        self._waits = waits

    def feed(self, known: Known | None) -> Iterator[range]:
        """Yield stretches of blocks; those that need no worker are settled here."""
        count = max(1, self._mover.tuning.stretch // self.found.block_size)
        for first in range(0, self.found.count, count):
            last = min(first + count, self.found.count)
            start, end = self.found.span(first)[0], self.found.span(last - 1)[1]
            is_hole = self._source.skip(start) >= min(end, self._source.size)
            if is_hole and (known is None or known.is_zero(first, last)):
                self._pass_over(first, last)
            else:
                yield range(first, last)

    def handle(self, blocks: range) -> None:
        """Do one stretch; may be called again for the same."""
        for index in blocks:
            self.check()
            self.count(index, self.digest(index))

    def digest(self, index: int) -> bytes:
        """Return a block's digest, and keep no more of it than a piece."""
        fold = manifest.Fold()
        start, end = self.found.span(index)
        for offset in range(start, end, PIECE):
            until = min(offset + PIECE, end)
            data = self.read(offset, until)
            if data is None:
                fold.skip(until - offset)
                continue
            with self._mover.account.waiting(account.HASHING):
                fold.add(data)
        return fold.digest()

    def read(self, start: int, end: int) -> bytes | None:
        """Return a range, with zeros behind the source's end; None for a hole."""
        until = min(end, self._source.size)
        with self._mover.account.waiting(self._waits):
            data = self._source.read(start, until) if start < until else None
        self._mover.account.add(read=len(data or b""))
        if data is not None and len(data) < end - start:
            data += bytes(end - start - len(data))
        return data

    def count(self, index: int, digest: bytes, what: str | None = None) -> None:
        """Keep a digest; the first time, the block is progress."""
        is_new = self.found[index] == UNKNOWN
        self.found[index] = digest
        if is_new:
            start, end = self.found.span(index)
            self._mover.progress.advance(end - start)
            if what is not None:
                self._mover.account.add(**{what: end - start})

    # Private

    def _pass_over(self, first: int, last: int) -> None:
        length = 0
        for index in range(first, last):
            self.found[index] = ZERO
            start, end = self.found.span(index)
            length += end - start
        self._mover.account.add(skipped=length)
        self._mover.progress.advance(length)


class _Copy(_Survey):
    """Reads blocks, and writes those that the target lacks."""

    def __init__(
        self,
        mover: Mover,
        source: reading.Source,
        target: writing.Target,
        known: Known,
    ) -> None:
        super().__init__(mover, source, target.size)
        self._target = target
        self._known = known

    def handle(self, blocks: range) -> None:
        under_way = writing.UnderWay()
        until = self.found.span(blocks.stop - 1)[1]
        try:
            with self._target.writer(until, lambda: self._settle(under_way)) as writer:
                for index in blocks:
                    self.check()
                    self._handle(index, blocks.stop, writer, under_way)
                with self._mover.account.waiting(account.NETWORK):
                    writer.finish()
        except Exception:
            lost = under_way.lost
            self._mover.account.add(sent=-lost, resent=lost)
            raise

    # Private

    def _handle(
        self,
        index: int,
        last: int,
        writer: writing.Writer,
        under_way: writing.UnderWay,
    ) -> None:
        """Send a block if the target lacks it."""
        digest, data = self._look(index)
        before = self._known[index]
        if digest == before:
            self._known.settled(index, digest)
            self.count(index, digest, "skipped" if digest == ZERO else "matched")
            return
        self.count(index, digest)
        self._known.writing(index, last)
        start, end = self.found.span(index)
        if data is not None:
            self._send(writer, start, data or bytes(end - start), under_way)
            under_way.done(index)
            return
        self._send_long(index, before, writer, under_way)
        self._mover.account.add(skipped=end - start - under_way.part)
        under_way.done(index)
        self._settle(under_way)

    def _look(self, index: int) -> tuple[bytes, bytes | None]:
        """Return a block's digest, and its bytes unless they are too many to keep."""
        start, end = self.found.span(index)
        if end - start > HELD:
            return self.digest(index), None
        data = self.read(start, end)
        if data is None:
            return ZERO, b""
        with self._mover.account.waiting(account.HASHING):
            return manifest.digest_of(data), data

    def _send_long(
        self,
        index: int,
        before: bytes,
        writer: writing.Writer,
        under_way: writing.UnderWay,
    ) -> None:
        """Send what has to be written of a block, in streams that are not too long."""
        unfinished = 0
        for offset, piece in self._pieces(index, before):
            self._send(writer, offset, piece, under_way)
            unfinished += len(piece)
            if unfinished >= self._mover.tuning.stretch:
                writer.finish()
                unfinished = 0
        writer.finish()

    def _pieces(self, index: int, before: bytes) -> Iterator[tuple[int, bytes]]:
        """Read a block once more; yield what the target lacks of it."""
        fold = manifest.Fold()
        start, end = self.found.span(index)
        for offset in range(start, end, PIECE):
            length = min(PIECE, end - offset)
            piece = self.read(offset, offset + length) or bytes(length)
            if fold.add(piece) or before != ZERO:
                yield offset, piece
        if self.found[index] != fold.digest():
            reason = "a block of it did between two looks"
            raise errors.SourceChanged(volume=self._source.name, reason=reason)

    def _send(
        self,
        writer: writing.Writer,
        offset: int,
        data: bytes,
        under_way: writing.UnderWay,
    ) -> None:
        with self._mover.account.waiting(account.LIMIT):
            self._mover.limits.take(len(data), self.check)
        with self._mover.account.waiting(account.NETWORK):
            writer.write(offset, data)
        under_way.part += len(data)
        self._mover.account.add(sent=len(data))
        self._mover.progress.advance(0, sent=len(data))

    def _settle(self, under_way: writing.UnderWay) -> None:
        """Note that all that was written is acknowledged."""
        for index in under_way.settle():
            self._known.settled(index, self.found[index])
        self.moved = time.monotonic()


def _demand_fit(source: reading.Source, target: writing.Target, known: Known) -> None:
    if source.size > target.size:
        raise errors.TransferError(
            volume=source.name,
            host=target.host,
            reason=f"its {source.size} bytes do not fit into {target.size}",
        )
    fresh = manifest.block_size_for(target.size)
    if (known.size, known.block_size) != (target.size, fresh):
        raise ValueError(
            f"what is known is of {known.size} bytes in blocks of {known.block_size}"
        )
