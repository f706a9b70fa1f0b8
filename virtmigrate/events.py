# SPDX-License-Identifier: Apache-2.0
"""Lifecycle events, by looking at the domains' states from time to time.

libvirt's own events need an event loop, which in a process that moves bytes lets
its receive queue grow without bound.
"""

import enum
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

import libvirt

from virtmigrate import errors, node

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
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, callback: Callable[[Event], object], interval: float) -> None:
        """Look every `interval` seconds; a second start replaces the first."""
        self.stop()
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run,
            args=(callback, interval, self._stop),
            name="virtmigrate-events",
            daemon=True,
        )
        self._thread.start()

    def stop(self) -> None:
        """End the thread; bounded by one look."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    # Private

    def _run(
        self,
        callback: Callable[[Event], object],
        interval: float,
        stop: threading.Event,
    ) -> None:
        before: dict[str, str] | None = None
        while not stop.is_set():
            try:
                now = self._look()
            except errors.Error as e:
                LOG.warning("looking for events: %s", e)
            else:
                _tell(callback, changes(now if before is None else before, now))
                before = now
            stop.wait(interval)

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
