# SPDX-License-Identifier: Apache-2.0
"""Limits of bandwidth: how many bytes may go, and when.

A limiter keeps one virtual clock: the moment up to which its bandwidth is
promised away. Who wants to send reserves the next slot on it, as long as the
bytes take at the limit's rate, and waits for the slot's end. So callers go in the
order in which they asked, and none has to wake another.

A slot may begin in the past, if nobody used that time: up to BURST seconds, or
as long as the slot itself. That lets a caller catch up with what it spent on
sending; it is also all that may go at once after a rest. A limiter that is new
has nothing saved up.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

BURST = 0.05
"""Seconds of unused bandwidth that are kept, for chunks shorter than that."""

LOOK = 0.1
"""Seconds between two looks at whether the work was cancelled."""

SHORT = 0.001
"""Seconds that nobody waits for: the debt stays, and a later chunk pays it."""

Check = Callable[[], object]


class Clock(Protocol):
    """The time that a limiter lives in."""

    def now(self) -> float:
        """Return seconds since some moment; they never go back."""
        ...

    def wait(self, seconds: float) -> None:
        """Return about so many seconds later."""
        ...


class RealClock:
    """The machine's monotonic clock."""

    def __init__(self) -> None:
        self._never = threading.Event()

    def now(self) -> float:
        return time.monotonic()

    def wait(self, seconds: float) -> None:
        self._never.wait(seconds)


REAL = RealClock()


class Limiter:
    """Bytes per second that all of its users together may send.

    Safe to share between threads: one for a transfer, or for a host's transfers
    of this process.

    Arguments:
        rate: bytes per second; 0 for no limit.
    """

    def __init__(self, rate: int, clock: Clock = REAL) -> None:
        if rate < 0:
            raise ValueError(f"a limit of {rate} bytes per second")
        self.rate = rate
        self.clock = clock
        self._lock = threading.Lock()
        self._promised = clock.now()

    def take(self, count: int, check: Check) -> None:
        """Wait until count bytes may go.

        Arguments:
            check: raises what ends the waiting, as Progress.check does; called
                at least every 0.2 s. The bytes then count as not sent.
        """
        if self.rate:
            _take((self,), count, check)

    def reserve(self, count: int) -> float:
        """Take the next slot for count bytes and return the time of its end."""
        length = count / self.rate
        with self._lock:
            earliest = self.clock.now() - max(BURST, length)
            self._promised = max(self._promised, earliest) + length
            return self._promised

    def give_back(self, count: int) -> None:
        """Let others have the bandwidth of count reserved bytes."""
        with self._lock:
            self._promised -= count / self.rate


class Limits:
    """Several limiters on one clock that all hold, as a transfer's and its host's.

    Safe to share between threads.
    """

    def __init__(self, *limiters: Limiter) -> None:
        self._limiters = tuple(each for each in limiters if each.rate)

    def take(self, count: int, check: Check) -> None:
        """Wait until count bytes may go by each limit; see Limiter.take()."""
        if self._limiters:
            _take(self._limiters, count, check)


# Private


def _take(limiters: Sequence[Limiter], count: int, check: Check) -> None:
    # All are reserved before any is waited for: a caller that waits for its own
    # limit does not hold up others at the host's.
    due = max([each.reserve(count) for each in limiters])
    try:
        _wait(due, limiters[0].clock, check)
    except BaseException:
        for each in limiters:
            each.give_back(count)
        raise


def _wait(due: float, clock: Clock, check: Check) -> None:
    left = due - clock.now()
    while left > SHORT:
        check()
        clock.wait(min(left, LOOK))
        left = due - clock.now()
