# SPDX-License-Identifier: Apache-2.0
"""A SIGKILL at every step of a change of snapshots: the tree is the old or the new one.

`make test` takes a share of the changes, each killed at one point; --full takes all
points of all of them, or a --part.
"""

import json
import random
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from tests.functional import guestdisk
from tests.functional.conftest import World
from tests.functional.test_kills import settings
from virtmigrate import consistency
from virtmigrate.snapshot import Kind, Memory, Place, Return, Wanted

SEED = 20
"""Chooses the points that `make test` kills at."""

Tree = dict[str, int]
"""By name what each snapshot holds."""


@dataclass(frozen=True)
class Outcome:
    """What may be found afterwards."""

    tree: Tree
    current: int
    """What the disk holds."""
    power: str
    """As libvirt calls it."""


@dataclass(frozen=True)
class Change:
    """One change, and what comes before it."""

    before: tuple[object, ...]
    """Bytes that are written; snapshots that are taken, or gone back to; "paused" or
    "off"."""
    action: object
    """A snapshot to be taken, or to be gone back to; or whose deletion is asked for;
    the target of a disk that is to stand alone."""
    outcomes: tuple[Outcome, ...]
    """The old state, what may lie between, the new state."""


def outside(name: str) -> Wanted:
    return Wanted(name, kind=Kind.CHECKPOINT, memory=Memory.EXTERNAL)


def inside(name: str, memory: Memory = Memory.INTERNAL) -> Wanted:
    places = {"vda": Place.INTERNAL}
    return Wanted(name, kind=Kind.CHECKPOINT, memory=memory, places=places)


def taken(wanted: Wanted, state: str = "") -> Change:
    """Take one over another one."""
    power = {"": "running", "off": "shutoff"}.get(state, state)
    return Change(
        (1, Wanted("a"), 2, *filter(None, [state])),
        wanted,
        (Outcome({"a": 1}, 2, power), Outcome({"a": 1, wanted.name: 2}, 2, power)),
    )


def returned(wanted: Wanted, back: Return, state: str, now: str) -> Change:
    """Go back to one over another one."""
    tree = {"a": 1, wanted.name: 2}
    return Change(
        (1, Wanted("a"), 2, wanted, 3, *filter(None, [state])),
        back,
        (
            Outcome(tree, 3, {"": "running", "off": "shutoff"}.get(state, state)),
            Outcome(tree, 2, now),
        ),
    )


def deleted(name: str, state: str = "", **options: bool) -> Change:
    """Delete one of three."""
    power = {"": "running", "off": "shutoff"}[state]
    tree = {"a": 1, "b": 2, "c": 3}
    left = {key: value for key, value in tree.items() if key != name}
    if options:
        left = {"a": 1}
    return Change(
        (1, Wanted("a"), 2, Wanted("b"), 3, Wanted("c"), 4, *filter(None, [state])),
        {"key": name, **options},
        (Outcome(tree, 4, power), Outcome(left, 4, power)),
    )


def flattened(state: str = "") -> Change:
    """Have the active layer stand alone; nothing else changes."""
    power = {"": "running", "off": "shutoff"}[state]
    outcome = Outcome({"a": 1, "b": 2}, 3, power)
    before = (1, Wanted("a"), 2, Wanted("b"), 3, *filter(None, [state]))
    return Change(before, "vda", (outcome,))


def branched(wanted: Wanted, state: str = "") -> Change:
    """Go on from one beside what there is, which is kept: both, or neither."""
    power = {"": "running", "off": "shutoff"}.get(state, state)
    tree = {"a": 1, wanted.name: 2}
    then = "running" if wanted.kind is Kind.CHECKPOINT else power
    return Change(
        (1, Wanted("a"), 2, wanted, 3, *filter(None, [state])),
        Return(wanted.name, keep="kept"),
        (
            Outcome(tree, 3, power),
            Outcome({**tree, "kept": 3}, 2, then),
        ),
    )


INSIDE_OFF = Wanted("b", places={"vda": Place.INTERNAL})

