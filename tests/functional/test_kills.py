# SPDX-License-Identifier: Apache-2.0
"""A SIGKILL at every step of a move: afterwards exactly one usable instance."""

import json
import random
import signal
import subprocess
import sys
from typing import Any

import pytest

from tests.functional.conftest import Node, World
from virtmigrate import errors
from virtmigrate.units import MiB

SEED = 20
"""Chooses the points per case that `make test` kills at; --full takes all of them,
or a --part."""


@pytest.mark.parametrize("power", ["running", "paused", "off"])
@pytest.mark.parametrize("then", ["confirm", "revert"])
@pytest.mark.parametrize("place", ["apart", "shared"])
@pytest.mark.timeout(3600)
def test_killed(
    world: World, request: pytest.FixtureRequest, then: str, power: str, place: str
) -> None:
    if place == "shared":
        world.share()
    count = Case(world, then, power).run(0)
    assert count is not None and count > 50
    points = list(range(1, count + 1))
    part, parts = map(int, request.config.getoption("--part").split("/"))
    points = [point for point in points if point % parts == part]
    if not request.config.getoption("--full"):
        points = sorted(random.Random(f"{SEED}{then}{power}{place}").sample(points, 2))
    for point in points:
        Case(world, then, power).run(point)


class Case:
    """One instance, moved by a process that is killed."""

    def __init__(self, world: World, then: str, power: str) -> None:
        self._world = world
        self._then = then
        self._power = power
        self._instance = world.spawn(world.a, world.image(2 * MiB))
        if power == "paused":
            world.a.driver.pause(self._instance)
        if power == "off":
            world.a.driver.power_off(self._instance)
        self._before = world.a.disk(self._instance).read_bytes()

    def run(self, point: int) -> int | None:
        """Kill at a point, recover as a compute service would, and check."""
        result = self._run_killed(point)
        try:
            if point:
                assert result.returncode == -signal.SIGKILL, result.stderr
                for node in (self._world.a, self._world.b):
                    node.new_driver()
                self._go_on()
            else:
                assert result.returncode == 0, result.stderr
            self._check()
        except BaseException as e:
            e.add_note(f"killed at point {point}: {self._then}, {self._power}")
            raise
        return int(result.stdout) if not point else None

    # Private

    def _run_killed(self, point: int) -> "subprocess.CompletedProcess[str]":
        path = self._world.tmp / "plan.json"
        path.write_text(json.dumps(self._plan(point)))
        argv = [sys.executable, "-m", "tests.functional.killed", str(path)]
        return subprocess.run(argv, capture_output=True, text=True, timeout=60)

    def _plan(self, point: int) -> dict[str, Any]:
        nodes = {"a": self._world.a, "b": self._world.b}
        flavor = {"memory_mb": 64, "vcpus": 1, "root_gb": 0, "ephemeral_gb": 0}
        return {
            **{name: settings(node) for name, node in nodes.items()},
            "instance": self._instance.uuid,
            "flavor": flavor,
            "point": point,
            "then": self._then,
        }

    def _go_on(self) -> None:
        """Do what was being done once more, from whatever state it is in."""
        if self._then == "revert":
            self._world.b.driver.destroy(None, self._instance)
            self._world.a.driver.finish_revert_migration(None, self._instance)
            return
        if self._world.b.state_of(self._instance) is None or self._is_open():
            try:
                ticket = self._world.migrate(self._instance)
            except (errors.RecordMissing, errors.MigrationRefused):
                # It was confirmed already: it is the peer's.
                assert self._world.b.driver.node.entitled(self._instance.uuid)
            else:
                self._world.finish(self._instance, ticket)
        self._world.confirm(self._instance)

    def _is_open(self) -> bool:
        return bool(self._world.a.driver.open_operations())

    def _check(self) -> None:
        world = self._world
        on: Node = world.b if self._then == "confirm" else world.a
        state = {"running": "running", "paused": "paused", "off": "shutoff"}[
            self._power
        ]
        if self._power == "paused" and on is world.b:
            state = "running"
        if state == "shutoff" and on is world.b:
            # What waits for a running guest, a layer over a shared disk, is merged.
            on.driver.power_on(None, self._instance)
            on.driver.settle()
            on.driver.power_off(self._instance)
        world.expect_one(self._instance, on, state)
        if self._power != "running" or on is world.a:
            assert world.read(on, self._instance) == self._before
        on.driver.destroy(None, self._instance)
        assert [n for n in on.files() if "mailbox" not in n] == []


def settings(node: Node) -> dict[str, Any]:
    conf = node.conf()
    names = (
        "uri",
        "address",
        "virt_type",
        "state_path",
        "peer_uri",
        "record_grace",
        "resume_age",
        "send_ahead",
        "receiver_timeout",
        "retry_timeout",
        "stream_length",
    )
    return {
        "values": {name: conf["virtmigrate"][name] for name in names},
        "backend": {"path": str(node.path), **node.backend},
    }
