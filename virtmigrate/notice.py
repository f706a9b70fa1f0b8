# SPDX-License-Identifier: Apache-2.0
"""How a receiver notices that requests came.

By inotify, where this process may watch the mailbox's directory and the directory
is the one of this machine. Else by looking: seldom, and often while a transfer is
open. A directory that is watched is looked at now and then, too: inotify's queue
can overflow, and a directory can be made anew.
"""

import contextlib
import os
import select
import time
import types
from typing import Self

import inotify_simple
from oslo_log import log as logging

from virtmigrate import errors, storagepool

LOG = logging.getLogger(__name__)

_OPEN_INTERVAL = 0.2
"""Seconds between two looks while a transfer is open."""

_WATCHED_INTERVAL = 60.0
"""Seconds between two looks at a directory that is watched."""

_GAP = 0.02
"""Seconds between two looks at least, whatever happens in the directory."""

_FLAGS = inotify_simple.flags
_MASK = _FLAGS.CLOSE_WRITE | _FLAGS.MOVED_TO | _FLAGS.ONLYDIR
_LOST = _FLAGS.IGNORED | _FLAGS.UNMOUNT | _FLAGS.Q_OVERFLOW


class Notice:
    """Tells when to look for requests.

    wait() belongs to one thread, wake() to any.

    Arguments:
        pool: the mailbox's.
        suffix: of the names of requests; other changes are not noticed.
        interval: seconds between two looks where nothing can be watched.
    """

    def __init__(self, pool: storagepool.Pool, suffix: str, interval: float) -> None:
        self._pool = pool
        self._suffix = suffix
        self._interval = interval
        self._looked = self._tried = -float("inf")
        self._is_noticed = False
        self._inotify: inotify_simple.INotify | None = None
        self._wakeful = -1

    @property
    def is_watching(self) -> bool:
        return self._inotify is not None

    def __enter__(self) -> Self:
        self._wakeful = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._watch()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self._unwatch()
        wakeful, self._wakeful = self._wakeful, -1
        os.close(wakeful)

    def wake(self) -> None:
        """End a wait() at once."""
        # Who is left out when the last wait is over has nothing to wake.
        with contextlib.suppress(OSError, ValueError):
            os.eventfd_write(self._wakeful, 1)

    def wait(self, *, is_open: bool, limit: float) -> bool:
        """Wait until it is time to look, or woken, or for `limit` seconds.

        Arguments:
            is_open: requests are likely, because a transfer is open.

        Returns whether it is time to look.
        """
        due = self._looked + self._pause(is_open=is_open)
        deadline = min(due, time.monotonic() + limit)
        while True:
            if self._is_noticed:
                due = self._looked + _GAP
                deadline = min(due, deadline)
            left = deadline - time.monotonic()
            if left <= 0 or self._rest(left):
                break
        if time.monotonic() < due:
            return False
        if not self.is_watching:
            self._watch()
        self._is_noticed, self._looked = False, time.monotonic()
        return True

    # Private

    def _pause(self, *, is_open: bool) -> float:
        if self.is_watching:
            return _WATCHED_INTERVAL
        return min(_OPEN_INTERVAL, self._interval) if is_open else self._interval

    def _rest(self, seconds: float) -> bool:
        """Wait for anything to happen; True when somebody called wake()."""
        poll = select.poll()
        poll.register(self._wakeful, select.POLLIN)
        if self._inotify is not None:
            poll.register(self._inotify.fileno(), select.POLLIN)
        ready = [fd for fd, _ in poll.poll(seconds * 1000 + 1)]
        if self._inotify is not None and self._inotify.fileno() in ready:
            self._read(self._inotify)
        if self._wakeful not in ready:
            return False
        os.eventfd_read(self._wakeful)
        return True

    def _read(self, inotify: inotify_simple.INotify) -> None:
        for event in inotify.read(timeout=0):
            if event.mask & _LOST or event.name.endswith(self._suffix):
                self._is_noticed = True
            if event.mask & (_FLAGS.IGNORED | _FLAGS.UNMOUNT):
                LOG.warning("pool=%s: its directory is gone", self._pool.name)
                self._unwatch()

    def _watch(self) -> None:
        """Watch the directory if that is possible; what came before is noticed."""
        if time.monotonic() < self._tried + _WATCHED_INTERVAL:
            return
        self._tried = time.monotonic()
        inotify: inotify_simple.INotify | None = None
        try:
            if self._pool.is_local():
                inotify = inotify_simple.INotify()
                inotify.add_watch(self._pool.path, _MASK)
                self._inotify, self._is_noticed = inotify, True
        except (OSError, errors.Error) as e:
            LOG.debug("pool=%s is not watched: %s", self._pool.name, e)
            if inotify is not None:
                inotify.close()

    def _unwatch(self) -> None:
        if self._inotify is not None:
            self._inotify.close()
            self._inotify = None
