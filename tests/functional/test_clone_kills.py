# SPDX-License-Identifier: Apache-2.0
"""A SIGKILL at every step of making clones, and of detaching one.

Afterwards each clone is whole, or nothing of it is there; the source goes on, and is
what it was. `make test` takes few points of some cases; --full takes all, or a --part.
"""

import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.functional import cloneworld, guestdisk
from tests.functional.conftest import World
from tests.functional.test_kills import settings
from virtmigrate import consistency
from virtmigrate.model import CloneState

SEED = 20
FEW = {"live": 2, "detach": 1}
"""Points of a case that `make test` kills at; other cases are run with --full."""

Run = Callable[[World, int], int]


def points(request: pytest.FixtureRequest, name: str, count: int) -> list[int]:
    found = list(range(1, count + 1))
    part, parts = map(int, request.config.getoption("--part").split("/"))
    if request.config.getoption("--full"):
        return [point for point in found if point % parts == part]
    return sorted(random.Random(f"{SEED}{name}").sample(found, FEW[name]))


@pytest.mark.parametrize("name", ["live", "off", "one-fails", "detach", "detach-off"])
@pytest.mark.timeout(3600)
def test_killed(world: World, request: pytest.FixtureRequest, name: str) -> None:
    if name not in FEW and not request.config.getoption("--full"):
        pytest.skip("with --full")
    world.a.overrides = {"enable_live_clone": True}
    world.a.new_driver()
    run = detached if name.startswith("detach") else cloned
    count = run(world, name, 0)
    assert count > 10
    for point in points(request, name, count):
        try:
            run(world, name, point)
        except BaseException as e:
            e.add_note(f"killed at point {point} of {count}: {name}")
            raise


# Private


def cloned(world: World, name: str, point: int) -> int:
    """Two clones, or one of two, or none."""
    a, source = world.a, cloneworld.dummy(world, mac=cloneworld.MAC)
    guestdisk.write(a, source, 7, 0)
    if name == "off":
        a.driver.power_off(source)
    twins = cloneworld.new(2)
    fails = [twins[0].name] if name == "one-fails" else []
    made = [vars(each) for each in twins]
    result = run_killed(
        world, point, {"instance": source.uuid, "new": made, "fails": fails}
    )
    power = "shutoff" if name == "off" else "running"
    assert a.state_of(source) == power
    there = [each for each in twins if a.state_of(each) is not None]
    if not result.returncode:
        assert there == (twins[1:] if fails else twins)
    for each in there:
        found = a.driver.node.entitled(each.uuid).cloned
        assert found is not None
        assert found.state is CloneState.READY
        assert a.state_of(each) == power
        assert guestdisk.byte(world, each, 0) == 7
    assert guestdisk.byte(world, source, 0) == 7
    assert a.driver.snapshots.all(source.uuid) == ((), None)
    return gone(world, result, [source, *there])


def detached(world: World, name: str, point: int) -> int:
    """A clone that stands on its own, or can still be made to."""
    a, source = world.a, cloneworld.dummy(world)
    guestdisk.write(a, source, 7, 0)
    a.driver.clones.identities = cloneworld.Fake()
    twins = cloneworld.new(1)
    a.driver.clone(None, source, twins)
    if name == "detach-off":
        a.driver.power_off(twins[0])
    result = run_killed(world, point, {"detach": twins[0].uuid})
    if result.returncode:
        assert guestdisk.byte(world, twins[0], 0) == 7
        a.driver.clones.detach(twins[0].uuid)
    assert a.driver.clones.lenders(twins[0].uuid) == set()
    a.driver.destroy(None, source)
    assert guestdisk.byte(world, twins[0], 0) == 7
    power = "shutoff" if name == "detach-off" else "running"
    assert a.state_of(twins[0]) == power
    assert len(disks(world)) == 1
    return gone(world, result, twins)


def run_killed(
    world: World, point: int, action: dict[str, Any]
) -> "subprocess.CompletedProcess[str]":
    """Kill at a point, and recover as a compute service would."""
    node = settings(world.a)
    node["values"] |= {"enable_live_clone": True, "receiver": False}
    path = world.tmp / "plan.json"
    path.write_text(json.dumps({"node": node, "point": point, **action}))
    argv = [sys.executable, "-m", "tests.functional.killed_clone", str(path)]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    # How often a job is looked at is not the same each time.
    assert result.returncode in ((0, -signal.SIGKILL) if point else (0,)), result.stderr
    world.a.new_driver()
    assert world.a.driver.settle() == []
    assert list((world.a.state / "clones").glob("*")) == []
    return result


def disks(world: World) -> list[str]:
    return [name for name in world.a.files() if name.startswith("disks/")]


def gone(
    world: World, result: "subprocess.CompletedProcess[str]", instances: list[Any]
) -> int:
    """Nothing is left that nobody owns; return how many points there were."""
    a = world.a
    assert consistency.check(a.driver.node) == []
    assert [name for name in a.files() if "memory" in name] == []
    for each in instances:
        a.driver.destroy(None, each)
    assert a.files() == []
    return int(result.stdout or 0)
