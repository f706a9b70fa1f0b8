# SPDX-License-Identifier: Apache-2.0
"""A SIGKILL at every step of what is done to a transient disk: it stays as it is, and
there is one layer over it while its guest runs, and none when that is off.

`make test` takes a share of the changes, each killed at one point; --full takes all.
"""

import json
import random
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from tests.functional.conftest import World
from tests.functional.guestdisk import write
from tests.functional.test_kills import settings
from tests.functional.test_transient import crash, digests, layers, seen, spawn
from virtmigrate import consistency

SEED = 20
"""Chooses the points that `make test` kills at."""


@dataclass(frozen=True)
class Change:
    """One thing that is done, and what may come of it."""

    before: str
    """What comes before: the guest "crashed", or is "off" or "saved"; "" runs."""
    power: tuple[str | None, ...]
    """What the guest may be afterwards."""
    seen: tuple[int, ...] = (0,)
    """What a guest that runs afterwards may see of what it had written: 7, or 0."""
    declared: tuple[bool, ...] = (True,)
    """What the record may say afterwards."""


CHANGES = {
    "start": Change("crashed", ("shutoff", "running")),
    "settle": Change("crashed", ("shutoff",)),
    "soft": Change("", ("shutoff", "running"), (7,)),
    "hard": Change("", ("shutoff", "running"), (7, 0)),
    "suspend": Change("", ("shutoff", "running"), (7,)),
    "resume": Change("saved", ("shutoff", "running"), (7,)),
    "on": Change("off", ("shutoff",), declared=(False, True)),
    "off": Change("off", ("shutoff",), declared=(False, True)),
    "destroy": Change("", ("running", "shutoff", None), (7,)),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.timeout(3600)
def test_killed(world: World, request: pytest.FixtureRequest, name: str) -> None:
    count = run(world, name, 0)
    assert count >= 1
    points = list(range(1, count + 1))
    if not request.config.getoption("--full"):
        points = [random.Random(f"{SEED}{name}").randint(1, count)]
    for point in points:
        try:
            run(world, name, point)
        except BaseException as e:
            e.add_note(f"killed at point {point} of {count}: {name}")
            raise


# Private


def run(world: World, name: str, point: int) -> int:
    """Kill at a point, recover as a compute service would, and check."""
    a, change = world.a, CHANGES[name]
    guest = spawn(world, *(["vda"] if name != "on" else []))
    if name != "on":
        write(a, guest, 7)
    before = digests(a, guest)
    prepare(world, guest, change.before)
    result = run_killed(world, guest, name, point)
    # A kill while libvirt starts it may come when all is done.
    assert result.returncode in ((0, -signal.SIGKILL) if point else (0,)), result.stderr
    a.new_driver()
    a.driver.settle()
    assert a.driver.settle() == []
    check(world, guest, change, before)
    a.driver.destroy(None, guest)
    assert a.files() == []
    return int(result.stdout or 0)


def prepare(world: World, guest: Any, before: str) -> None:
    if before == "crashed":
        crash(world.a, guest)
        assert len(layers(world.a, guest)) == 1
    elif before == "off":
        world.a.driver.power_off(guest)
    elif before == "saved":
        world.a.driver.suspend(None, guest)


def run_killed(
    world: World, guest: Any, name: str, point: int
) -> "subprocess.CompletedProcess[str]":
    plan = {
        "node": settings(world.a),
        "instance": guest.uuid,
        "action": name,
        "point": point,
    }
    path = world.tmp / "plan.json"
    path.write_text(json.dumps(plan))
    argv = [sys.executable, "-m", "tests.functional.killed_transient", str(path)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=90)


def check(world: World, guest: Any, change: Change, before: list[str]) -> None:
    a, power = world.a, world.a.state_of(guest)
    assert power in change.power
    if power is None:
        # Destroyed but for its volumes, and the next destroy removes what is left.
        assert change.power[-1] is None
        return
    assert consistency.check(a.driver.node) == []
    (ref,) = a.driver.node.entitled(guest.uuid).disks
    assert ref.transient in change.declared
    assert digests(a, guest) == before
    is_saved = a.driver.node.domains.power(guest.uuid).value == "saved"
    lasts = power == "running" or is_saved
    assert len(layers(a, guest)) == lasts
    if lasts:
        assert seen(world, a, guest) in change.seen
    a.driver.power_on(None, guest, None)
    write(a, guest, 9)
    assert (digests(a, guest) == before) == ref.transient
