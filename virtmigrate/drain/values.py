# SPDX-License-Identifier: Apache-2.0
"""What a drain is about: instances, hosts, ways, a plan, and how it ended.

Sizes are bytes, times seconds. All of it can be written as JSON.
"""

import enum

import msgspec

from virtmigrate.schema import Struct


class Way(enum.Enum):
    """How an instance leaves a host; the words of its policy."""

    LIVE = "live"
    """It goes on running, and stands still for a moment only."""
    POSTCOPY = "postcopy"
    """Live, and its last memory is fetched when it runs there already: it always
    ends, and a network that fails meanwhile costs the guest its memory."""
    COLD = "cold"
    """It is shut down, and started there; with send_ahead its disks go before."""
    OFFLINE = "offline"
    """It is off, and stays so: nobody notices. No policy needs to name it."""
    STOP = "stop"
    """It is shut down, and stays here."""
    LEAVE = "leave"
    """Nothing is done with it."""


MOVING = (Way.LIVE, Way.POSTCOPY, Way.COLD, Way.OFFLINE)
"""Ways that bring an instance to another host."""

POLICY = (Way.LIVE, Way.POSTCOPY, Way.COLD, Way.STOP, Way.LEAVE)
"""Ways that a policy may name."""


class Share(Struct, frozen=True):
    """Bytes of one backend."""

    backend: str
    size: int


class Target(Struct, frozen=True):
    """A host that instances may come to."""

    name: str
    memory: int
    """Bytes that guests may still take."""
    rooms: tuple[Share, ...] = ()
    """What its backends have left."""
    groups: tuple[str, ...] = ()
    """Groups of instances that are there and are to be apart, once for each."""


class Item(Struct, frozen=True):
    """An instance as far as it has to be placed."""

    uuid: str
    memory: int
    """Bytes that it takes while it runs; 0 of one that is off."""
    disks: tuple[Share, ...] = ()
    """What it takes of backends."""
    elsewhere: dict[str, tuple[Share, ...]] = msgspec.field(default_factory=dict)
    """The same at hosts where it is otherwise, by their names."""
    apart: tuple[str, ...] = ()
    """Groups of which it is a member."""
    refused: tuple[str, ...] = ()
    """Hosts that cannot take it."""
    only: tuple[str, ...] = ()
    """Hosts that it may go to; none named: all."""

    def needs(self, host: str) -> tuple[Share, ...]:
        """Return what it takes of the backends of a host."""
        return self.elsewhere.get(host, self.disks)


class Placement(Struct, frozen=True):
    """Where an instance goes."""

    uuid: str
    target: str


class Packing(Struct, frozen=True):
    """Where instances go, in the order that they were placed; and which cannot."""

    placed: tuple[Placement, ...]
    left: dict[str, str]
    """Why an instance has no place, by UUID."""


class Instance(Struct, frozen=True):
    """An instance of the host that is drained."""

    uuid: str
    name: str
    power: str
    """running, paused, off, saved or crashed."""
    memory: int
    policy: tuple[Way, ...]
    """The ladder: what is tried first stands first."""
    apart: tuple[str, ...] = ()
    obstacle: str = ""
    """Why it cannot go anywhere by any way; "" when it may."""


class Prospect(Struct, frozen=True):
    """What is to be expected of one way to one host."""

    target: str
    """ "" for ways that lead nowhere."""
    way: Way
    obstacle: str = ""
    """Why it is not open; "" when it is."""
    bytes: int = 0
    """What has to be sent at most."""
    seconds: float | None = None
    """By the measured link; None where that is not known, or has no end."""
    downtime: float | None = None
    """Of its guest, at most; None as with `seconds`."""
    disks: tuple[Share, ...] = ()
    """What it takes of the target's backends."""


class Line(Struct, frozen=True):
    """What a plan says of one instance."""

    instance: Instance
    target: str
    """ "" when it stays."""
    rungs: tuple[Prospect, ...]
    """Ways that its policy names and that are open, in their order."""
    blocked: str = ""
    """Why it stays, unless its policy wants it to."""


