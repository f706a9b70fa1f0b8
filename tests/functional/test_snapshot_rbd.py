# SPDX-License-Identifier: Apache-2.0
"""Snapshots that a backend keeps itself, also beside layers of files."""

import json
import random
import signal
import subprocess
import sys
import types
import uuid as uuids
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import sandbox
from sandbox.ceph import Ceph
from tests.functional import places
from tests.functional.guestdisk import LENGTH, OFFSET, power, write
from tests.functional.sides import Kinds, Side, add_disk
from virtmigrate import consistency, errors
from virtmigrate.snapshot import Kind, Memory, Return, Wanted
from virtmigrate.units import MiB

SEED = 20
"""Chooses the points that `make test` kills at."""

POWERS = ("running", "paused", "off")


@pytest.fixture(scope="module")
def host(box: sandbox.Sandbox) -> Iterator[sandbox.Host]:
    yield box.add_host("snap-rbd")
    box.remove_host("snap-rbd")


@pytest.fixture
def side(
    host: sandbox.Host, tmp_path: Path, cluster: Callable[[], Ceph]
) -> Iterator[Side]:
    """A host with disks in a cluster, and files in a directory."""
    with places.PLACES["rbd"](host, "snaps", tmp_path, cluster) as values:
        made = Side(host, tmp_path / "side", values, "therbd")
        try:
            yield made
        finally:
            for uuid in made.driver.list_instance_uuids():
                made.driver.destroy(None, types.SimpleNamespace(uuid=uuid))
            made.close()


@pytest.fixture
def guest(side: Side, tmp_path: Path) -> Any:
    return Kinds(side, side, tmp_path).spawn()


def byte(side: Side, guest: Any, target: str = "vda") -> int:
    found = side.content(guest, target)[OFFSET : OFFSET + LENGTH]
    assert len(set(found)) == 1
    return found[0]


def shutoff(state: str) -> str:
    return {"off": "shutoff"}.get(state, state)


def destroyed(side: Side, guest: Any) -> None:
    """It goes, with all that the cluster keeps of it."""
    assert consistency.check(side.driver.node) == []
    owned = {
        f"{backend.name}/{stored.name}"
        for backend in side.driver.node.backends.values()
        for stored in backend.catalog.all()
        if stored.body.owner == guest.uuid
    }
    assert owned
    side.driver.destroy(None, guest, None)
    assert not owned & side.volumes()


@pytest.mark.parametrize("state", POWERS)
def test_back_and_forth(side: Side, guest: Any, state: str) -> None:
    snapshots, uuid = side.driver.snapshots, guest.uuid
    for number in (1, 2, 3):
        write(side, guest, number)
        power(side, guest, state)
        snapshots.create(uuid, Wanted(f"s{number}"))
        assert side.state_of(guest) == shutoff(state)
        side.driver.power_on(None, guest, None)
        side.driver.unpause(guest)
    write(side, guest, 4)
    for number in (2, 1, 3, 1):
        snapshots.revert(uuid, Return(f"s{number}", power=state))
        assert byte(side, guest) == number
        assert side.state_of(guest) == shutoff(state)
    snapshots.revert(uuid, Return("s2", power="running", keep="s1-again"))
    write(side, guest, 5)
    snapshots.revert(uuid, Return("s1-again"))
    assert byte(side, guest) == 1
    snapshots.delete(uuid, "s2")
    snapshots.revert(uuid, Return("s3"))
    assert byte(side, guest) == 3
    snapshots.revert(uuid, Return("s1", delete_children=True))
    assert byte(side, guest) == 1
    assert [each.name for each in snapshots.all(uuid)[0]] == ["s1"]
    side.restart()
    destroyed(side, guest)


@pytest.mark.parametrize("state", ["running", "paused"])
def test_checkpoint(side: Side, guest: Any, state: str) -> None:
    snapshots, uuid = side.driver.snapshots, guest.uuid
    write(side, guest, 1)
    power(side, guest, state)
    snapshots.create(uuid, Wanted("there", Kind.CHECKPOINT, Memory.EXTERNAL))
    assert side.state_of(guest) == state
    # QEMU lets go of the disks of a paused guest whose memory it has written.
    side.driver.unpause(guest)
    write(side, guest, 2)
    snapshots.create(uuid, Wanted("later"))
    for wanted in (state, "off", "running"):
        snapshots.revert(uuid, Return("there", power=wanted))
        assert side.state_of(guest) == shutoff(wanted)
        assert byte(side, guest) == 1
    snapshots.revert(uuid, Return("later"))
    assert byte(side, guest) == 2
    snapshots.delete(uuid, "there")
    assert not [name for name in side.volumes() if "memory" in name]
    destroyed(side, guest)


