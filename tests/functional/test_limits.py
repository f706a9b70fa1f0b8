# SPDX-License-Identifier: Apache-2.0
"""Moves at once, and the bandwidth that they may use."""

import os
import threading
import time
from typing import Any

import pytest

from tests.functional.conftest import World
from virtmigrate import errors
from virtmigrate.progress import Progress, Report
from virtmigrate.units import MiB

SECONDS = 60.0
SIZE = 12 * MiB


class Move(threading.Thread):
    """One move from a to b, by a thread of its own; keeps when its phases began."""

    def __init__(self, world: World, instance: Any) -> None:
        super().__init__(daemon=True)
        self.began: dict[str, float] = {}
        self.waits = threading.Event()
        self.error: BaseException | None = None
        self.progress = Progress(self._listen, interval=0)
        self._world, self._instance = world, instance

    def run(self) -> None:
        self._world.a.progress = self.progress
        try:
            self._world.migrate(self._instance)
        except BaseException as e:
            self.error = e

    def finish(self) -> None:
        self.join(SECONDS)
        assert not self.is_alive()

    def _listen(self, report: Report) -> None:
        self.began.setdefault(report.phase, time.monotonic())
        if report.phase.startswith("waiting"):
            self.waits.set()


def spawn(world: World) -> Any:
    image = world.tmp / "dense"
    image.write_bytes(os.urandom(SIZE))
    return world.spawn(world.a, image)


def options(world: World, **values: object) -> None:
    world.a.overrides |= values
    world.a.new_driver()


def test_the_next_move_waits_with_its_guest_running(world: World) -> None:
    options(world, max_transfers=1, bandwidth_mib=6)
    first, second = spawn(world), spawn(world)
    one, two = Move(world, first), Move(world, second)
    one.start()
    assert one.waits.wait(SECONDS)
    while "copying vda" not in one.began and one.is_alive():
        time.sleep(0.01)
    two.start()
    assert two.waits.wait(SECONDS)
    assert world.a.state_of(second) == "running"
    one.finish()
    two.finish()
    assert (one.error, two.error) == (None, None)
    assert two.began["checking"] >= one.began["handing over"]


def test_a_move_that_waits_can_be_cancelled(world: World) -> None:
    options(world, max_transfers=1)
    instance = spawn(world)
    with world.a.driver.node.sending(Progress()):
        waiting = Move(world, instance)
        waiting.start()
        assert waiting.waits.wait(SECONDS)
        waiting.progress.cancel()
        waiting.finish()
    assert isinstance(waiting.error, errors.Cancelled)
    world.expect_one(instance, world.a)


def test_a_move_that_waits_too_long_is_refused(world: World) -> None:
    options(world, max_transfers=1, queue_timeout=0.5)
    instance = spawn(world)
    with world.a.driver.node.sending(Progress()):
        waiting = Move(world, instance)
        waiting.start()
        waiting.finish()
    assert isinstance(waiting.error, errors.MigrationRefused)
    assert "no transfer place" in str(waiting.error)
    assert world.a.state_of(instance) == "running"
    world.expect_one(instance, world.a)


@pytest.mark.parametrize("option", ["bandwidth_mib", "host_bandwidth_mib"])
def test_bandwidth_is_limited(world: World, option: str) -> None:
    options(world, **{option: 6})
    one = Move(world, spawn(world))
    one.start()
    one.finish()
    assert one.error is None
    took = one.began["verifying vda"] - one.began["copying vda"]
    assert took >= 0.9 * SIZE / (6 * MiB)


def test_two_moves_share_the_hosts_bandwidth(world: World) -> None:
    options(world, host_bandwidth_mib=12, max_transfers=2)
    moves = [Move(world, spawn(world)) for _ in range(2)]
    for each in moves:
        each.start()
        assert each.waits.wait(SECONDS)
    for each in moves:
        each.finish()
        assert each.error is None
    began = min(each.began["copying vda"] for each in moves)
    ended = max(each.began["verifying vda"] for each in moves)
    assert ended - began >= 0.9 * 2 * SIZE / (12 * MiB)
