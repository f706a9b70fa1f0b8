# SPDX-License-Identifier: Apache-2.0
"""Snapshots go along when an instance moves."""

from typing import Any

import msgspec
import pytest

from sandbox import guest as guests
from tests.functional.conftest import Node, World
from tests.functional.guestdisk import write
from tests.functional.test_snapshot_kinds import mark, marked, with_firmware
from tests.functional.test_snapshots import wait_for_beats
from virtmigrate import consistency, errors, mailbox
from virtmigrate.journal import Journal
from virtmigrate.migration import source, target
from virtmigrate.snapshot import Kind, Memory, Place, Return, Wanted, creation
from virtmigrate.units import MiB


def holds(world: World, node: Node, instance: Any) -> int:
    """The byte that the block at 2 MiB is full of."""
    (found,) = set(world.read(node, instance)[2 * MiB : 2 * MiB + 65536])
    return found


def grown(world: World) -> Any:
    """An instance with snapshots 1 and 2, and two branches on the first."""
    instance, a = world.spawn(world.a), world.a
    uuid, snapshots = instance.uuid, a.driver.snapshots
    for number in (1, 2):
        write(a, instance, number)
        snapshots.create(uuid, Wanted(f"s{number}"))
    write(a, instance, 3)
    snapshots.revert(uuid, Return("s1", keep="s3"))
    write(a, instance, 4)
    return instance


def expect_tree(world: World, node: Node, instance: Any) -> None:
    """All snapshots hold what they held; what there is now is kept first."""
    snapshots, uuid = node.driver.snapshots, instance.uuid
    assert holds(world, node, instance) == 4
    tree, current = snapshots.all(uuid)
    parents = {each.name: each.parent for each in tree}
    first = next(each.id for each in tree if each.name == "s1")
    second = next(each.id for each in tree if each.name == "s2")
    assert parents == {"s1": None, "s2": first, "s3": second}
    assert current == first
    snapshots.create(uuid, Wanted("now"))
    for name, number in {"s2": 2, "s1": 1, "s3": 3, "now": 4}.items():
        snapshots.revert(uuid, Return(name))
        assert holds(world, node, instance) == number
    snapshots.delete(uuid, "now")
    assert consistency.check(node.driver.node) == []


@pytest.mark.parametrize("place", ["apart", "shared"])
def test_a_tree_moves(world: World, place: str) -> None:
    if place == "shared":
        world.share()
    instance = grown(world)
    world.finish(instance, world.migrate(instance))
    assert world.b.state_of(instance) == "running"
    world.confirm(instance)
    for node in (world.a, world.b):
        assert node.driver.settle() == []
    expect_tree(world, world.b, instance)
    if place == "apart":
        assert world.a.files() == []
    world.b.driver.destroy(None, instance, None)
    assert world.b.files() == []


@pytest.mark.parametrize("place", ["apart", "shared"])
def test_a_tree_comes_back(world: World, place: str) -> None:
    if place == "shared":
        world.share()
    instance = grown(world)
    world.finish(instance, world.migrate(instance))
    world.revert(instance)
    assert world.a.state_of(instance) == "running"
    for node in (world.a, world.b):
        assert node.driver.settle() == []
    expect_tree(world, world.a, instance)
    if place == "apart":
        assert world.b.files() == []


@pytest.mark.parametrize("place", ["apart", "shared"])
@pytest.mark.parametrize("disk", [Place.EXTERNAL, Place.INTERNAL], ids=["out", "in"])
def test_a_checkpoint_moves(world: World, disk: Place, place: str) -> None:
    """The guest goes on at the peer where it was on this host."""
    if place == "shared":
        world.share()
    a, b = world.a, world.b
    instance = world.spawn(a, guests.image().path, memory_mb=128)
    uuid = instance.uuid
    console = a.host.logs / f"qemu/virtmigrate-{uuid}.log"
    wait_for_beats(console, 2)
    outside = disk is Place.EXTERNAL
    if not outside:
        a.driver.snapshots.create(uuid, Wanted("layer"))
    memory = Memory.EXTERNAL if outside else Memory.INTERNAL
    wanted = Wanted("m", Kind.CHECKPOINT, memory=memory, places={"vda": disk})
    a.driver.snapshots.create(uuid, wanted)
    at = guests.beats(console)[-1].number
    wait_for_beats(console, len(guests.beats(console)) + 2)
    world.finish(instance, world.migrate(instance))
    world.confirm(instance)
    there = b.host.logs / f"qemu/virtmigrate-{uuid}.log"
    wait_for_beats(there, 1)
    b.driver.settle()
    count = len(guests.beats(there))
    b.driver.snapshots.revert(uuid, Return("m"))
    wait_for_beats(there, count + 2)
    assert at - 1 <= guests.beats(there)[count].number <= at + 2
    # One boot after the move; none after going back.
    assert len(guests.boots(there)) == 1


