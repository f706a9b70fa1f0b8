# SPDX-License-Identifier: Apache-2.0
"""The account of a transfer: where its bytes went, and what it waited for."""

import collections
import dataclasses
import enum
import operator
import threading
import time
import types
from collections.abc import Callable
from dataclasses import dataclass

from virtmigrate.units import format_bytes


class Wait(enum.Enum):
    """What a transfer's threads spend their time on; the value is its short name."""

    SOURCE = "source"
    """Reading the source."""
    HASHING = "cpu"
    """Digests, and the search for zeros."""
    NETWORK = "network"
    """Sending, and waiting for the acknowledgement of what was sent."""
    LIMIT = "limit"
    """Holding back, by a bandwidth limit."""
    PEER = "peer"
    """The peer's own work: requests to it, and its verifying."""


# As callers write them: account.NETWORK.
SOURCE = Wait.SOURCE
HASHING = Wait.HASHING
NETWORK = Wait.NETWORK
LIMIT = Wait.LIMIT
PEER = Wait.PEER

_FIELDS = {
    Wait.SOURCE: "source",
    Wait.HASHING: "hashing",
    Wait.NETWORK: "network",
    Wait.LIMIT: "limit",
    Wait.PEER: "peer",
}
_BOTTLENECKS = {
    Wait.SOURCE: "the source is the limit",
    Wait.HASHING: "the processor is the limit",
    Wait.NETWORK: "the network is the limit",
    Wait.LIMIT: "the bandwidth limit holds it back",
    Wait.PEER: "the peer is the limit",
}
_ALWAYS_TOLD = (Wait.SOURCE, Wait.NETWORK, Wait.PEER)
_WORTH_TELLING = 0.05  # seconds


@dataclass(frozen=True)
class Figures:
    """One look at an account. Figures of work done one after the other add up.

    Times of waiting are those in which at least one thread waited for it, so none
    is longer than the whole, and together they may be.
    """

    read: int = 0
    """Bytes read from the source."""
    skipped: int = 0
    """Bytes of holes and zeros that were not sent."""
    matched: int = 0
    """Bytes that were not sent because the peer provably had them."""
    sent: int = 0
    """Bytes sent, each counted once."""
    resent: int = 0
    """Bytes sent again: what was not acknowledged, or arrived wrong."""
    verified: int = 0
    """Bytes whose copy was read and compared."""
    source: float = 0.0
    """Seconds of reading the source."""
    hashing: float = 0.0
    """Seconds of hashing."""
    network: float = 0.0
    """Seconds of sending and of waiting for acknowledgements."""
    limit: float = 0.0
    """Seconds held back by a bandwidth limit."""
    peer: float = 0.0
    """Seconds of waiting for the peer's verification and answers."""
    wall: float = 0.0
    """Seconds from the beginning to this look."""

    def __add__(self, other: "Figures") -> "Figures":
        return Figures(*map(operator.add, _values(self), _values(other)))

    @property
    def total(self) -> int:
        """Bytes that are settled in one way or another."""
        return self.sent + self.matched + self.skipped

    @property
    def rate(self) -> float:
        """Bytes sent per second, those sent again included."""
        return (self.sent + self.resent) / self.wall if self.wall > 0 else 0.0

    @property
    def bottleneck(self) -> Wait | None:
        """What took longest; None when nothing was waited for."""
        longest = max(Wait, key=self.waited)
        return longest if self.waited(longest) > 0 else None

    def waited(self, kind: Wait) -> float:
        """Return the seconds of one kind."""
        return float(getattr(self, _FIELDS[kind]))

    def summary(self) -> str:
        """Return all of it in one line, for the log."""
        told = [
            f"{kind.value} {self.waited(kind):.1f} s"
            for kind in Wait
            if kind in _ALWAYS_TOLD or self.waited(kind) >= _WORTH_TELLING
        ]
        line = (
            f"sent {format_bytes(self.sent)} of {format_bytes(self.total)} "
            f"({self._rest()}) in {self.wall:.1f} s, {format_bytes(self.rate)}/s; "
            f"waited {', '.join(told)}"
        )
        found = self.bottleneck
        return f"{line}: {_BOTTLENECKS[found]}" if found else line

    # Private

    def _rest(self) -> str:
        parts = [
            f"matched {format_bytes(self.matched)}",
            f"zeros {format_bytes(self.skipped)}",
        ]
        if self.resent:
            parts.append(f"resent {format_bytes(self.resent)}")
        if self.verified:
            parts.append(f"verified {format_bytes(self.verified)}")
        return ", ".join(parts)


