# SPDX-License-Identifier: Apache-2.0
"""Moves instances by libvirt, where no compute service owns them."""

import math
import time
from collections.abc import Callable, Mapping, Sequence

from oslo_log import log as logging

from virtmigrate import (
    census,
    draining,
    errors,
    model,
    node,
    peer,
    reservation,
)
from virtmigrate.drain import emptiness, ladder, link, values
from virtmigrate.drain.mover import Moved, Watch
from virtmigrate.drain.parts import Far, Live
from virtmigrate.drain.values import Prospect, Share, Way
from virtmigrate.instance import Power
from virtmigrate.migration import plan
from virtmigrate.migration.source import Source
from virtmigrate.model import InstanceState
from virtmigrate.progress import Progress
from virtmigrate.units import MiB

LOG = logging.getLogger(__name__)

_OVER = ("lost", "restored", "parked")
"""Newest steps of departures that the instance is not under way by."""

_NO_WAY = "this installation has no such way"

_LEFT = (InstanceState.AWAY, InstanceState.LEAVING)


class LibvirtMover:
    """A drain's mover. Safe to share between threads.

    Arguments:
        here: the host that is drained.
        source: its departures.
        connect: makes the Peer of a target.
        fars: the targets' halves, by name.
        live: what moves guests that run on; None where nothing does.
        owners: whose instances may be moved; those of a compute service move by its
            own mover.
    """

    def __init__(
        self,
        here: node.Node,
        source: Source,
        connect: Callable[[str], peer.Peer],
        fars: Mapping[str, Far],
        *,
        live: Live | None = None,
        owners: Sequence[str] = ("virtmigrate",),
    ) -> None:
        self._here = here
        self._source = source
        self._connect = connect
        self._fars = fars
        self._live = live
        self._owners = owners
        self._links: dict[str, float] = {}
        self._complaints: dict[str, str] = {}

    @property
    def host(self) -> str:
        return self._here.name

    # Hosts

    def targets(self) -> list[values.Target]:
        self._complaints = {}
        found = []
        for name in self._fars:
            try:
                found.append(self._target(name))
            except errors.Error as e:
                self._complaints[name] = str(e)
        return found

    def complaints(self) -> dict[str, str]:
        return dict(self._complaints)

    def close_host(self, rolling: str) -> None:
        draining.begin(self._here, "drained by the command", rolling)

    def settle(self) -> None:
        for name, far in self._fars.items():
            try:
                for left in far.settle():
                    LOG.warning("host=%s is left with %s", name, left)
            except errors.Error as e:
                LOG.warning("host=%s could not be settled: %s", name, e)

    def leftovers(self, gone: Sequence[str]) -> values.Leftovers:
        return emptiness.leftovers(self._here, self._source, gone)

    # Instances

    def instances(self) -> list[values.Instance]:
        domains = dict(self._here.domains.all())
        under_way = self._under_way()
        found = []
        for record in census.records(self._here).values():
            if record.host == self.host and record.state is not InstanceState.GONE:
                found.append(self._instance(record, domains, under_way))
        known = {instance.uuid for instance in found}
        found += [
            self._stranger(uuid, name)
            for uuid, name in domains.items()
            if uuid not in known
        ]
        return sorted(found, key=lambda each: each.uuid)

    def prospects(
        self, instance: values.Instance, target: str, ways: Sequence[Way]
    ) -> list[Prospect]:
        return [self._prospect(instance, target, way) for way in ways]

    def is_under_way(self, uuid: str) -> bool:
        if uuid in self._under_way():
            return True
        if self._live is not None:
            try:
                self._live.demand_none(uuid)
            except errors.InvalidState:
                return True
        return False

    def kept(self, uuid: str) -> str:
        volumes = [v for each in self._here.up() for v in each.retired(uuid)]
        return f"{len(volumes)} retired volumes" if volumes else ""

    # Moves

    def move(
        self, instance: values.Instance, target: str, way: Way, watch: Watch
    ) -> Moved:
        if way is Way.LIVE:
            return self._move_live(instance, target, watch)
        if way not in (Way.COLD, Way.OFFLINE):
            raise _missing(instance, way)
        return self._move_cold(instance, target, watch)

    def rehearse_live(self, uuid: str, target: str) -> None:
        """Do all of a live move but the migration itself, and undo it."""
        if self._live is None:
            raise errors.WayMissing(instance=uuid, way="live", reason=_NO_WAY)
        self._live.rehearse(uuid, target)

    def rehearse_cold(self, instance: values.Instance, target: str) -> None:
        """Move an instance there, have it run, and take it back.

        Raises what a move and a revert raise; a revert may then be left to do.
        """
        ticket = self._source.migrate(self._request(instance, target), Progress())
        self._finish(instance, target, ticket)
        power = self._fars[target].node.domains.power(instance.uuid)
        self.take_back(instance.uuid)
        if power is not Power.RUNNING:
            raise errors.InvalidState(
                instance=instance.uuid,
                host=target,
                state=power.value,
                reason="it should run there",
            )

    def take_back(self, uuid: str) -> None:
        """Have an instance here again that is on its way by a cold move, if one is.

        Raises what a revert raises; InvalidState when it went to none of the targets.
        """
        for operation, moved, dest, step in self._source.open_operations():
            if moved == uuid and step not in _OVER:
                if dest not in self._fars:
                    raise errors.InvalidState(
                        instance=uuid,
                        host=self.host,
                        state=step,
                        reason=f"its move to {dest} is open",
                    )
                record = self._here.instances.read(uuid).body
                self._fars[dest].give_back(record, operation)
                self._source.revert(uuid)

    def stop(self, instance: values.Instance) -> None:
        waits = self._here.options
        with self._here.claimed(instance.uuid):
            self._here.domains.stop(
                instance.uuid, waits.shutdown_timeout, waits.shutdown_retry_interval
            )

    # Private

    def _target(self, name: str) -> values.Target:
        there, far = self._connect(name), self._fars[name]
        draining.demand_open(there.mailbox, name)
        card = there.card()
        peer.agree(card)
        reserve = self._here.options.drain_memory_reserve_mib * MiB
        there_now = filter(_is_runnable, census.records(far.node).values())
        apart = [g for each in there_now if each.host == name for g in each.apart]
        if name not in self._links:
            self._links[name] = link.measure(there, card)
        return values.Target(
            name=name,
            memory=max(0, _free_memory(far.node) - reserve),
            rooms=tuple(
                Share(backend=each.name, size=there.left(each))
                for each in card.backends
            ),
            groups=tuple(sorted(apart)),
        )

    def _instance(
        self,
        record: model.Instance,
        domains: Mapping[str, str],
        under_way: Mapping[str, str],
    ) -> values.Instance:
        uuid, obstacle = record.uuid, ""
        power = self._here.domains.power(uuid).value if uuid in domains else "off"
        if record.owner not in self._owners:
            obstacle = f"it belongs to {record.owner}: drain by its own commands"
        elif uuid in under_way or record.state in _LEFT:
            obstacle = (
                f"a move to {under_way.get(uuid) or record.peer} is open: confirm or "
                "revert it"
            )
        elif power not in ("running", "paused", "off"):
            obstacle = f"it is {power}: resume it, or turn it off"
        words = record.policy or self._here.options.drain_policy
        return values.Instance(
            uuid=uuid,
            name=record.name,
            power=power,
            memory=record.memory,
            policy=ladder.read(words),
            apart=record.apart,
            obstacle=obstacle,
        )

    def _stranger(self, uuid: str, name: str) -> values.Instance:
        return values.Instance(
            uuid=uuid,
            name=name,
            power=self._here.domains.power(uuid).value,
            memory=0,
            policy=ladder.read(self._here.options.drain_policy),
            obstacle=f"it has no record: `virtmigrate instance adopt {uuid}`",
        )

    def _under_way(self) -> dict[str, str]:
        """Return where instances go whose departure is not over, by UUID."""
        found = self._source.open_operations()
        return {uuid: dest for _, uuid, dest, step in found if step not in _OVER}

    def _prospect(self, instance: values.Instance, target: str, way: Way) -> Prospect:
        if way in (Way.COLD, Way.OFFLINE):
            return self._prospect_cold(instance, target, way)
        if way is Way.LIVE and self._live is not None:
            return self._prospect_live(self._live, instance, target)
        reason = f"{way.value} migration is not available in this installation"
        return Prospect(target=target, way=way, obstacle=reason)

    def _prospect_live(
        self, live: Live, instance: values.Instance, target: str
    ) -> Prospect:
        found = live.forecast(instance.uuid, target)
        if found.obstacles:
            reason = "; ".join(found.obstacles)
            return Prospect(target=target, way=Way.LIVE, obstacle=reason)
        # Its disks need the same room there, and are sent beside its memory.
        disks = self._prospect_cold(instance, target, Way.COLD)
        return Prospect(
            target=target,
            way=Way.LIVE,
            bytes=found.memory + disks.bytes,
            seconds=_sum(found.seconds, disks.seconds),
            downtime=_sum(found.downtime),
            disks=disks.disks,
        )

    def _prospect_cold(
        self, instance: values.Instance, target: str, way: Way
    ) -> Prospect:
        """Plan a cold move as the move itself does; nothing is touched by that."""
        try:
            made = plan.make(
                self._here, self._connect(target), self._request(instance, target)
            )
        except errors.MigrationRefused as e:
            return Prospect(target=target, way=way, obstacle=str(e))
        sent = [v for v in made.transfer.volumes if not v.shared and not v.held]
        count = sum(reservation.sent_size(volume) for volume in sent)
        rate = self._links.get(target, 0.0)
        seconds = round(count / rate, 1) if rate else None
        return Prospect(
            target=target,
            way=way,
            bytes=count,
            seconds=seconds,
            downtime=0.0 if way is Way.OFFLINE else seconds,
            disks=tuple(Share(backend=v.backend, size=v.room) for v in sent),
        )

    def _request(self, instance: values.Instance, target: str) -> plan.Request:
        waits = self._here.options
        return plan.Request(
            instance=instance.uuid,
            dest=target,
            request="drain",
            timeout=waits.shutdown_timeout,
            retry_interval=waits.shutdown_retry_interval,
        )

    def _move_live(self, instance: values.Instance, target: str, watch: Watch) -> Moved:
        if self._live is None:
            raise _missing(instance, Way.LIVE)
        done = self._live.migrate(instance.uuid, target, progress=watch)
        return Moved(downtime=done.downtime, sent=done.bytes)

    def _move_cold(self, instance: values.Instance, target: str, watch: Watch) -> Moved:
        ran = instance.power == Power.RUNNING.value
        ticket = self._source.migrate(self._request(instance, target), watch)
        watch.bound = True
        self._finish(instance, target, ticket)
        stopped = watch.stopped if ran else None
        downtime = None if stopped is None else round(time.monotonic() - stopped, 3)
        kept = ""
        try:
            self._source.confirm(instance.uuid)
        except errors.Error as e:
            kept = str(e)
        return Moved(downtime=downtime, sent=watch.sent, kept=kept)

    def _finish(self, instance: values.Instance, target: str, ticket: str) -> None:
        record = self._here.instances.read(instance.uuid).body
        operations = self._source.open_operations()
        operation = next(
            (
                op
                for op, uuid, _, step in operations
                if uuid == instance.uuid and step not in _OVER
            ),
            "",
        )
        try:
            self._fars[target].finish(record, operation, ticket)
        except errors.Error as e:
            raise errors.NotArrived(
                instance=instance.uuid, operation=operation, peer=target, reason=e
            ) from e


# Private


def _missing(instance: values.Instance, way: Way) -> errors.WayMissing:
    return errors.WayMissing(
        instance=instance.uuid,
        way=way.value,
        reason=_NO_WAY,
    )


def _sum(*seconds: float | None) -> float | None:
    """Return the sum of times; None where one is not known, or has no end."""
    known = [each for each in seconds if each is not None and math.isfinite(each)]
    return round(sum(known), 1) if len(known) == len(seconds) else None


def _is_runnable(record: model.Instance) -> bool:
    return record.state in (InstanceState.HERE, InstanceState.ARRIVED)


def _free_memory(there: node.Node) -> int:
    """Return the memory of a host that no guest may take, running or not yet there."""
    with there.host.session("asking for its memory") as session:
        total = int(session.conn.getInfo()[1]) * MiB
        active = session.conn.listAllDomains(1)
        return total - sum(int(domain.info()[1]) * 1024 for domain in active)
