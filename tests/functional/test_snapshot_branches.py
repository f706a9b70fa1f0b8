# SPDX-License-Identifier: Apache-2.0
"""A branch is one step: what there was is kept, and the disks go on elsewhere."""

from typing import Any

import pytest

from tests.functional.conftest import World
from tests.functional.guestdisk import byte, power, write
from tests.functional.test_snapshot_findings import (
    expect_settled,
    refused,
    with_detached,
)
from virtmigrate import errors
from virtmigrate.domainstate import States
from virtmigrate.snapshot import Kind, Memory, Place, Return, Wanted
from virtmigrate.snapshot.work import Work

INSIDE = {"vda": Place.INTERNAL}


@pytest.fixture
def guest(world: World) -> Any:
    """A guest on a layer, with 1 in `below`, 2 in `there`, and 3 now."""
    made, snapshots = world.spawn(world.a), world.a.driver.snapshots
    write(world.a, made, 1)
    snapshots.create(made.uuid, Wanted("below"))
    write(world.a, made, 2)
    return made


def names(world: World, guest: Any) -> list[str]:
    return [each.name for each in world.a.driver.snapshots.all(guest.uuid)[0]]


@pytest.mark.parametrize("place", [Place.EXTERNAL, Place.INTERNAL], ids=str)
@pytest.mark.parametrize("fails", ["make_layers", "keep_inside", "publish"])
def test_a_failure_before_the_guest_is_left_leaves_nothing(
    world: World, guest: Any, place: Place, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, snapshots = world.a, world.a.driver.snapshots
    if fails == "keep_inside" and place is Place.EXTERNAL:
        pytest.skip("nothing is kept inside then")
    memory = Memory.INTERNAL if place is Place.INTERNAL else Memory.EXTERNAL
    there = Wanted("there", Kind.CHECKPOINT, memory, {"vda": place})
    snapshots.create(guest.uuid, there)
    write(a, guest, 3)
    before = sorted(n for n in a.files() if "instances" not in n)
    with monkeypatch.context() as patch:
        if fails == "publish":
            fail_second(patch)
        else:
            patch.setattr(Work if fails == "make_layers" else States, fails, refused)
        with pytest.raises(errors.Error, match="not today"):
            snapshots.revert(guest.uuid, Return("there", keep="kept"))
    assert names(world, guest) == ["below", "there"]
    assert (a.state_of(guest), byte(world, guest)) == ("running", 3)
    after = sorted(n for n in a.files() if "instances" not in n)
    assert [n for n in after if ".rec." not in n] == [
        n for n in before if ".rec." not in n
    ]
    expect_settled(a, guest)
    snapshots = a.driver.snapshots
    snapshots.revert(guest.uuid, Return("there", keep="kept"))
    assert (names(world, guest)[2:], byte(world, guest)) == (["kept"], 2)
    snapshots.revert(guest.uuid, Return("kept", power="off"))
    assert byte(world, guest) == 3


def fail_second(patch: pytest.MonkeyPatch) -> None:
    """The record is not published that says that it goes back."""
    publish, calls = Work.publish, list[int]()

    def failing(work: Work, *args: Any, **changes: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            refused()
        return publish(work, *args, **changes)

    patch.setattr(Work, "publish", failing)


@pytest.mark.parametrize("state", ["running", "off"])
def test_a_disk_that_does_not_go_back_is_kept_all_the_same(
    world: World, state: str
) -> None:
    a, snapshots = world.a, world.a.driver.snapshots
    made = world.spawn(a, ephemeral_gb=1)
    write(a, made, 1)
    write(a, made, 1, disk=1)
    left_out = frozenset({"vdb"})
    snapshots.create(made.uuid, Wanted("one", left_out=left_out))
    write(a, made, 2)
    write(a, made, 2, disk=1)
    power(a, made, state)
    snapshots.revert(made.uuid, Return("one", keep="kept", layer="mine"))
    tops = {ref.target: ref.volume for ref in a.driver.node.entitled(made.uuid).disks}
    assert {name.partition(".")[0] for name in tops.values()} == {
        "mine-vda",
        "mine-vdb",
    }
    assert (byte(world, made), byte(world, made, target="vdb")) == (1, 2)
    a.driver.power_on(None, made, None)
    write(a, made, 3)
    write(a, made, 3, disk=1)
    snapshots.revert(made.uuid, Return("kept"))
    assert (byte(world, made), byte(world, made, target="vdb")) == (2, 2)
    snapshots.delete(made.uuid, "one")
    snapshots.delete(made.uuid, "kept")
    assert (byte(world, made), byte(world, made, target="vdb")) == (2, 2)
    expect_settled(a, made)


def test_nothing_is_made_over_what_is_left(world: World, guest: Any) -> None:
    """It is frozen as it is: one new layer, for where it goes on."""
    a, snapshots = world.a, world.a.driver.snapshots
    (before,) = a.driver.node.entitled(guest.uuid).disks
    steps = snapshots.plan_revert(guest.uuid, Return("below", keep="kept"))
    assert [s.what for s in steps] == ["keep", "restore", "layer", "power"]
    snapshots.revert(guest.uuid, Return("below", keep="kept"))
    tree, current = snapshots.all(guest.uuid)
    assert tree[1].disks[0].volume == before.volume
    assert (tree[1].parent, current) == (tree[0].id, tree[0].id)
    assert byte(world, guest) == 1


def test_what_a_branch_detached_comes_back_with_it(world: World) -> None:
    a, made = world.a, with_detached(world)
    snapshots = a.driver.snapshots
    assert [ref.target for ref in snapshots.detached(made.uuid)] == ["vdb"]
    snapshots.create(made.uuid, Wanted("later", Kind.CHECKPOINT))
    snapshots.revert(made.uuid, Return("x", keep="kept"))
    assert byte(world, made) == 0
    snapshots.revert(made.uuid, Return("kept"))
    expect_settled(a, made)


def test_children_go_in_the_same_step(world: World, guest: Any) -> None:
    a, snapshots = world.a, world.a.driver.snapshots
    for number in (3, 4):
        snapshots.create(guest.uuid, Wanted(f"s{number}"))
        write(a, guest, number)
    back = Return("below", keep="kept", delete_children=True)
    snapshots.revert(guest.uuid, back)
    tree, current = snapshots.all(guest.uuid)
    assert [each.name for each in tree] == ["below", "kept"]
    assert {each.parent for each in tree} == {None, current}
    assert byte(world, guest) == 1
    snapshots.revert(guest.uuid, Return("kept"))
    assert byte(world, guest) == 4
    expect_settled(a, guest)