def test_what_does_not_move(world: World) -> None:
    instance = grown(world)
    world.a.overrides = {"flatten_disks": True}
    world.a.new_driver()
    before = world.a.files()
    with pytest.raises(errors.MigrationRefused, match="would become one raw volume"):
        world.migrate(instance)
    assert (world.a.files(), world.b.files()) == (before, [])
    assert world.a.state_of(instance) == "running"


def test_what_came_is_merged_there(world: World) -> None:
    """A base that nothing stands under is given back, too."""
    instance, b = world.spawn(world.a), world.b
    uuid = instance.uuid
    write(world.a, instance, 1)
    world.a.driver.snapshots.create(uuid, Wanted("first"))
    write(world.a, instance, 2)
    world.finish(instance, world.migrate(instance))
    world.confirm(instance)
    for node in (world.a, b):
        assert node.driver.settle() == []
    b.driver.snapshots.delete(uuid, "first")
    assert holds(world, b, instance) == 2
    owned = [s for s in b.driver.node.files.catalog.all() if s.body.owner == uuid]
    assert len(owned) == 1
    assert consistency.check(b.driver.node) == []


def test_a_half_undone_move_is_in_the_way(world: World) -> None:
    """It brings back the record that it began with, without a new snapshot."""
    a, instance = world.a, world.spawn(world.a)
    snapshots, uuid = a.driver.snapshots, instance.uuid
    snapshots.create(uuid, Wanted("first"))
    before = a.files()
    original = msgspec.json.encode(a.driver.node.entitled(uuid)).decode()
    journal = Journal.create(a.driver.node.journals, "0123456789abcdef")
    journal.done(
        "begun",
        kind=source.KIND,
        operation="0123456789abcdef",
        original=original,
    )
    for change in (
        lambda: snapshots.create(uuid, Wanted("second")),
        lambda: snapshots.revert(uuid, Return("first")),
        lambda: snapshots.delete(uuid, "first"),
        lambda: snapshots.plan_delete(uuid, "first"),
    ):
        with pytest.raises(errors.InvalidState, match="confirm or revert"):
            change()
    assert a.files() == before
    journal.close()
    snapshots.delete(uuid, "first")


@pytest.mark.parametrize("place", [Place.EXTERNAL, Place.INTERNAL], ids=["out", "in"])
def test_a_layer_of_a_move_that_a_snapshot_holds_stays(
    world: World, place: Place
) -> None:
    """It came over a shared disk, and was to be merged after the confirm."""
    world.share()
    b, instance = world.b, world.spawn(world.a)
    uuid = instance.uuid
    write(world.a, instance, 1)
    # A shared disk that grows keeps its state in a layer over it.
    world.finish(instance, world.migrate(instance, root_gb=1))
    write(b, instance, 2)
    world.confirm(instance)
    memory = Memory.INTERNAL if place is Place.INTERNAL else Memory.NONE
    kind = Kind.CHECKPOINT if place is Place.INTERNAL else Kind.DISK
    wanted = Wanted("held", kind, memory=memory, places={"vda": place})
    b.driver.snapshots.create(uuid, wanted)
    write(b, instance, 3)
    assert b.driver.settle() == []
    assert holds(world, b, instance) == 3
    b.driver.snapshots.revert(uuid, Return("held"))
    assert holds(world, b, instance) == 2
    assert b.driver.node.mailbox.transfers.names() == [mailbox.CARD]
    b.driver.snapshots.delete(uuid, "held")
    assert holds(world, b, instance) == 2
    owned = [s for s in b.driver.node.files.catalog.all() if s.body.owner == uuid]
    assert len(owned) == 1
    assert consistency.check(b.driver.node) == []


def test_a_layer_of_a_move_waits_for_a_change(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot that is being taken may be about to hold it."""
    world.share()
    b, instance = world.b, world.spawn(world.a)
    world.finish(instance, world.migrate(instance, root_gb=1))
    world.confirm(instance)

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(creation.Creation, "_prepare", end)
        patch.setattr(creation.Creation, "recover", end)
        b.driver.snapshots.create(instance.uuid, Wanted("held"))
    (operation,) = set(b.driver.node.mailbox.transfers.names()) - {mailbox.CARD}
    target.Target(b.driver.node).recover()
    assert operation in b.driver.node.mailbox.transfers.names()
    assert b.driver.settle() == []
    assert operation not in b.driver.node.mailbox.transfers.names()
    assert b.state_of(instance) == "running"


def test_firmware_variables_of_a_snapshot_move(world: World) -> None:
    a, b, guest = world.a, world.b, with_firmware(world)
    a.driver.power_off(guest)
    mark(world, guest, 2)
    a.driver.snapshots.create(guest.uuid, Wanted("all", Kind.CHECKPOINT))
    mark(world, guest, 3)
    world.finish(guest, world.migrate(guest))
    world.confirm(guest)
    assert a.driver.settle() == b.driver.settle() == []
    assert a.files() == []
    assert marked(world, guest, b) == 3
    b.driver.snapshots.revert(guest.uuid, Return("all"))
    assert marked(world, guest, b) == 2
    b.driver.snapshots.delete(guest.uuid, "all")
    assert not [name for name in b.files() if "variables" in name]
    assert consistency.check(b.driver.node) == []
