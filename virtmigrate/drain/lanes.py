# SPDX-License-Identifier: Apache-2.0
"""Whose turn it is: lines of a plan that wait until their target has a lane free."""

import threading
from collections import Counter
from collections.abc import Iterable

from virtmigrate.drain.values import Line


class Lanes:
    """Gives lines out, so many at once for each target. Safe to share.

    Arguments:
        lines: in the order of their turns; one whose target is busy is passed over
            until that is free.
        width: lines at once for one target.
    """

    def __init__(self, lines: Iterable[Line], width: int) -> None:
        self._waiting = list(lines)
        self._width = width
        self._busy: Counter[str] = Counter()
        self._changed = threading.Condition()

    def take(self) -> Line | None:
        """Return the next line, once there is a lane for it; None when none is left."""
        with self._changed:
            while self._waiting:
                for line in self._waiting:
                    if not line.target or self._busy[line.target] < self._width:
                        self._waiting.remove(line)
                        self._busy[line.target] += 1
                        return line
                self._changed.wait()
            return None

    def done(self, line: Line) -> None:
        """Give a line's lane to the next one."""
        with self._changed:
            self._busy[line.target] -= 1
            self._changed.notify_all()

    def close(self) -> list[Line]:
        """Give nothing out any more; return what was waiting."""
        with self._changed:
            left, self._waiting = self._waiting, []
            self._changed.notify_all()
            return left
