# SPDX-License-Identifier: Apache-2.0
"""Snapshots of instances on files: each written to before and after."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sandbox import guest as guests
from tests.functional.conftest import Node, World
from tests.functional.guestdisk import byte, power, write
from virtmigrate import consistency, errors
from virtmigrate.snapshot import Kind, Memory, Place, Return, Wanted

POWERS = ("running", "paused", "off")


@pytest.fixture
def guest(world: World) -> Any:
    """A guest without a system, that runs: what it wrote is written for it."""
    return world.spawn(world.a)


@pytest.mark.parametrize("state", POWERS)
def test_disk_snapshot(world: World, guest: Any, state: str) -> None:
    a, snapshots = world.a, world.a.driver.snapshots
    write(a, guest, 1)
    power(a, guest, state)
    snapshots.create(guest.uuid, Wanted("first"))
    assert a.state_of(guest) == {"off": "shutoff"}.get(state, state)
    if state == "off":
        a.driver.power_on(None, guest, None)
    write(a, guest, 2)
    assert byte(world, guest) == 2
    snapshots.revert(guest.uuid, Return("first"))
    assert byte(world, guest) == 1
    write(a, guest, 3)
    snapshots.revert(guest.uuid, Return("first", power="off"))
    assert a.state_of(guest) == "shutoff"
    assert byte(world, guest) == 1
    snapshots.delete(guest.uuid, "first")
    assert byte(world, guest) == 1
    assert snapshots.all(guest.uuid) == ((), None)
    assert len(a.driver.node.entitled(guest.uuid).disks) == 1
    expect_volumes(a, guest, 1)
    a.driver.power_on(None, guest, None)
    assert a.state_of(guest) == "running"


@pytest.mark.parametrize("state", ["running", "off"])
def test_branches(world: World, guest: Any, state: str) -> None:
    """Three states beside each other on one base, gone through in any order."""
    a, snapshots = world.a, world.a.driver.snapshots
    uuid = guest.uuid
    write(a, guest, 1)
    snapshots.create(uuid, Wanted("base"))
    for number in (2, 3, 4):
        write(a, guest, number)
        snapshots.revert(uuid, Return("base", keep=f"branch{number}"))
        assert byte(world, guest) == 1
    power(a, guest, state)
    tree, current = snapshots.all(uuid)
    base = tree[0].id
    assert {each.name: each.parent for each in tree} == {
        "base": None,
        "branch2": base,
        "branch3": base,
        "branch4": base,
    }
    assert current == base
    for number in (3, 2, 4):
        snapshots.revert(uuid, Return(f"branch{number}"))
        assert byte(world, guest) == number
    # The base goes, and what three stand on stays.
    snapshots.delete(uuid, "base")
    for number in (2, 4, 3):
        snapshots.revert(uuid, Return(f"branch{number}"))
        assert byte(world, guest) == number
    snapshots.delete(uuid, "branch4")
    snapshots.delete(uuid, "branch2")
    snapshots.revert(uuid, Return("branch3"))
    assert byte(world, guest) == 3
    snapshots.delete(uuid, "branch3")
    assert byte(world, guest) == 3
    expect_volumes(a, guest, 1)
    assert world.a.state_of(guest) == {"off": "shutoff"}.get(state, state)


@pytest.mark.parametrize("state", ["running", "off"])
@pytest.mark.parametrize("gone", [0, 1, 2])
def test_one_of_three_is_deleted(
    world: World, guest: Any, gone: int, state: str
) -> None:
    a, snapshots = world.a, world.a.driver.snapshots
    for number in range(3):
        write(a, guest, number + 1)
        snapshots.create(guest.uuid, Wanted(f"s{number}"))
    write(a, guest, 9)
    power(a, guest, state)
    snapshots.delete(guest.uuid, f"s{gone}")
    assert byte(world, guest) == 9
    expect_volumes(a, guest, 3)
    for number in {0, 1, 2} - {gone}:
        snapshots.revert(guest.uuid, Return(f"s{number}"))
        assert byte(world, guest) == number + 1


def test_with_children(world: World, guest: Any) -> None:
    a, snapshots, uuid = world.a, world.a.driver.snapshots, guest.uuid
    for number in range(4):
        write(a, guest, number + 1)
        snapshots.create(uuid, Wanted(f"s{number}"))
    steps = snapshots.plan_delete(uuid, "s1", children=True, itself=False)
    assert [(s.what, s.where) for s in steps[:2]] == [
        ("delete", "s3"),
        ("delete", "s2"),
    ]
    assert [s.what for s in steps[2:]] == ["merge", "merge"]
    snapshots.delete(uuid, "s1", children=True, itself=False)
    assert [each.name for each in snapshots.all(uuid)[0]] == ["s0", "s1"]
    assert byte(world, guest) == 4
    snapshots.create(uuid, Wanted("s4"))
    snapshots.revert(uuid, Return("s0", delete_children=True))
    assert [each.name for each in snapshots.all(uuid)[0]] == ["s0"]
    assert byte(world, guest) == 1
    expect_volumes(a, guest, 2)


def test_refused(world: World, guest: Any) -> None:
    snapshots, uuid = world.a.driver.snapshots, guest.uuid
    before = world.a.files()
    refused = {
        "only a qcow2 volume": Wanted("x", places={"vda": Place.INTERNAL}),
        "keeps no states itself": Wanted("x", places={"vda": Place.OWN}),
        "is no name": Wanted("no name"),
        "no disk vdz": Wanted("x", left_out=frozenset({"vdz"})),
        "nothing to keep": Wanted("x", left_out=frozenset({"vda"})),
        "would come back frozen": Wanted("x", memory=Memory.EXTERNAL, quiesce=True),
        "only with all disks": Wanted("x", memory=Memory.INTERNAL),
    }
    for reason, wanted in refused.items():
        with pytest.raises(errors.SnapshotRefused, match=reason):
            snapshots.create(uuid, wanted)
    assert world.a.files() == before
    snapshots.create(uuid, Wanted("x"))
    with pytest.raises(errors.SnapshotExists):
        snapshots.create(uuid, Wanted("x"))
    with pytest.raises(errors.SnapshotNotFound):
        snapshots.revert(uuid, Return("y"))


def test_destroyed(world: World, guest: Any) -> None:
    a, snapshots, uuid = world.a, world.a.driver.snapshots, guest.uuid
    checkpoint = Wanted("m", kind=Kind.CHECKPOINT, memory=Memory.EXTERNAL)
    snapshots.create(uuid, Wanted("d"))
    snapshots.create(uuid, checkpoint)
    snapshots.revert(uuid, Return("d"))
    a.driver.destroy(None, guest, None)
    assert a.files() == []


@pytest.mark.parametrize("state", ["running", "paused"])
@pytest.mark.parametrize(
    ("place", "memory"),
    [
        (Place.EXTERNAL, Memory.EXTERNAL),
        (Place.INTERNAL, Memory.INTERNAL),
        (Place.INTERNAL, Memory.EXTERNAL),
    ],
    ids=lambda each: each.value,
)
def test_checkpoint(world: World, state: str, place: Place, memory: Memory) -> None:
    """A guest that counts on its disk and in its memory goes on where it was."""
    a, snapshots = world.a, world.a.driver.snapshots
    instance = world.spawn(a, guests.image().path, memory_mb=128)
    uuid = instance.uuid
    console = a.host.logs / f"qemu/virtmigrate-{uuid}.log"
    wait_for_beats(console, 2)
    if place is Place.INTERNAL:
        snapshots.create(uuid, Wanted("layer"))
    power(a, instance, state)
    snapshots.create(
        uuid,
        Wanted("there", kind=Kind.CHECKPOINT, memory=memory, places={"vda": place}),
    )
    assert a.state_of(instance) == state
    at = guests.beats(console)[-1].number
    if state == "paused":
        a.driver.unpause(instance)
    wait_for(lambda: guests.beats(console)[-1].number >= at + 3)
    for wanted in (state, "running"):
        count = len(guests.beats(console))
        snapshots.revert(uuid, Return("there", power=wanted))
        assert a.state_of(instance) == wanted
        if wanted == "paused":
            a.driver.unpause(instance)
        wait_for_beats(console, count + 3)
        first = guests.beats(console)[count].number
        assert at - 1 <= first <= at + 2
    assert guests.boots(console) == [1]
    a.driver.power_off(instance)
    disk = world.tmp / "disk"
    disk.write_bytes(world.read(a, instance))
    found = guests.verify(disk)
    assert (found.problems, found.boots) == ([], 1)
    snapshots.delete(uuid, "there")
    disk.write_bytes(world.read(a, instance))
    assert guests.verify(disk) == found


def wait_for_beats(console: Path, count: int) -> None:
    wait_for(lambda: len(guests.beats(console)) >= count)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.2)


def expect_volumes(node: Node, instance: Any, count: int) -> None:
    """There is nothing else of the instance, and nothing does not fit."""
    here = node.driver.node
    found = [
        stored.name
        for backend in here.backends.values()
        for stored in backend.catalog.all()
        if stored.body.owner == instance.uuid
    ]
    assert len(found) == count, found
    assert consistency.check(here) == []