class Account:
    """Collects the figures of one transfer while it runs.

    Safe to share between threads. Its clock runs from its making on.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._lock = threading.Lock()
        self._merged = Figures()
        self._counted = collections.Counter[str]()
        self._stretches = {kind: _Stretch() for kind in Wait}
        self._mine = _Mine()

    def add(
        self,
        *,
        read: int = 0,
        skipped: int = 0,
        matched: int = 0,
        sent: int = 0,
        resent: int = 0,
        verified: int = 0,
    ) -> None:
        """Count bytes; called once per chunk. See Figures."""
        with self._lock:
            counted = self._counted
            counted["read"] += read
            counted["skipped"] += skipped
            counted["matched"] += matched
            counted["sent"] += sent
            counted["resent"] += resent
            counted["verified"] += verified

    def merge(self, other: Figures) -> None:
        """Take over bytes and waits of another account; the time stays our own."""
        with self._lock:
            self._merged += dataclasses.replace(other, wall=0.0)

    def waiting(self, kind: Wait) -> "Waiting":
        """Return what counts the time of a `with` block as waiting.

        In a block within a block only the inner one's time runs.
        """
        return Waiting(self, self._stretches[kind])

    def figures(self) -> Figures:
        """Return the figures as they are now; waits that go on are counted."""
        with self._lock:
            now = self._clock()
            waits = {kind: each.seconds(now) for kind, each in self._stretches.items()}
            return self._merged + Figures(
                **self._counted,
                source=waits[SOURCE],
                hashing=waits[HASHING],
                network=waits[NETWORK],
                limit=waits[LIMIT],
                peer=waits[PEER],
                wall=now - self._began,
            )

    def summary(self) -> str:
        """Return the figures in one line, for the log."""
        return self.figures().summary()

    # For Waiting

    def enter(self, stretch: "_Stretch") -> None:
        """Let this thread wait for something else than before."""
        stack = self._mine.stack
        with self._lock:
            now = self._clock()
            if stack:
                stack[-1].leave(now)
            stretch.enter(now)
        stack.append(stretch)

    def leave(self) -> None:
        """End this thread's latest wait and let the one around it go on."""
        stack = self._mine.stack
        stretch = stack.pop()
        with self._lock:
            now = self._clock()
            stretch.leave(now)
            if stack:
                stack[-1].enter(now)


class Waiting:
    """One `with` block in which a thread waits."""

    __slots__ = ("_account", "_stretch")

    def __init__(self, account: Account, stretch: "_Stretch") -> None:
        self._account = account
        self._stretch = stretch

    def __enter__(self) -> None:
        self._account.enter(self._stretch)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self._account.leave()


# Private


_values = operator.attrgetter(*(field.name for field in dataclasses.fields(Figures)))


class _Mine(threading.local):
    """What this thread waits for, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[_Stretch] = []


class _Stretch:
    """The time in which at least one thread waits."""

    def __init__(self) -> None:
        self._threads = 0
        self._since = self._before = 0.0

    def enter(self, now: float) -> None:
        if not self._threads:
            self._since = now
        self._threads += 1

    def leave(self, now: float) -> None:
        self._threads -= 1
        if not self._threads:
            self._before += now - self._since

    def seconds(self, now: float) -> float:
        return self._before + (now - self._since if self._threads else 0.0)
