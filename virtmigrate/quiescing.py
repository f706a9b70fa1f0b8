# SPDX-License-Identifier: Apache-2.0
"""Guests that somebody else has frozen, between two calls.

For who snapshots their disks elsewhere. The limit of a freeze holds all the same: a
guest whose caller never comes back is thawed by then.
"""

import contextlib
import threading

from virtmigrate import agent, errors


class Quiescing:
    """The guests of one process that are frozen. Safe to share between threads."""

    def __init__(self, agents: agent.Agents, host: str) -> None:
        self._agents = agents
        self._host = host
        self._lock = threading.Lock()
        self._held: dict[str, contextlib.ExitStack] = {}

    def freeze(self, uuid: str) -> None:
        """Freeze a guest's file systems until thaw(); raises as Agents.frozen()."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._agents.frozen(uuid))
            with self._lock:
                if uuid not in self._held:
                    self._held[uuid] = stack.pop_all()

    def thaw(self, uuid: str) -> None:
        """Thaw a guest.

        Raises QuiesceFailed when it was not frozen all the time, or not by freeze():
        what was made meanwhile is not consistent.
        """
        with self._lock:
            stack = self._held.pop(uuid, None)
        if stack is None:
            raise errors.QuiesceFailed(
                instance=uuid,
                host=self._host,
                reason="nobody has it frozen in this process",
                state="What froze it in another one has thawed it by now",
            )
        stack.close()

    def close(self) -> None:
        """Thaw all."""
        while self._held:
            with contextlib.suppress(errors.QuiesceFailed, KeyError):
                self.thaw(next(iter(self._held)))
