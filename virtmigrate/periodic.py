# SPDX-License-Identifier: Apache-2.0
"""Something done from time to time, by a thread of its own."""

import threading
from collections.abc import Callable

from oslo_log import log as logging

LOG = logging.getLogger(__name__)


class Periodic:
    """Calls a function again and again. start() and stop() belong to one thread.

    What the function raises is logged, and it is called again all the same.

    Arguments:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, call: Callable[[], object], interval: float, first: float) -> None:
        """Call after `first` seconds, and then `interval` seconds after each end.

        A second start replaces the first.
        """
        self.stop()
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run,
            args=(call, interval, first, self._stop),
            name=self._name,
            daemon=True,
        )
        self._thread.start()

    def stop(self) -> None:
        """End the thread; bounded by one call."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    # Private

    @staticmethod
    def _run(
        call: Callable[[], object],
        interval: float,
        first: float,
        stop: threading.Event,
    ) -> None:
        wait = first
        while not stop.wait(wait):
            wait = interval
            try:
                call()
            except Exception:
                LOG.exception("%s", threading.current_thread().name)
