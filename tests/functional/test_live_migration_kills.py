# SPDX-License-Identifier: Apache-2.0
"""A SIGKILL at every step of a live move: afterwards one guest, never two."""

import json
import random
import signal
import subprocess
import sys
from typing import Any

import pytest

from tests.functional import livehosts
from tests.functional.conftest import Node, World
from tests.functional.test_kills import settings
from virtmigrate.units import MiB

SEED = 20
"""Chooses the points that `make test` kills at; --full takes all of them."""

DURING = (0.05, 0.2, 0.5, 0.8, 1.2)
"""Seconds after libvirt was asked; on any machine some of them hit its work."""


@pytest.mark.parametrize("place", ["apart", "shared"])
@pytest.mark.timeout(3600)
def test_killed(
    world: World,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
    place: str,
) -> None:
    if place == "shared":
        world.share()
    livehosts.accept(world)
    count = Case(world).run(0)
    assert count > 20
    points = list(range(1, count + 1))
    during = list(DURING)
    part, parts = map(int, request.config.getoption("--part").split("/"))
    points = [point for point in points if point % parts == part]
    if not request.config.getoption("--full"):
        draw = random.Random(f"{SEED}{place}")
        # The last ones are those around the switch.
        points = [draw.choice(points[:-25]), *draw.sample(points[-25:], 2)]
        during = [draw.choice(during)]
    for point in points:
        Case(world).run(point)
    for seconds in during:
        Case(world).run(0, seconds)
    # Both hosts were there all the time: no guest was started anew.
    assert "its memory is lost" not in caplog.text


class Case:
    """One running instance, moved by a process that is killed."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._instance = world.spawn(world.a, world.image(2 * MiB))

    def run(self, point: int, during: float = 0.0) -> int:
        """Kill at a point, let both hosts settle, and check; return the points."""
        world, count = self._world, 0
        with livehosts.watching(world, self._instance) as watcher:
            result = self._run_killed(point, during)
            try:
                if point:
                    assert result.returncode == -signal.SIGKILL, result.stderr
                elif not during:
                    assert result.returncode == 0, result.stderr
                    count = int(result.stdout)
                if point or during:
                    for node in (world.a, world.b):
                        node.new_driver()
                self._check()
            except BaseException as e:
                e.add_note(f"killed at point {point}, or after {during} s")
                raise
        assert watcher.both == []
        return count

    # Private

    def _run_killed(
        self, point: int, during: float
    ) -> "subprocess.CompletedProcess[str]":
        world = self._world
        plan: dict[str, Any] = {
            **{name: live_settings(getattr(world, name)) for name in ("a", "b")},
            "instance": self._instance.uuid,
            "point": point,
            "during": during,
        }
        path = world.tmp / "plan.json"
        path.write_text(json.dumps(plan))
        argv = [sys.executable, "-m", "tests.functional.killed_live", str(path)]
        return subprocess.run(argv, capture_output=True, text=True, timeout=120)

    def _check(self) -> None:
        """One guest, that runs, and nothing that nobody owns."""
        world, instance = self._world, self._instance
        assert livehosts.settle(world, 5) == []
        states = [node.state_of(instance) for node in (world.a, world.b)]
        assert sorted(states, key=str) == [None, "running"]
        on = world.a if states[0] else world.b
        world.expect_one(instance, on)
        on.driver.destroy(None, instance)
        for node in (world.a, world.b):
            assert [n for n in node.files() if "mailbox" not in n] == []
            # One that is empty is of an operation that did nothing yet.
            left = (node.state / "journal").glob("*")
            assert [path for path in left if path.stat().st_size] == []


def live_settings(node: Node) -> dict[str, Any]:
    found = settings(node)
    found["values"]["accept_moves"] = True
    return found
