# SPDX-License-Identifier: Apache-2.0
"""What moving by libvirt stands on: targets' halves of moves, and live migration."""

from typing import Protocol

from virtmigrate import model, node
from virtmigrate.drain.mover import Watch


class Far(Protocol):
    """What a target's own half of a move does, by whatever driver."""

    @property
    def node(self) -> node.Node:
        """The target, to look at."""
        ...

    def finish(self, record: model.Instance, operation: str, ticket: str) -> None:
        """Take the instance that was given."""

    def give_back(self, record: model.Instance, operation: str) -> None:
        """Give it back, if it came by this operation."""

    def settle(self) -> list[str]:
        """Finish what a failure left there; return what remains."""
        ...


class Forecast(Protocol):
    """What live migration expects of one move."""

    @property
    def memory(self) -> int: ...

    @property
    def seconds(self) -> float: ...

    @property
    def downtime(self) -> float: ...

    @property
    def obstacles(self) -> tuple[str, ...]: ...


class Outcome(Protocol):
    """How a live migration went."""

    @property
    def downtime(self) -> float: ...

    @property
    def bytes(self) -> int: ...


class Live(Protocol):
    """What moves guests that run on."""

    def forecast(self, uuid: str, dest: str) -> Forecast: ...

    def rehearse(self, uuid: str, dest: str) -> object: ...

    def demand_none(self, uuid: str) -> None: ...

    def migrate(self, uuid: str, dest: str, *, progress: Watch) -> Outcome: ...
