# SPDX-License-Identifier: Apache-2.0
"""States inside of a volume that layers stand on, or that is a layer itself."""

import dataclasses
import subprocess
from typing import Any

import pytest

from tests.functional.conftest import World
from tests.functional.guestdisk import byte, power, write
from virtmigrate import consistency, errors
from virtmigrate.snapshot import Kind, Memory, Place, Return, Wanted

INSIDE = {"vda": Place.INTERNAL}


@pytest.fixture
def guest(world: World) -> Any:
    """A guest whose disk is a layer with a state inside: 1 below, 2 kept, then 3."""
    made = world.spawn(world.a)
    write(world.a, made, 1)
    world.a.driver.snapshots.create(made.uuid, Wanted("below"))
    write(world.a, made, 2)
    world.a.driver.snapshots.create(made.uuid, inside("kept"))
    write(world.a, made, 3)
    return made


def inside(name: str, memory: Memory = Memory.INTERNAL) -> Wanted:
    return Wanted(name, kind=Kind.CHECKPOINT, memory=memory, places=INSIDE)


@pytest.mark.parametrize("state", ["running", "off"])
def test_a_layer_with_a_state_inside_is_not_merged(
    world: World, guest: Any, state: str
) -> None:
    snapshots = world.a.driver.snapshots
    power(world.a, guest, state)
    snapshots.delete(guest.uuid, "below")
    assert byte(world, guest) == 3
    snapshots.revert(guest.uuid, Return("kept"))
    assert (byte(world, guest), world.a.state_of(guest)) == (2, "running")
    # When the state has gone, so does the layer.
    power(world.a, guest, state)
    snapshots.delete(guest.uuid, "kept")
    assert byte(world, guest) == 2
    assert len(volumes(world, guest)) == 1
    assert consistency.check(world.a.driver.node) == []


@pytest.mark.parametrize("state", ["running", "off"])
@pytest.mark.parametrize("then", ["deleted", "gone back to"])
def test_what_stood_on_a_state_inside_is_deleted(
    world: World, guest: Any, state: str, then: str
) -> None:
    snapshots, uuid = world.a.driver.snapshots, guest.uuid
    snapshots.create(uuid, Wanted("over"))
    write(world.a, guest, 4)
    power(world.a, guest, state)
    snapshots.delete(uuid, "over")
    assert byte(world, guest) == 4
    if then == "gone back to":
        snapshots.revert(uuid, Return("kept"))
        assert byte(world, guest) == 2
    snapshots.delete(uuid, "kept")
    assert byte(world, guest) == (2 if then == "gone back to" else 4)
    snapshots.delete(uuid, "below")
    assert len(volumes(world, guest)) == 1
    assert consistency.check(world.a.driver.node) == []


@pytest.mark.parametrize("state", ["running", "off"])
def test_deleted_with_what_stands_on_it(world: World, guest: Any, state: str) -> None:
    snapshots, uuid = world.a.driver.snapshots, guest.uuid
    snapshots.create(uuid, Wanted("over"))
    write(world.a, guest, 4)
    power(world.a, guest, state)
    snapshots.delete(uuid, "below", children=True)
    assert snapshots.all(uuid) == ((), None)
    assert byte(world, guest) == 4
    assert len(volumes(world, guest)) == 1


@pytest.mark.parametrize("state", ["running", "paused", "off"])
def test_gone_back_to_and_what_there_was_is_kept(
    world: World, guest: Any, state: str
) -> None:
    snapshots, uuid = world.a.driver.snapshots, guest.uuid
    power(world.a, guest, state)
    snapshots.revert(uuid, Return("kept", keep="last"))
    assert byte(world, guest) == 2
    snapshots.revert(uuid, Return("last"))
    assert byte(world, guest) == 3
    # Without its memory it is a disk snapshot, and the guest runs by now.
    assert world.a.state_of(guest) == {"off": "running"}.get(state, state)
    snapshots.revert(uuid, Return("kept"))
    assert byte(world, guest) == 2


@pytest.mark.parametrize("state", ["running", "off"])
def test_deleted_while_the_guest_is_elsewhere(
    world: World, guest: Any, state: str
) -> None:
    snapshots, uuid = world.a.driver.snapshots, guest.uuid
    snapshots.create(uuid, inside("second"))
    (kept, second) = snapshots.all(uuid)[0][1:]
    snapshots.revert(uuid, Return("below", power=state))
    path = world.a.driver.node.files.disks.volume_path(kept.disks[0].volume)
    assert states(path) == {kept.id, second.id}
    snapshots.delete(uuid, "kept")
    assert states(path) == {second.id}
    assert byte(world, guest) == 1
    snapshots.revert(uuid, Return("second"))
    assert byte(world, guest) == 3


def test_gone_back_to_after_a_layer_over_it_went(world: World, guest: Any) -> None:
    snapshots, uuid = world.a.driver.snapshots, guest.uuid
    snapshots.create(uuid, Wanted("over"))
    snapshots.revert(uuid, Return("below"))
    snapshots.delete(uuid, "over")
    snapshots.revert(uuid, Return("kept"))
    assert byte(world, guest) == 2
    # The volume is the guest's again, and can be kept again.
    snapshots.create(uuid, Wanted("again"))
    write(world.a, guest, 5)
    snapshots.revert(uuid, Return("again"))
    assert byte(world, guest) == 2


def test_deleted_below_what_two_share(world: World, guest: Any) -> None:
    snapshots, uuid = world.a.driver.snapshots, guest.uuid
    snapshots.create(uuid, Wanted("over"))
    write(world.a, guest, 4)
    snapshots.revert(uuid, Return("over", keep="branch"))
    with pytest.raises(errors.SnapshotRefused, match="turn the guest off"):
        snapshots.delete(uuid, "kept")
    power(world.a, guest, "off")
    (_, kept, *_) = snapshots.all(uuid)[0]
    path = world.a.driver.node.files.disks.volume_path(kept.disks[0].volume)
    assert states(path) == {kept.id}
    snapshots.delete(uuid, "kept")
    assert states(path) == set()
    for name, expected in {"branch": 4, "over": 3, "below": 1}.items():
        snapshots.revert(uuid, Return(name))
        assert byte(world, guest) == expected


@pytest.mark.parametrize("state", ["running", "off"])
def test_nothing_is_left_out(world: World, state: str) -> None:
    """libvirt would freeze it all the same, and take it back."""
    a, made = world.a, world.spawn(world.a, ephemeral_gb=1)
    # From here on the disks are qcow2.
    a.driver.snapshots.create(made.uuid, Wanted("layers"))
    power(a, made, state)
    wanted = inside("x", Memory.NONE if state == "off" else Memory.INTERNAL)
    wanted = dataclasses.replace(wanted, left_out=frozenset({"vdb"}))
    with pytest.raises(errors.SnapshotRefused, match="all disks inside"):
        a.driver.snapshots.create(made.uuid, wanted)
    assert len(a.driver.snapshots.all(made.uuid)[0]) == 1


# Private


def volumes(world: World, guest: Any) -> set[str]:
    catalog = world.a.driver.node.files.catalog.all()
    return {stored.name for stored in catalog if stored.body.owner == guest.uuid}


def states(path: str) -> set[str]:
    argv = ["qemu-img", "snapshot", "-U", "-l", path]
    said = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=30)
    return {line.split()[1] for line in said.stdout.splitlines()[2:]}