CHANGES = {
    "create": taken(Wanted("b")),
    "create-paused": taken(Wanted("b"), "paused"),
    "create-off": taken(Wanted("b"), "off"),
    "create-memory": taken(outside("b")),
    "create-memory-paused": taken(outside("b"), "paused"),
    "create-inside": taken(inside("b")),
    "create-inside-paused": taken(inside("b"), "paused"),
    "create-inside-off": taken(INSIDE_OFF, "off"),
    "create-inside-saved": taken(inside("b", Memory.EXTERNAL)),
    "create-inside-saved-paused": taken(inside("b", Memory.EXTERNAL), "paused"),
    "revert": returned(Wanted("b"), Return("b"), "", "running"),
    "revert-off": returned(Wanted("b"), Return("b"), "off", "shutoff"),
    "revert-start": returned(
        Wanted("b"), Return("b", power="running"), "off", "running"
    ),
    "revert-memory": returned(outside("b"), Return("b"), "", "running"),
    "revert-memory-paused": returned(
        outside("b"), Return("b", power="paused"), "off", "paused"
    ),
    "revert-inside": returned(inside("b"), Return("b"), "", "running"),
    "revert-inside-off": returned(inside("b"), Return("b", power="off"), "", "shutoff"),
    "revert-inside-saved": returned(
        inside("b", Memory.EXTERNAL), Return("b", power="paused"), "", "paused"
    ),
    "delete-top": deleted("c"),
    "delete-middle": deleted("b"),
    "delete-first": deleted("a"),
    "delete-off": deleted("b", "off"),
    "delete-top-off": deleted("c", "off"),
    "delete-children": deleted("a", children=True, itself=False),
    "delete-shared": Change(
        (1, Wanted("a"), 2, Wanted("b"), Return("a"), 3, Wanted("c"), 4),
        {"key": "b"},
        (
            Outcome({"a": 1, "b": 2, "c": 3}, 4, "running"),
            Outcome({"a": 1, "c": 3}, 4, "running"),
        ),
    ),
    "delete-inside": Change(
        (1, Wanted("a"), 2, inside("b"), 3),
        {"key": "b"},
        (Outcome({"a": 1, "b": 2}, 3, "running"), Outcome({"a": 1}, 3, "running")),
    ),
    "revert-keep-children": Change(
        (1, Wanted("a"), 2, Wanted("b"), 3),
        Return("a", keep="kept", delete_children=True),
        (
            Outcome({"a": 1, "b": 2}, 3, "running"),
            Outcome({"a": 1, "kept": 3}, 1, "running"),
        ),
    ),
    "flatten": flattened(),
    "flatten-off": flattened("off"),
    "branch": branched(Wanted("b")),
    "branch-off": branched(Wanted("b"), "off"),
    "branch-memory": branched(outside("b")),
    "branch-inside": branched(inside("b")),
    "branch-inside-paused": branched(inside("b"), "paused"),
    "branch-inside-off": Change(
        (1, Wanted("a"), 2, "off", INSIDE_OFF, "on", 3, "off"),
        Return("b", keep="kept"),
        (
            Outcome({"a": 1, "b": 2}, 3, "shutoff"),
            Outcome({"a": 1, "b": 2, "kept": 3}, 2, "shutoff"),
        ),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.timeout(3600)
def test_killed(world: World, request: pytest.FixtureRequest, name: str) -> None:
    count = run(world, CHANGES[name], 0)
    assert count >= 5
    part, parts = map(int, request.config.getoption("--part").split("/"))
    points = [point for point in range(1, count + 1) if point % parts == part]
    if not request.config.getoption("--full"):
        points = [random.Random(f"{SEED}{name}").randint(1, count)]
    for point in points:
        try:
            run(world, CHANGES[name], point)
        except BaseException as e:
            e.add_note(f"killed at point {point} of {count}: {name}")
            raise


# Private


def run(world: World, change: Change, point: int) -> int:
    """Kill at a point, recover as a compute service would, and check."""
    instance = world.spawn(world.a)
    for step in change.before:
        do(world, instance, step)
    result = run_killed(world, instance, change.action, point)
    # How often a pivot has to be tried is not the same each time.
    assert result.returncode in ((0, -signal.SIGKILL) if point else (0,)), result.stderr
    world.a.new_driver()
    assert world.a.driver.settle() == []
    check(world, instance, change, is_whole=result.returncode == 0)
    world.a.driver.destroy(None, instance, None)
    assert world.a.files() == []
    return int(result.stdout or 0)


def do(world: World, instance: Any, step: object) -> None:
    snapshots = world.a.driver.snapshots
    if isinstance(step, int):
        guestdisk.write(world.a, instance, step)
    elif isinstance(step, Wanted):
        snapshots.create(instance.uuid, step)
    elif isinstance(step, Return):
        snapshots.revert(instance.uuid, step)
    elif step == "on":
        world.a.driver.power_on(None, instance, None)
    else:
        guestdisk.power(world.a, instance, str(step))


def run_killed(
    world: World, instance: Any, action: object, point: int
) -> "subprocess.CompletedProcess[str]":
    kinds = {Wanted: "create", Return: "revert", dict: "delete", str: "flatten"}
    plan = {
        "node": settings(world.a),
        "instance": instance.uuid,
        "action": {kinds[type(action)]: msgspec.to_builtins(action)},
        "point": point,
    }
    path = world.tmp / "plan.json"
    path.write_text(json.dumps(plan))
    argv = [sys.executable, "-m", "tests.functional.killed_snapshot", str(path)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60)


def check(world: World, instance: Any, change: Change, *, is_whole: bool) -> None:
    a, uuid = world.a, instance.uuid
    snapshots = a.driver.snapshots
    tree, _ = snapshots.all(uuid)
    names = [each.name for each in tree]
    current, power = guestdisk.byte(world, instance), a.state_of(instance)
    possible = change.outcomes[-1:] if is_whole else change.outcomes
    fitting = [
        each
        for each in possible
        if (set(names), current, power) == (set(each.tree), each.current, each.power)
    ]
    assert fitting, (names, current, power)
    assert consistency.check(a.driver.node) == []
    assert leftovers(world, instance) == set()
    for each in tree:
        # Starting a guest takes longer than all else.
        power = "off" if each.memory is Memory.NONE else ""
        snapshots.revert(uuid, Return(each.name, power=power))
        assert guestdisk.byte(world, instance) == fitting[0].tree[each.name]


def leftovers(world: World, instance: Any) -> set[str]:
    """Return the volumes that no disk and no snapshot needs."""
    here = world.a.driver.node
    found = here.entitled(instance.uuid)
    needed = {ref.volume for ref in found.disks}
    needed |= {disk.volume for each in found.snapshots for disk in each.disks}
    needed |= {each.memory_volume for each in found.snapshots}
    owned = {s.name for s in here.files.catalog.all() if s.body.owner == instance.uuid}
    below = {v.name for name in needed & owned for v in here.files.chain(name)[1:]}
    return owned - needed - below