class Plan(Struct, frozen=True):
    """What a drain is going to do, in this order."""

    host: str
    targets: tuple[Target, ...]
    lines: tuple[Line, ...]

    @property
    def blocked(self) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if line.blocked)


class Outcome(enum.Enum):
    """What became of an instance."""

    MOVED = "moved"
    """It is at the target, confirmed; nothing of it is needed here any more."""
    ARRIVED = "arrived"
    """It is at the target; its copy here could not be given up."""
    STOPPED = "stopped"
    """It is off, and here, as its policy wants."""
    LEFT = "left"
    """It is here as it was, as its policy wants."""
    STAYED = "stayed"
    """It is here as it was, and should have gone."""
    UNDECIDED = "undecided"
    """It is between two hosts, and started nowhere."""
    CANCELLED = "cancelled"
    """It is here as it was: somebody ended the drain."""


GOOD = (Outcome.MOVED, Outcome.STOPPED, Outcome.LEFT)


class Result(Struct, frozen=True):
    """How it went with one instance."""

    uuid: str
    name: str
    outcome: Outcome
    way: Way | None = None
    """The last one that was tried."""
    target: str = ""
    seconds: float = 0.0
    downtime: float | None = None
    """From its stop to its start there; None where it never stood, or that is not
    known, because a killed process began it."""
    sent: int = 0
    tries: int = 0
    reason: str = ""
    """Why it is not where it should be; also what failed before a later way."""


class Leftovers(Struct, frozen=True):
    """What a host that should be empty still has."""

    domains: tuple[str, ...] = ()
    """Names of domains that are defined or run."""
    running: tuple[str, ...] = ()
    """Of these, those that run."""
    processes: tuple[str, ...] = ()
    """Programs that have files of this host's own storage open."""
    operations: tuple[str, ...] = ()
    """Moves that are not over, from here or to here, and debts."""
    leases: tuple[str, ...] = ()
    """Instances whose disks in shared storage are still this host's."""

    @property
    def is_empty(self) -> bool:
        return not (self.domains or self.is_busy)

    @property
    def is_busy(self) -> bool:
        """Tell whether anything here would notice that the host goes down."""
        return bool(self.running or self.processes or self.operations)

    def texts(self) -> list[str]:
        """Return what there is as a person reads it."""
        parts = {
            "domains": self.domains,
            "guests that run": self.running,
            "programs with open disks": self.processes,
            "open operations": self.operations,
            "leases": self.leases,
        }
        return [f"{what}: {', '.join(found)}" for what, found in parts.items() if found]


class Report(Struct, frozen=True):
    """How a drain ended."""

    host: str
    began: float
    """Seconds since the epoch; so is `ended`."""
    ended: float
    results: tuple[Result, ...]
    leftovers: Leftovers
    cancelled: bool = False

    def count(self, *outcomes: Outcome) -> int:
        return sum(result.outcome in outcomes for result in self.results)

    @property
    def is_done(self) -> bool:
        """Tell whether all went as it should, and the host may go down."""
        return (
            all(result.outcome in GOOD for result in self.results)
            and not self.leftovers.is_busy
        )


class Trial(Struct, frozen=True):
    """How the rehearsal of one way to one target went."""

    target: str
    way: Way
    seconds: float
    failed: str = ""
    """Why it did not work; "" when it did."""


class Return(Struct, frozen=True):
    """How one instance comes back."""

    uuid: str
    name: str
    at: str
    """The host where it is."""
    way: Way
    """As it went."""
    bytes: int
    """What is sent at most."""
    base: str = ""
    """What is here of it, so that only what changed is sent; "" when all is."""


class ReturnPlan(Struct, frozen=True):
    """How instances come back to a host that was drained."""

    host: str
    made: float
    """Seconds since the epoch."""
    entries: tuple[Return, ...]