def test_a_clone(side: Side, tmp_path: Path) -> None:
    """What stands on an image of the cache; that is never touched."""
    image = Kinds(side, side, tmp_path).image
    made = types.SimpleNamespace(
        uuid=str(uuids.uuid4()), name="clone", flavor=Kinds.flavor_of(side.name)
    )
    meta = {"path": str(image), "disk_format": "raw", "id": "image"}
    side.driver.spawn(None, made, meta)
    backend, volume = side.disk(made)
    assert volume.parent is not None
    before = side.content(made)
    snapshots = side.driver.snapshots
    snapshots.create(made.uuid, Wanted("new"))
    write(side, made, 7)
    with pytest.raises(errors.Unsupported):
        side.driver.node.backend(backend).flatten(volume.name)
    snapshots.revert(made.uuid, Return("new"))
    assert side.content(made) == before
    snapshots.delete(made.uuid, "new")
    snapshots.create(made.uuid, Wanted("last"))
    destroyed(side, made)


@pytest.mark.parametrize("state", POWERS)
@pytest.mark.parametrize("memory", [Memory.NONE, Memory.EXTERNAL], ids=str)
def test_a_disk_of_each_kind(
    side: Side, guest: Any, state: str, memory: Memory
) -> None:
    if memory is Memory.EXTERNAL and state == "off":
        return
    snapshots, uuid = side.driver.snapshots, guest.uuid
    add_disk(side, guest, "vdb", bytes(8 * MiB))
    for number in (1, 2):
        write_both(side, guest, number)
        power(side, guest, state)
        kind = Kind.DISK if memory is Memory.NONE else Kind.CHECKPOINT
        snapshots.create(uuid, Wanted(f"s{number}", kind, memory))
        assert side.state_of(guest) == shutoff(state)
        side.driver.power_on(None, guest, None)
        side.driver.unpause(guest)
    write_both(side, guest, 3)
    for number in (1, 2, 1):
        snapshots.revert(uuid, Return(f"s{number}", power=state))
        assert bytes_of(side, guest) == (number, number)
        assert side.state_of(guest) == shutoff(state)
    snapshots.delete(uuid, "s1", children=True)
    assert bytes_of(side, guest) == (1, 1)
    destroyed(side, guest)


def write_both(side: Side, guest: Any, number: int) -> None:
    write(side, guest, number)
    write(side, guest, number, disk=1)


def bytes_of(side: Side, guest: Any) -> tuple[int, int]:
    return byte(side, guest), byte(side, guest, "vdb")


@pytest.mark.parametrize(
    ("memory", "act"),
    [
        (Memory.NONE, "create"),
        (Memory.EXTERNAL, "create"),
        (Memory.NONE, "revert"),
        (Memory.EXTERNAL, "revert"),
    ],
    ids=lambda each: each if isinstance(each, str) else each.value,
)
@pytest.mark.timeout(3600)
def test_killed(
    side: Side, tmp_path: Path, request: pytest.FixtureRequest, memory: Memory, act: str
) -> None:
    """With a disk of each kind: both are of the old state or both of the new one."""
    count = killed_at(side, tmp_path, memory, act, 0)
    assert count > 5
    points = list(range(1, count + 1))
    if not request.config.getoption("--full"):
        points = random.Random(f"{SEED}{memory}{act}").sample(points, 1)
    for point in points:
        killed_at(side, tmp_path, memory, act, point)


def killed_at(side: Side, tmp: Path, memory: Memory, act: str, point: int) -> int:
    """Return how many points there are, if it was not killed."""
    guest = Kinds(side, side, tmp).spawn()
    add_disk(side, guest, "vdb", bytes(8 * MiB))
    found = run_killed(side, guest, memory, act, point)
    try:
        assert side.driver.settle() == []
        expect_old_or_new(side, guest, act)
        destroyed(side, guest)
    except BaseException as e:
        e.add_note(f"killed at point {point}")
        raise
    return found


def run_killed(side: Side, guest: Any, memory: Memory, act: str, point: int) -> int:
    kind = Kind.DISK if memory is Memory.NONE else Kind.CHECKPOINT
    wanted = Wanted("s", kind, memory)
    write_both(side, guest, 1)
    action: object = wanted
    if act == "revert":
        side.driver.snapshots.create(guest.uuid, wanted)
        write_both(side, guest, 2)
        action = Return("s")
    plan = {
        "node": {"config": str(side.config), "values": {"address": side.host.name}},
        "instance": guest.uuid,
        "action": {act: msgspec.to_builtins(action)},
        "point": point,
    }
    path = side.config.with_name("plan.json")
    path.write_text(json.dumps(plan))
    argv = [sys.executable, "-m", "tests.functional.killed_snapshot", str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return int(done.stdout or 0)


def expect_old_or_new(side: Side, guest: Any, act: str) -> None:
    snapshots, uuid = side.driver.snapshots, guest.uuid
    names = [each.name for each in snapshots.all(uuid)[0]]
    assert side.state_of(guest) == "running"
    if act == "create":
        assert bytes_of(side, guest) == (1, 1)
        write_both(side, guest, 2)
    else:
        assert names == ["s"]
        assert bytes_of(side, guest) in {(1, 1), (2, 2)}
    for name in names:
        snapshots.revert(uuid, Return(name))
        assert bytes_of(side, guest) == (1, 1)
