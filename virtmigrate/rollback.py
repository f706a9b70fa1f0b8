# SPDX-License-Identifier: Apache-2.0
"""Undo what was done, newest first, when a later step fails."""

import contextlib
from collections.abc import Callable
from types import TracebackType

from oslo_log import log as logging

LOG = logging.getLogger(__name__)


class Rollback:
    """Collects undo steps; leaving by an exception runs them, newest first.

    A step that fails is logged and kept in `failed`, and the others still run:
    the first error is the one that the caller sees.
    """

    def __init__(self) -> None:
        self._steps: list[tuple[str, Callable[[], object]]] = []
        self.failed: list[str] = []

    def __enter__(self) -> "Rollback":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.run()

    def add(self, what: str, undo: Callable[[], object]) -> None:
        """Add how to undo the step that was just done."""
        self._steps.append((what, undo))

    def commit(self) -> None:
        """Forget all steps: what was done stays."""
        self._steps.clear()

    def run(self) -> None:
        """Undo now, newest first."""
        while self._steps:
            what, undo = self._steps.pop()
            with contextlib.ExitStack() as stack:
                stack.callback(LOG.debug, "undo: %s", what)
                try:
                    undo()
                except Exception as e:
                    LOG.exception("undo failed: %s", what)
                    self.failed.append(f"{what}: {e}")
