# SPDX-License-Identifier: Apache-2.0
"""What a drain asks of whatever moves instances.

Libvirt directly, where no compute service owns them; else only the service's own API,
so that its allocations, ports and attachments follow.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from virtmigrate import errors, progress
from virtmigrate.drain import values


@dataclass(frozen=True)
class Moved:
    """A move that arrived."""

    downtime: float | None = None
    """Seconds; None where it is not known, or the guest never stood."""
    sent: int = 0
    """Bytes that crossed the network."""
    kept: str = ""
    """Why the copy here could not be given up; "" when it was."""


class Watch(progress.Progress):
    """Follows one try, and ends it when its time is over or somebody wants that.

    Safe to share between threads. Once bound it lets the move finish: it was handed
    over.

    Arguments:
        abort: set when moves that run are to be ended.
        seconds: how long the try may take.
    """

    def __init__(self, abort: threading.Event, seconds: float) -> None:
        super().__init__(self._hear)
        self.late = False
        """It was ended because its time was over."""
        self.stopped: float | None = None
        """When the guest was stopped, by time.monotonic()."""
        self.bound = False
        self._abort = abort
        self._deadline = time.monotonic() + seconds

    def check(self) -> None:
        if self.bound:
            return
        super().check()
        if self._abort.is_set():
            raise errors.Cancelled
        if time.monotonic() > self._deadline:
            self.late = True
            raise errors.Cancelled

    # Private

    def _hear(self, report: progress.Report) -> None:
        if report.phase == "stopping" and self.stopped is None:
            self.stopped = time.monotonic()


class Mover(Protocol):
    """Moves the instances of one host. Safe to share between threads."""

    @property
    def host(self) -> str:
        """The name of the host that is drained."""
        ...

    def targets(self) -> list[values.Target]:
        """Return the hosts to move to, as they are now.

        One that cannot be asked, or takes nothing, is left out; see complaints().
        """
        ...

    def complaints(self) -> dict[str, str]:
        """Return why hosts were left out by the newest targets()."""
        ...

    def instances(self) -> list[values.Instance]:
        """Return all instances of the host, also those that cannot go."""
        ...

    def prospects(
        self, instance: values.Instance, target: str, ways: Sequence[values.Way]
    ) -> list[values.Prospect]:
        """Return what is to be expected of ways to a target; nothing is moved."""
        ...

    def move(
        self, instance: values.Instance, target: str, way: values.Way, watch: Watch
    ) -> Moved:
        """Move an instance, and give the copy here up; goes on with one that was begun.

        Raises MigrationRefused, MigrationRolledBack, WayMissing: it is here as it was.
        MigrationUndecided, NotArrived: it is between the hosts.
        """
        ...

    def stop(self, instance: values.Instance) -> None:
        """Shut an instance down and leave it here; nothing happens when it is off."""
        ...

    def is_under_way(self, uuid: str) -> bool:
        """Tell whether a move of an instance is begun here and not over."""
        ...

    def close_host(self, rolling: str) -> None:
        """Let nothing new come to the host from now on."""
        ...

    def kept(self, uuid: str) -> str:
        """Return what the host keeps of an instance that left, "" for nothing."""
        ...

    def settle(self) -> None:
        """Have what moves left behind at the targets cleared away, where that helps."""
        ...

    def leftovers(self, gone: Sequence[str]) -> values.Leftovers:
        """Return what the host still has.

        Arguments:
            gone: UUIDs of instances that should have nothing here any more.
        """
        ...
