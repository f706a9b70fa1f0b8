# SPDX-License-Identifier: Apache-2.0
"""What each instance could do, and what is going to be done: before anything moves.

Every instance is looked at towards every target, as its move would do it, so what a
plan says is what the moves check again. Asked for in as many threads as moves run.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from virtmigrate import errors
from virtmigrate.drain import ladder, packing
from virtmigrate.drain.mover import Mover
from virtmigrate.drain.values import (
    Instance,
    Item,
    Line,
    Plan,
    Prospect,
    Target,
    Way,
)

_RUNS = ("running", "paused")


@dataclass
class _Seen:
    """What was found out about one instance."""

    instance: Instance
    open: dict[str, tuple[Prospect, ...]] = field(default_factory=dict)
    """Rungs, by target."""
    obstacles: dict[str, str] = field(default_factory=dict)
    """Why there are none, by target."""


class Preflight:
    """Looks at a host's instances. Not safe to share between threads.

    Arguments:
        mover: what would move them.
        order: how they are distributed.
        threads: how many are looked at at once.
    """

    def __init__(
        self,
        mover: Mover,
        order: packing.Order = packing.Order.FILL,
        threads: int = 2,
    ) -> None:
        self._mover = mover
        self._order = order
        self._threads = threads

    def plan(
        self,
        only: Mapping[str, str] | None = None,
        refused: Mapping[str, tuple[str, ...]] | None = None,
    ) -> Plan:
        """Return what is to be done.

        Arguments:
            only: these instances and no others, each to the target that it names;
                "" means any.
            refused: targets that failed an instance, by UUID.
        """
        targets = self._mover.targets()
        wanted = [
            instance
            for instance in self._mover.instances()
            if only is None or instance.uuid in only
        ]
        with ThreadPoolExecutor(self._threads, "drain-look") as pool:
            seen = list(pool.map(lambda each: self._look(each, targets), wanted))
        going = [each for each in seen if each.open]
        items = [_item(each, targets, only or {}, refused or {}) for each in going]
        packed = packing.pack(items, targets, self._order)
        places = {placed.uuid: placed.target for placed in packed.placed}
        lines = [self._line(each, places, packed.left) for each in seen]
        return Plan(
            host=self._mover.host,
            targets=tuple(targets),
            lines=tuple(sorted(lines, key=_rank)),
        )

    # Private

    def _look(self, instance: Instance, targets: list[Target]) -> _Seen:
        seen = _Seen(instance)
        moving = [w for w in ladder.ways(instance) if w not in (Way.STOP, Way.LEAVE)]
        if instance.obstacle or not moving:
            return seen
        for target in targets:
            try:
                found = self._mover.prospects(instance, target.name, moving)
            except errors.Error as e:
                seen.obstacles[target.name] = str(e)
                continue
            rungs = ladder.rungs(instance, found)
            if any(rung.target for rung in rungs):
                seen.open[target.name] = rungs
            else:
                obstacles = [f"{p.way.value}: {p.obstacle}" for p in found]
                seen.obstacles[target.name] = "; ".join(obstacles)
        return seen

    def _line(
        self, seen: _Seen, places: Mapping[str, str], left: Mapping[str, str]
    ) -> Line:
        instance = seen.instance
        target = places.get(instance.uuid)
        if target is not None:
            return Line(instance=instance, target=target, rungs=seen.open[target])
        if end := ladder.end(instance):
            reason = instance.obstacle if end.way is Way.STOP else ""
            return Line(instance=instance, target="", rungs=(end,), blocked=reason)
        reason = instance.obstacle or self._reason(seen, left)
        return Line(instance=instance, target="", rungs=(), blocked=reason)

    def _reason(self, seen: _Seen, left: Mapping[str, str]) -> str:
        """Return why an instance can go to none of the targets."""
        reasons = [left[seen.instance.uuid]] if seen.instance.uuid in left else []
        for target, obstacle in seen.obstacles.items():
            reasons.append(f"{target}: {obstacle}")
        for target, complaint in self._mover.complaints().items():
            reasons.append(f"{target}: {complaint}")
        return "; ".join(reasons) or "there is no host to go to"


# Private


def _item(
    seen: _Seen,
    targets: list[Target],
    only: Mapping[str, str],
    refused: Mapping[str, tuple[str, ...]],
) -> Item:
    instance = seen.instance
    failed = refused.get(instance.uuid, ())
    closed = [t.name for t in targets if t.name not in seen.open or t.name in failed]
    bound = only.get(instance.uuid, "")
    return Item(
        uuid=instance.uuid,
        memory=instance.memory if instance.power in _RUNS else 0,
        elsewhere={name: rungs[0].disks for name, rungs in seen.open.items()},
        apart=instance.apart,
        refused=tuple(closed),
        only=(bound,) if bound else (),
    )


def _rank(line: Line) -> tuple[int, float, int, str]:
    """Return what sorts lines: long moves first, so that the end is not waited for.

    What runs goes before what is off, and what stays comes last.
    """
    if not line.target:
        return 2, 0.0, 0, line.instance.uuid
    first = line.rungs[0]
    group = 1 if first.way is Way.OFFLINE else 0
    return group, -(first.seconds or 0.0), -first.bytes, line.instance.uuid
