# SPDX-License-Identifier: Apache-2.0
"""What is asked of a live migration, and what is said of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """What the caller wants; None takes what the configuration says."""

    bandwidth: int | None = None
    """Bytes per second at most; 0: no limit."""
    downtime: float | None = None
    """Seconds that the guest may stand still, to begin with."""
    timeout: float | None = None
    """Seconds until it is rolled back."""
    request: str = "-"
    """The caller's id of its request, for logs and records."""


@dataclass(frozen=True)
class Status:
    """One look at a migration that goes on."""

    total: int = 0
    remaining: int = 0
    """Bytes; what the guest writes meanwhile adds to what remains."""
    processed: int = 0
    """Bytes that were sent."""
    rate: float = 0.0
    """Bytes per second."""
    dirty_rate: float = 0.0
    """Bytes of memory per second that the guest writes to."""
    iteration: int = 0
    """Passes over the memory."""
    allowed: float = 0.0
    """Seconds of downtime that are allowed now."""

    @property
    def left(self) -> float | None:
        """Seconds to the end, when that can be told: it comes nearer."""
        gain = self.rate - self.dirty_rate
        return self.remaining / gain if gain > 0 else None

    @property
    def downtime(self) -> float | None:
        """Seconds that the guest would stand still if it was stopped now."""
        return self.remaining / self.rate if self.rate > 0 else None


@dataclass(frozen=True)
class Outcome:
    """A live migration that is done."""

    operation: str
    seconds: float
    """From its plan to the guest that goes on at the peer."""
    downtime: float
    """Seconds that the guest stood still: as QEMU measured it, and the switch."""
    bytes: int
    """That were sent, memory and disks."""


@dataclass(frozen=True)
class Forecast:
    """What a live migration would be, as far as can be told without doing it."""

    memory: int
    """Bytes."""
    dirty_rate: float
    """Bytes of memory per second that the guest writes to."""
    link: float
    """Bytes per second."""
    seconds: float
    downtime: float
    """Seconds; both are infinite where the guest writes as fast as the link."""
    obstacles: tuple[str, ...]
    """Why it is refused now; empty when it is not."""
