# SPDX-License-Identifier: Apache-2.0
"""What goes wrong in one direction of a proxy's connections, and when."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from sandbox import errors

CHUNK = 64 * 1024
"""Bytes that are forwarded at once."""

CALL_TIMEOUT = 10.0
"""Seconds that the proxy's thread may take to do what it is asked."""

Result = TypeVar("Result")


class Direction:
    """One direction of all connections: its faults and its counter.

    Its faults may be set at any time, by any thread. Offsets count bytes of all
    connections together, from the moment of setting on.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.delay = 0.0
        """Seconds that each chunk of at most CHUNK bytes is kept."""
        self.rate = 0
        """Bytes per second that may pass; 0 for no limit."""
        self.resets = True
        """Whether the next cut is by RST."""
        self._loop = loop
        self._changed = threading.Condition()
        self._count = self._flipped = self._cuts = 0
        self._cut_at: int | None = None
        self._flips: dict[int, int] = {}
        self._due = 0.0
        self._open = asyncio.Event()
        self._open.set()

    @property
    def count(self) -> int:
        """Bytes that passed."""
        return self._count

    @property
    def flipped(self) -> int:
        """Bytes that were changed."""
        return self._flipped

    @property
    def cuts(self) -> int:
        """How often cut_after() came true."""
        return self._cuts

    def stall(self) -> None:
        """Forward nothing until release(); connections stay, new ones come."""
        call(self._loop, self._set_open(False))

    def release(self) -> None:
        """End a stall."""
        call(self._loop, self._set_open(True))

    def cut_after(self, count: int, *, reset: bool = True) -> None:
        """End all connections when exactly count more bytes have passed, once.

        What other connections have on their way at that moment may be lost.

        Arguments:
          reset: by RST; else in an orderly way, as a daemon that ends.
        """
        with self._changed:
            self._cut_at = self._count + count
            self.resets = reset

    def flip_bit(self, offset: int, bit: int = 0) -> None:
        """Flip one bit of the byte that has offset bytes before it."""
        with self._changed:
            at = self._count + offset
            self._flips[at] = self._flips.get(at, 0) ^ (1 << bit)

    def wait(self, count: int, timeout: float) -> None:
        """Wait until count bytes have passed since the proxy began.

        Raises SandboxError after timeout seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._count >= count, timeout):
                raise errors.SandboxError(
                    f"{self._count} of {count} bytes passed in {timeout:g} s"
                )

    # For the proxy

    async def hold(self, length: int) -> None:
        """Return when so many bytes may pass."""
        if self.delay:
            await asyncio.sleep(self.delay)
        if self.rate:
            now = asyncio.get_running_loop().time()
            self._due = max(now, self._due) + length / self.rate
            await asyncio.sleep(self._due - now)
        await self._open.wait()

    def spoil(self, data: bytes) -> tuple[bytes, bool]:
        """Count a chunk; return what of it passes, and whether that is the end."""
        with self._changed:
            ends = False
            if self._cut_at is not None:
                ends = self._count + len(data) >= self._cut_at
                data = data[: self._cut_at - self._count]
            data = self._flip(data)
            self._count += len(data)
            self._changed.notify_all()
        return data, ends

    def cut_done(self) -> None:
        """Forget a cut that came true."""
        with self._changed:
            if self._cut_at is not None:
                self._cut_at = None
                self._cuts += 1

    # Private

    async def _set_open(self, is_open: bool) -> None:
        if is_open:
            self._open.set()
        else:
            self._open.clear()

    def _flip(self, data: bytes) -> bytes:
        hit = [at for at in self._flips if 0 <= at - self._count < len(data)]
        if not hit:
            return data
        changed = bytearray(data)
        for at in hit:
            changed[at - self._count] ^= self._flips.pop(at)
            self._flipped += 1
        return bytes(changed)


def call(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Result]) -> Result:
    """Do something in the proxy's thread and wait for its end."""
    return asyncio.run_coroutine_threadsafe(work, loop).result(CALL_TIMEOUT)
