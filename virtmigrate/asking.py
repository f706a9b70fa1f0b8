# SPDX-License-Identifier: Apache-2.0
"""Asking a peer's receiver, through two volumes in the peer's mailbox.

In order: the answer's volume is made, full of zeros; the request's is made and
written; the answer's head is read until it is final; both are removed. What a
killed process leaves is removed by whoever needs the number next.
"""

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
from oslo_log import log as logging

from virtmigrate import errors, manifest, request, storagepool, wire
from virtmigrate.request import Answer, Request, State, Verb

LOG = logging.getLogger(__name__)

Progress = Callable[[int], object]
"""Called with the bytes done so far, at every look; what it raises ends the asking."""

_SHORTEST = 0.01
_LONGEST = 0.5
"""Seconds between two looks at the answer."""

_LIVELY = 3600.0
"""Seconds that signs of life are believed while no more bytes are done."""


class Asker:
    """Asks on behalf of one operation. Safe to share between threads.

    After a silence every later request is silent at once: a move of many disks
    waits only once.

    Arguments:
        pool: the peer's mailbox.
        begin_timeout: seconds within which the receiver has to begin.
        stall_timeout: seconds within which it then has to give a sign of life.
    """

    def __init__(
        self,
        pool: storagepool.Pool,
        operation: str,
        *,
        begin_timeout: float,
        stall_timeout: float,
    ) -> None:
        self._pool = pool
        self._operation = operation
        self._begin = begin_timeout
        self._stall = stall_timeout
        self._free = list(range(request.NUMBERS))
        self._numbers = threading.Condition()
        self._silence: errors.ReceiverSilent | None = None
        self._waited = 0.0

    def ask(
        self, wanted: Request, progress: Progress | None = None
    ) -> tuple[Answer, manifest.Manifest | None]:
        """Ask, and return the answer and the manifest that it brings, if any.

        Arguments:
            wanted: operation, number and nonce are filled in here.

        Raises RequestRefused when the receiver says no, ReceiverSilent when it
        says nothing; what it does then is unknown, as after a HostError. No
        volume of the request stays, unless the peer is away.
        """
        if self._silence is not None:
            raise self._silent(self._waited, wanted)
        with self._number() as number:
            numbered = msgspec.structs.replace(
                wanted,
                operation=self._operation,
                number=number,
                nonce=secrets.token_hex(16),
            )
            with self._posted(numbered) as asked:
                return self._await(asked, progress or (lambda _: None))

    # Private

    @contextlib.contextmanager
    def _number(self) -> Iterator[int]:
        """Hold a number, the one that was used longest ago."""
        with self._numbers:
            self._numbers.wait_for(lambda: bool(self._free))
            number = self._free.pop(0)
        try:
            yield number
        finally:
            with self._numbers:
                self._free.append(number)
                self._numbers.notify()

    @contextlib.contextmanager
    def _posted(self, wanted: Request) -> Iterator["_Asked"]:
        """Have both volumes in the mailbox, the answer's first."""
        asked = _Asked(wanted)
        try:
            self._make(asked.answer, request.answer_size(wanted))
            self._make(asked.name, request.HEAD)
            self._pool.write(asked.name, asked.data)
            yield asked
        finally:
            self._clean(asked)

    def _make(self, name: str, size: int) -> None:
        try:
            self._pool.create_raw(name, size)
        except errors.VolumeExists:
            LOG.debug("volume=%s is one that a killed process left", name)
            self._pool.delete(name)
            self._pool.create_raw(name, size)

    def _clean(self, asked: "_Asked") -> None:
        """Remove both volumes; the first error is the one that counts."""
        for name in (asked.name, asked.answer):
            try:
                self._pool.delete(name)
            except errors.Error as e:
                LOG.warning("volume=%s stays until its number comes: %s", name, e)

    def _await(
        self, asked: "_Asked", progress: Progress
    ) -> tuple[Answer, manifest.Manifest | None]:
        last: Answer | None = None
        patience = self._begin
        began = since = grown = time.monotonic()
        while True:
            answer = self._look(asked)
            if answer is not None and answer != last:
                now = time.monotonic()
                if last is None or answer.done > last.done:
                    grown = now
                if now - grown < _LIVELY:
                    since = now
                last, patience = answer, self._stall
                found = self._final(asked, answer)
                if found is not None:
                    return found
            progress(last.done if last else 0)
            left = patience - (time.monotonic() - since)
            if left <= 0:
                self._waited = patience
                self._silence = self._silent(patience, asked.request)
                raise self._silence
            # So an answer is noticed late by a tenth of the time that it took.
            pause = (time.monotonic() - began) / 10
            time.sleep(min(left, max(_SHORTEST, min(pause, _LONGEST))))

    def _look(self, asked: "_Asked") -> Answer | None:
        """Return what the head says; None while it is torn, or of another request."""
        data = self._read(asked.answer, request.HEAD)
        try:
            answer = request.decode_answer(data, asked.answer)
        except ValueError:
            return None
        return answer if answer.request == asked.digest else None

    def _final(
        self, asked: "_Asked", answer: Answer
    ) -> tuple[Answer, manifest.Manifest | None] | None:
        """Return the result of a head that is final; None while it is not."""
        if answer.state is State.FAILED:
            raise errors.RequestRefused(
                host=self._pool.host.name,
                verb=asked.request.verb.value,
                volume=asked.request.volume,
                reason=_printable(answer.reason),
            )
        if answer.state is not State.DONE:
            return None
        length = request.payload_size(asked.request)
        if length and answer.digest is None:
            raise errors.RequestRefused(
                host=self._pool.host.name,
                verb=asked.request.verb.value,
                volume=asked.request.volume,
                reason="it answered without a manifest",
            )
        if answer.digest is None or asked.request.verb is Verb.HOLD:
            return answer, None
        data = self._read(asked.answer, request.HEAD + length)
        try:
            size = asked.request.size
            return answer, request.manifest_of(answer, size, data[request.HEAD :])
        except ValueError as e:
            # What it wrote did not arrive; nobody writes it again.
            LOG.warning("volume=%s: %r", asked.answer, str(e))
            return None

    def _read(self, name: str, length: int) -> bytes:
        with self._pool.opened(name, f"reading {name}") as (session, vol):
            return wire.download(session, vol, length)

    def _silent(self, seconds: float, wanted: Request) -> errors.ReceiverSilent:
        doing = f"to {wanted.verb.value} {wanted.volume}".rstrip()
        return errors.ReceiverSilent(
            host=self._pool.host.name, seconds=seconds, doing=doing
        )


def _printable(text: str) -> str:
    """Return what a peer wrote as one line: it goes into logs."""
    return "".join(c if c.isprintable() else "?" for c in text[: request.REASON_LIMIT])


class _Asked:
    """A request as it lies in the mailbox."""

    def __init__(self, wanted: Request) -> None:
        self.request = wanted
        self.name = request.request_name(wanted.operation, wanted.number)
        self.answer = request.answer_name(self.name)
        self.data = request.encode(wanted)
        self.digest = request.digest(self.data)
