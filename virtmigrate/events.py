# SPDX-License-Identifier: Apache-2.0
"""Lifecycle events, by looking at the domains' states from time to time.

libvirt's own events need an event loop, which in a process that moves bytes lets
its receive queue grow without bound.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass

import libvirt
from oslo_log import log as logging

from virtmigrate import errors, node, periodic

LOG = logging.getLogger(__name__)


class Kind(enum.Enum):
    STARTED = "started"
    STOPPED = "stopped"
    PAUSED = "paused"
    RESUMED = "resumed"


@dataclass(frozen=True)
class Event:
    """An instance was seen to have changed."""

    uuid: str
    kind: Kind


class Poller:
    """Calls back with events from a thread of its own.

    Arguments:
        here: returns the host.
    """

    def __init__(self, here: Callable[[], node.Node]) -> None:
        self._here = here
        self._periodic = periodic.Periodic("virtmigrate-events")
        self._before: dict[str, str] | None = None

    def start(self, callback: Callable[[Event], object], interval: float) -> None:
        """Look every `interval` seconds; a second start replaces the first."""
        self.stop()
        self._before = None
        self._periodic.start(lambda: self._compare(callback), interval, first=0)

    def stop(self) -> None:
        """End the thread; bounded by one look."""
        self._periodic.stop()

    # Private

    def _compare(self, callback: Callable[[Event], object]) -> None:
        try:
            now = self._look()
        except errors.Error as e:
            LOG.warning("looking for events: %s", e)
            return
        before = now if self._before is None else self._before
        self._before = now
        _tell(callback, changes(before, now))

    def _look(self) -> dict[str, str]:
        with self._here().host.session("looking for events") as session:
            return {
                domain.UUIDString(): _STATES.get(domain.state()[0], "on")
                for domain in session.conn.listAllDomains(0)
            }


_STATES = {
    libvirt.VIR_DOMAIN_SHUTOFF: "off",
    libvirt.VIR_DOMAIN_CRASHED: "off",
    libvirt.VIR_DOMAIN_PAUSED: "paused",
}

_KINDS = {
    ("off", "on"): Kind.STARTED,
    ("off", "paused"): Kind.PAUSED,
    ("on", "off"): Kind.STOPPED,
    ("paused", "off"): Kind.STOPPED,
    ("on", "paused"): Kind.PAUSED,
    ("paused", "on"): Kind.RESUMED,
}


def _tell(callback: Callable[[Event], object], events: list[Event]) -> None:
    for event in events:
        try:
            callback(event)
        except Exception:
            # The thread must outlive it: it is the only one that looks.
            LOG.exception("telling of %s", event)


def changes(before: dict[str, str], now: dict[str, str]) -> list[Event]:
    """Return what happened between two looks; a domain that is gone stopped."""
    found = []
    for uuid in sorted({*before, *now}):
        kind = _KINDS.get((before.get(uuid, "off"), now.get(uuid, "off")))
        if kind is not None:
            found.append(Event(uuid, kind))
    return found
