# SPDX-License-Identifier: Apache-2.0
"""Deadlines for calls that cannot be interrupted.

A thread in a libvirt call sits in C until the peer answers. One thread for the
whole process watches all deadlines and cuts what is overdue from outside.
"""

import os
import threading
import time
from collections.abc import Callable

from oslo_log import log as logging

LOG = logging.getLogger(__name__)

Action = Callable[[], None]

# An action is repeated while its alarm is armed: what it has to cut may be
# replaced, as libvirt does when it tries a name's next address.
REPEAT = 0.1


class Alarm:
    """One deadline, armed by Watchdog.arm().

    touch() belongs to the thread that armed it.
    """

    def __init__(self, seconds: float, action: Action) -> None:
        self.seconds = seconds
        self.action = action
        self.due = time.monotonic() + seconds
        self.fired = False

    def touch(self) -> None:
        """Let the deadline start anew."""
        # No lock: a deadline that only moves away needs no earlier wake-up.
        self.due = time.monotonic() + self.seconds


class Watchdog:
    """Runs an alarm's action when its deadline passes. Safe to share."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all alarms: after a fork the thread is not there any more."""
        self._changed = threading.Condition()
        self._armed: set[Alarm] = set()
        self._wake = float("inf")
        self._thread: threading.Thread | None = None

    def arm(self, seconds: float, action: Action) -> Alarm:
        """Call action after seconds, unless disarm() comes first.

        Arguments:
            action: must not block; it runs in the watchdog's thread.
        """
        alarm = Alarm(seconds, action)
        with self._changed:
            self._armed.add(alarm)
            self._start()
            self._notify(alarm)
        return alarm

    def disarm(self, alarm: Alarm) -> None:
        """Take an alarm back; its action does not run once this returned."""
        with self._changed:
            self._armed.discard(alarm)

    def rearm(self, alarm: Alarm) -> None:
        """Let an alarm that was taken back start anew."""
        with self._changed:
            alarm.touch()
            self._armed.add(alarm)
            self._notify(alarm)

    # Private

    def _start(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(
                target=self._run, name="virtmigrate-watchdog", daemon=True
            )
            self._thread.start()

    def _notify(self, alarm: Alarm) -> None:
        if alarm.due < self._wake:
            self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while True:
                now = time.monotonic()
                self._ring(now)
                self._wake = min((each.due for each in self._armed), default=now + 3600)
                self._changed.wait(max(0.0, self._wake - now))

    def _ring(self, now: float) -> None:
        for alarm in self._armed:
            if alarm.due <= now:
                self._fire(alarm)
                alarm.due = now + REPEAT

    def _fire(self, alarm: Alarm) -> None:
        # First of all: whoever is woken by the action looks at it.
        again, alarm.fired = alarm.fired, True
        try:
            alarm.action()
        except Exception:
            if not again:
                LOG.exception("A deadline passed, and its action failed")


WATCHDOG = Watchdog()
os.register_at_fork(after_in_child=WATCHDOG.reset)
