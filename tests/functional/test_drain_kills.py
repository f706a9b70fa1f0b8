# SPDX-License-Identifier: Apache-2.0
"""A SIGKILL at every step of a drain: the next one ends it, and nothing is twice."""

import json
import random
import signal
import subprocess
import sys
from typing import Any

import pytest

from tests.functional import test_kills
from tests.functional.conftest import Node, World
from virtmigrate.cli import halves
from virtmigrate.drain.values import Outcome
from virtmigrate.units import MiB

SEED = 20
"""Chooses the points that are killed at without --full."""

SHARE = 2


@pytest.mark.timeout(3600)
def test_killed(world: World, request: pytest.FixtureRequest) -> None:
    for node in (world.a, world.b):
        node.overrides = {
            "drain_memory_reserve_mib": 0,
            "drain_concurrency": 1,
            "drain_policy": ["cold"],
            "shutdown_timeout": 1,
        }
        node.new_driver()
    count = run(world, 0)
    assert count > 80
    part, parts = map(int, request.config.getoption("--part").split("/"))
    points = [point for point in range(1, count + 1) if point % parts == part]
    if not request.config.getoption("--full"):
        points = sorted(random.Random(SEED).sample(points, SHARE))
    for point in points:
        try:
            run(world, point)
        except BaseException as e:
            e.add_note(f"killed at point {point} of {count}")
            raise


def run(world: World, point: int) -> int:
    """Drain two guests, one that runs and one that is off; kill at a point."""
    runs, off = (world.spawn(world.a, world.image(2 * MiB)) for _ in range(2))
    world.a.driver.power_off(off)
    before = {each.uuid: world.a.disk(each).read_bytes() for each in (runs, off)}
    path = world.tmp / "plan.json"
    path.write_text(json.dumps(plan(world, point)))
    argv = [sys.executable, "-m", "tests.functional.killed_drain", str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    if point:
        assert done.returncode == -signal.SIGKILL, done.stderr
        for node in (world.a, world.b):
            node.new_driver()
        drain_again(world)
    else:
        assert done.returncode == 0, done.stderr
    for each, state in ((runs, "running"), (off, "shutoff")):
        assert world.a.state_of(each) is None
        assert world.b.state_of(each) == state
        assert world.b.disk(each).read_bytes() == before[each.uuid]
        world.b.driver.destroy(None, each)
    for node in (world.a, world.b):
        node.driver.stop_draining()
        assert node.driver.settle() == []
        assert node.files() == []
    return 0 if point else int(done.stdout)


def drain_again(world: World) -> None:
    """Drain as the operator would; all that is still there goes, once."""
    a, b = world.a.driver, world.b.driver
    mover = a.libvirt_mover({b.node.name: halves.Driven(b)})
    with a.drain(mover) as drain:
        report = drain.run()
    assert {each.outcome for each in report.results} <= {Outcome.MOVED}, report
    assert report.leftovers.is_empty, report.leftovers
    assert list((world.a.state / "drain").glob("*")) == []


def plan(world: World, point: int) -> dict[str, Any]:
    return {"a": settings(world.a), "b": settings(world.b), "point": point}


def settings(node: Node) -> dict[str, Any]:
    found = test_kills.settings(node)
    return {**found, "values": {**found["values"], **node.overrides}}
