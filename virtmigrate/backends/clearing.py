# SPDX-License-Identifier: Apache-2.0
"""Removed volumes are wiped in the background, one after the other."""

import threading
from collections.abc import Callable

from oslo_log import log as logging

from virtmigrate import errors

LOG = logging.getLogger(__name__)


class Clearing:
    """Volumes that wait to be wiped, and the thread that does it.

    Nothing of it lasts: records say which volumes are doomed, and who starts adds
    them again. Safe to share between threads.

    Arguments:
        clear: wipes a volume and deletes it; can be called again.
    """

    def __init__(self, clear: Callable[[str], None]) -> None:
        self._clear = clear
        self._names: dict[str, None] = {}
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()

    def add(self, name: str) -> None:
        """Have a volume wiped; nothing happens when it waits already."""
        with self._changed:
            self._names[name] = None
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, name="clearing", daemon=True
                )
                self._thread.start()

    def wait(self, timeout: float) -> bool:
        """Wait until none is left; False when `timeout` seconds are over."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._names, timeout)

    def close(self) -> None:
        """Forget those that wait; the one in work ends with its connection."""
        with self._changed:
            self._names.clear()
            self._changed.notify_all()

    # Private

    def _work(self) -> None:
        while (name := self._next()) is not None:
            try:
                self._clear(name)
            except errors.Error as e:
                LOG.warning("volume=%s stays until the next settle: %s", name, e)
            except Exception:
                LOG.exception("volume=%s stays until the next settle", name)
            finally:
                self._done(name)

    def _next(self) -> str | None:
        with self._changed:
            name = next(iter(self._names), None)
            if name is None:
                self._thread = None
            return name

    def _done(self, name: str) -> None:
        with self._changed:
            self._names.pop(name, None)
            self._changed.notify_all()
