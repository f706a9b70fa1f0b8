# SPDX-License-Identifier: Apache-2.0
"""The peer's half of a move, as the command has it done.

By the peer's own driver, asked through its receiver, where that accepts moves. Else
by a driver in this process, bound to the peer's URI: with a read-write connection,
and locks that the peer's own service does not know.
"""

from typing import Protocol

from oslo_log import log as logging

from virtmigrate import model, node
from virtmigrate.driver import VirtMigrateDriver
from virtmigrate.migration import target
from virtmigrate.peer import Peer

LOG = logging.getLogger(__name__)


class Half(Protocol):
    """What the peer does in a move."""

    @property
    def node(self) -> node.Node:
        """The peer, to look at."""
        ...

    def finish(self, record: model.Instance, operation: str, ticket: str) -> None:
        """Take the instance that was given."""

    def give_back(self, record: model.Instance, operation: str) -> None:
        """Give it back, if it came by this operation."""

    def settle(self) -> list[str]:
        """Finish what a failure left there; return what remains."""
        ...


class Asked:
    """The peer's own driver does it."""

    def __init__(self, peer: Peer, looked_at: node.Node) -> None:
        self._peer = peer
        self.node = looked_at

    def finish(self, record: model.Instance, operation: str, ticket: str) -> None:
        self._peer.finish(operation)

    def give_back(self, record: model.Instance, operation: str) -> None:
        self._peer.give_back(operation)

    def settle(self) -> list[str]:
        # It settles by itself, at its time.
        return []


class Driven:
    """A driver of this process does it."""

    def __init__(self, driver: VirtMigrateDriver) -> None:
        self._driver = driver

    @property
    def node(self) -> node.Node:
        return self._driver.node

    def finish(self, record: model.Instance, operation: str, ticket: str) -> None:
        self._driver.finish_migration(None, None, record, ticket)

    def give_back(self, record: model.Instance, operation: str) -> None:
        # Not destroy(): that would remove an instance that is not this move's.
        with self._driver.node.claimed(record.uuid):
            target.Target(self._driver.node).give_back(record.uuid)

    def settle(self) -> list[str]:
        return self._driver.settle()
