# SPDX-License-Identifier: Apache-2.0
"""When a migration stalls, and what is done about it, in this order.

1. The downtime that is allowed is doubled, up to its limit; after each step it has
   `stall` seconds again.
2. The guest is paused, where that is wanted.
3. It is given up.
"""

import enum
from dataclasses import dataclass

_BEGINNING = 120.0
"""Seconds until the first byte: the peer starts a QEMU, and opens the disks."""


class Step(enum.Enum):
    """What is to be done now."""

    GO_ON = "go on"
    ALLOW = "allow more downtime"
    """`Pace.allowed` says how much."""
    PAUSE = "pause the guest"
    GIVE_UP = "give up"


@dataclass(frozen=True)
class Schedule:
    """Bounds of one migration; all in seconds."""

    downtime: float
    downtime_limit: float
    stall: float
    timeout: float
    pauses: bool = False
    """Pause the guest before giving up."""


class Pace:
    """Follows one migration. Not safe to share between threads.

    Arguments:
        now: when it began, by the clock that look() is called with.
    """

    def __init__(self, schedule: Schedule, now: float) -> None:
        self._schedule = schedule
        self._began = now
        self._since = now
        self._least: int | None = None
        self._is_paused = False
        self.allowed = schedule.downtime
        """Seconds of downtime."""
        self.reason = ""
        """Why it was given up."""

    def look(self, remaining: int, now: float) -> Step:
        """Say what is to be done.

        Arguments:
            remaining: bytes; 0 while nothing is known of them.
        """
        if now - self._began > self._schedule.timeout:
            self.reason = f"it took longer than {self._schedule.timeout:g} s"
            return Step.GIVE_UP
        if remaining and (self._least is None or remaining < self._least):
            self._least, self._since = remaining, now
        patience = self._schedule.stall
        if self._least is None:
            patience = max(patience, _BEGINNING)
        if now - self._since <= patience:
            return Step.GO_ON
        self._since = now
        if self._least is None:
            self.reason = f"nothing was sent for {patience:g} s"
            return Step.GIVE_UP
        return self._escalate()

    # Private

    def _escalate(self) -> Step:
        limit = self._schedule.downtime_limit
        if self.allowed < limit:
            self.allowed = min(2 * self.allowed, limit)
            return Step.ALLOW
        if self._schedule.pauses and not self._is_paused:
            self._is_paused = True
            return Step.PAUSE
        self.reason = (
            f"it stalled: never less than {self._least} bytes were left, with "
            f"{self.allowed:g} s of downtime allowed"
        )
        return Step.GIVE_UP
