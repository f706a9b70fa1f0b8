# SPDX-License-Identifier: Apache-2.0
"""A SIGKILL at every step of making an image: none is half made, no layer stays.

`make test` takes a few points; --full takes all, or a --part. The image service is a
stand-in.
"""

import json
import random
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.functional import guestdisk
from tests.functional.conftest import World
from tests.functional.test_kills import settings
from tests.functional.test_live_snapshot import expect_clean, raw_of
from tests.unit import imageservice
from virtmigrate.livesnapshot import Kind, Target

SEED = 20


@dataclass(frozen=True)
class Case:
    """What is asked for, and at how many points `make test` kills it."""

    kind: Kind
    few: int
    fmt: str = "qcow2"
    compress: bool = False


CASES = {
    "file": Case(Kind.FILE, 2),
    "glance": Case(Kind.SERVICE, 2),
    "compressed": Case(Kind.FILE, 1, compress=True),
    "cache": Case(Kind.CACHE, 1, "raw"),
}


@pytest.fixture
def service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[imageservice.Service]:
    with imageservice.serving() as found:
        clouds = tmp_path / "clouds.yaml"
        clouds.write_text(imageservice.clouds(found))
        monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(clouds))
        yield found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.timeout(3600)
def test_killed(
    world: World,
    service: imageservice.Service,
    request: pytest.FixtureRequest,
    name: str,
) -> None:
    world.a.overrides["image_service_cloud"] = "here"
    case = CASES[name]
    count = run(world, service, case, 0)
    assert count >= 15
    part, parts = map(int, request.config.getoption("--part").split("/"))
    points = [point for point in range(1, count + 1) if point % parts == part]
    if not request.config.getoption("--full"):
        points = random.Random(f"{SEED}{name}").sample(points, case.few)
    for point in points:
        try:
            run(world, service, case, point)
        except BaseException as e:
            e.add_note(f"killed at point {point} of {count}: {name}")
            raise


# Private


def run(world: World, service: imageservice.Service, case: Case, point: int) -> int:
    """Kill at a point, recover as a compute service would, and check."""
    world.a.new_driver()
    instance = world.spawn(world.a)
    guestdisk.write(world.a, instance, 7)
    where = {
        Kind.FILE: str(world.tmp / "saved"),
        Kind.SERVICE: str(uuid.uuid4()),
        Kind.CACHE: "local",
    }
    target = Target(kind=case.kind, where=where[case.kind], name="saved")
    result = run_killed(world, instance, target, case, point)
    assert result.returncode in ((0, -signal.SIGKILL) if point else (0,)), result.stderr
    guestdisk.write(world.a, instance, 9)
    world.a.new_driver()
    expect_clean(world.a, instance)
    assert guestdisk.byte(world, instance) == 9
    expect_whole_or_gone(
        world, service, target, case.fmt, is_whole=result.returncode == 0
    )
    world.a.driver.destroy(None, instance, None)
    # What tells that a slot was lost goes when it is old.
    assert [each for each in world.a.files() if "image-" not in each] == []
    return int(result.stdout or 0)


def run_killed(
    world: World, instance: Any, target: Target, case: Case, point: int
) -> "subprocess.CompletedProcess[str]":
    node = settings(world.a)
    node["values"]["image_service_cloud"] = "here"
    plan = {
        "node": node,
        "instance": instance.uuid,
        "target": msgspec.to_builtins(target),
        "options": {"format": case.fmt, "compress": case.compress},
        "point": point,
    }
    path = world.tmp / "plan.json"
    path.write_text(json.dumps(plan))
    argv = [sys.executable, "-m", "tests.functional.killed_image", str(path)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=100)


def expect_whole_or_gone(
    world: World,
    service: imageservice.Service,
    target: Target,
    fmt: str,
    *,
    is_whole: bool,
) -> None:
    path = world.tmp / "saved"
    if target.kind is Kind.SERVICE and target.where in service.images:
        assert service.images[target.where]["status"] == "active"
        path.write_bytes(service.data[target.where])
    cache = world.a.driver.images.of(world.a.driver.node.files)
    for cached in cache.shelf.all():
        assert cached.origin.pinned
        path.write_bytes(Path(cached.volume.path).read_bytes())
        cache.pin(cached, pinned=False)
        cache.remove(cache.shelf.all()[0])
    assert path.exists() or not is_whole
    if path.exists():
        assert raw_of(path, fmt, world.tmp)[guestdisk.OFFSET] == 7
        path.unlink()
    assert list(world.tmp.glob(".saved*")) == []
    staging = world.a.state / "staging"
    assert not staging.exists() or list(staging.iterdir()) == []
