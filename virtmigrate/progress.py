# SPDX-License-Identifier: Apache-2.0
"""How far long work is, for people who wait for it, and how they end it."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from virtmigrate import errors


@dataclass(frozen=True)
class Report:
    """One look at the work."""

    phase: str
    """checking, stopping, copying, verifying, handing over, ..."""
    done: int
    """Bytes of this phase that are through, holes counted."""
    total: int
    sent: int
    """Bytes that crossed the network in this operation."""
    rate: float
    """Bytes per second of this phase."""

    @property
    def left(self) -> float | None:
        """Seconds to the end of the phase, when that can be told."""
        return (self.total - self.done) / self.rate if self.rate > 0 else None


class Progress:
    """Counts bytes, tells a listener, and carries the wish to cancel.

    Safe to share between threads. The listener is called at most every
    `interval` seconds, and at each change of phase.
    """

    def __init__(
        self,
        listener: Callable[[Report], object] | None = None,
        *,
        interval: float = 0.2,
    ) -> None:
        self._listener = listener
        self._interval = interval
        self._cancelled = threading.Event()
        self._lock = threading.Lock()
        self._phase = ""
        self._done = self._total = self.sent = 0
        self._began = self._told = 0.0

    def cancel(self) -> None:
        """Ask the work to stop; it raises Cancelled at its next chunk."""
        self._cancelled.set()

    def check(self) -> None:
        """Raise Cancelled if somebody asked for it."""
        if self._cancelled.is_set():
            raise errors.Cancelled

    def phase(self, name: str, total: int = 0) -> None:
        """Begin a phase of `total` bytes; a wish to cancel ends the work here, too."""
        self.check()
        self._phase, self._total, self._done = name, total, 0
        self._began = time.monotonic()
        self._tell()

    def advance(self, done: int, *, sent: int = 0) -> None:
        """Count bytes; called once per chunk."""
        self.check()
        with self._lock:
            self._done += done
            self.sent += sent
            if time.monotonic() - self._told < self._interval:
                return
            self._told = time.monotonic()
        self._tell()

    def uncancelled(self) -> "Progress":
        """Return one that is told of the same way, and cannot be cancelled."""
        return Progress(self._listener, interval=self._interval)

    def report(self) -> Report:
        """Return where the work is."""
        seconds = time.monotonic() - self._began
        rate = self._done / seconds if seconds > 0 else 0.0
        return Report(self._phase, self._done, self._total, self.sent, rate)

    # Private

    def _tell(self) -> None:
        self._told = time.monotonic()
        if self._listener is not None:
            self._listener(self.report())
