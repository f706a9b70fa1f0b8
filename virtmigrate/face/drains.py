# SPDX-License-Identifier: Apache-2.0
"""Emptying this host, and whether it takes new instances."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from virtmigrate import draining, errors, spawning
from virtmigrate.drain import (
    execution,
    libvirtmover,
    packing,
    parts,
    preflight,
    rehearsal,
    values,
)
from virtmigrate.drain.mover import Mover
from virtmigrate.face import base


class Drains(base.Base):
    """Empties one host."""

    def start_draining(self, reason: str = "") -> None:
        """Refuse new instances, and those that move here, until stop_draining()."""
        draining.begin(self.node, reason)

    def stop_draining(self) -> bool:
        """Take new instances again; return whether that was a change.

        Raises DrainRefused while the host is being drained: nothing changed.
        """
        with self._only():
            return draining.end(self.node)

    def is_draining(self) -> bool:
        return draining.is_draining(self.node.mailbox)

    def libvirt_mover(self, fars: Mapping[str, parts.Far]) -> libvirtmover.LibvirtMover:
        """Return what moves instances that no compute service owns.

        Arguments:
            fars: the other halves of the moves, by the targets' names.
        """
        live = getattr(self, "live", None)
        return libvirtmover.LibvirtMover(
            self.node, self._source, self.peer, fars, live=live
        )

    def drain_plan(
        self, mover: Mover, only: Mapping[str, str] | None = None
    ) -> values.Plan:
        """Return what a drain would do now; nothing is moved."""
        return self._preflight(mover).plan(only)

    def rehearse_drain(
        self, mover: libvirtmover.LibvirtMover, plan: values.Plan
    ) -> list[values.Trial]:
        """Try each way that a plan may use; no instance of it stands still."""
        spawner = spawning.Spawner(self.node, self.images)
        trying = rehearsal.Rehearsal(self.node, spawner, mover, self._destroy_ours)
        return trying.run(plan)

    @contextlib.contextmanager
    def drain(
        self,
        mover: Mover,
        listener: Callable[[values.Result], object] = lambda result: None,
    ) -> Iterator[execution.Drain]:
        """Be the one that empties this host; DrainRefused while another does.

        It is not closed by that: see start_draining().
        """
        options = self.node.options
        limits = execution.Limits(
            moves=options.drain_concurrency,
            per_target=options.drain_target_concurrency,
            tries=options.drain_tries,
            seconds=options.drain_move_timeout,
        )
        state = Path(options.state_path)
        with self._only():
            look = self._preflight(mover)
            yield execution.Drain(mover, look, state, limits, listener)

    # Private

    @contextlib.contextmanager
    def _only(self) -> Iterator[None]:
        with self.node.locks.only("drain") as ours:
            if not ours:
                raise errors.DrainRefused(
                    host=self.node.name, reason="another process drains it now"
                )
            yield

    def _destroy_ours(self, uuid: str) -> None:
        """Remove an instance that a rehearsal made."""
        with self.node.claimed(uuid):
            self.node.demand_settled(uuid)
            self.demand_at_rest(uuid)
            self.node.domains.kill(uuid)
            self.node.domains.undefine(uuid)
            self.node.remove_instance(uuid)

    def _preflight(self, mover: Mover) -> preflight.Preflight:
        options = self.node.options
        order = packing.Order(options.drain_order)
        return preflight.Preflight(mover, order, options.drain_concurrency)
