# SPDX-License-Identifier: Apache-2.0
"""What is lost, full, or left by others while snapshots are worked on."""

import contextlib
from collections.abc import Iterator
from typing import Any

import libvirt
import msgspec
import pytest

from tests.functional.conftest import Node, World
from tests.functional.guestdisk import byte, power, write
from tests.functional.test_snapshot_failures import checkpoint, fill, small
from virtmigrate import consistency, errors, merging, xml
from virtmigrate.domainstate import States
from virtmigrate.instance import STAND_IN
from virtmigrate.snapshot import (
    Kind,
    Place,
    Return,
    Snapshots,
    Wanted,
    creation,
    memory,
)
from virtmigrate.snapshot.work import Work


@pytest.fixture
def guest(world: World) -> Any:
    """A guest that runs, with a 1 on its disk."""
    made = world.spawn(world.a)
    write(world.a, made, 1)
    return made


def killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def memory_file(node: Node, guest: Any) -> str:
    (first,), _ = node.driver.snapshots.all(guest.uuid)
    return first.memory_volume


def expect_settled(node: Node, guest: Any) -> None:
    assert node.new_driver().settle() == []
    assert node.driver.node.entitled(guest.uuid).change is None
    assert consistency.check(node.driver.node) == []


# Memory


def test_a_lost_memory_is_seen_before_the_guest_is_killed(
    world: World, guest: Any
) -> None:
    a, uuid = world.a, guest.uuid
    a.driver.snapshots.create(uuid, checkpoint("m"))
    write(a, guest, 2)
    a.driver.node.files.disks.delete(memory_file(a, guest))
    with pytest.raises(errors.SnapshotRefused, match=r"memory of m is lost.*off"):
        a.driver.snapshots.revert(uuid, Return("m"))
    assert (a.state_of(guest), byte(world, guest)) == ("running", 2)
    a.driver.snapshots.revert(uuid, Return("m", power="off"))
    assert (a.state_of(guest), byte(world, guest)) == ("shutoff", 1)
    assert a.driver.settle() == []


def test_memory_that_is_lost_on_the_way_back_leaves_nothing_open(
    world: World, guest: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, uuid = world.a, guest.uuid
    a.driver.snapshots.create(uuid, checkpoint("m"))
    write(a, guest, 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(States, "restore_with", killed)
        a.driver.snapshots.revert(uuid, Return("m"))
    a.driver.node.files.disks.delete(memory_file(a, guest))
    assert a.new_driver().settle() == []
    assert (a.state_of(guest), byte(world, guest)) == ("shutoff", 1)
    a.driver.power_on(None, guest, None)
    assert a.state_of(guest) == "running"


@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
def test_memory_is_on_its_storage_before_states_are_kept(
    world: World, guest: Any, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, uuid, calls = world.a, guest.uuid, list[str]()
    a.driver.snapshots.create(uuid, Wanted("layer"))
    persist, keep = memory.persist, States.keep_inside

    def persisting(*args: Any) -> bool:
        calls.append("persist")
        if fails:
            raise errors.StorageError(host="here", pool="files", reason="no fsync")
        return persist(*args)

    def keeping(*args: Any) -> None:
        calls.append("keep")
        keep(*args)

    monkeypatch.setattr(memory, "persist", persisting)
    monkeypatch.setattr(States, "keep_inside", keeping)
    expected = pytest.raises(errors.StorageError) if fails else contextlib.nullcontext()
    with expected:
        a.driver.snapshots.create(uuid, checkpoint("m", places={"vda": Place.INTERNAL}))
    assert calls == (["persist"] if fails else ["persist", "keep"])
    assert (a.state_of(guest), byte(world, guest)) == ("running", 1)
    assert len(a.driver.snapshots.all(uuid)[0]) == 2 - fails
    expect_settled(a, guest)


# What is said


def test_what_libvirt_refuses_is_said_with_what_became_of_it(
    world: World, guest: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, before = world.a, [n for n in world.a.files() if "instances" not in n]
    monkeypatch.setattr(States, "freeze", refused)
    with pytest.raises(errors.SnapshotFailed) as caught:
        a.driver.snapshots.create(guest.uuid, Wanted("x"))
    for told in ("not today", guest.uuid, "alpha", "guest is running", "as it was"):
        assert told in str(caught.value)
    assert isinstance(caught.value.__cause__, errors.LibvirtFailed)
    assert [n for n in a.files() if "instances" not in n] == before


def test_what_cannot_be_undone_is_said(
    world: World, guest: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = world.a
    with monkeypatch.context() as patch:
        patch.setattr(States, "freeze", refused)
        patch.setattr(Work, "drop_made", refused)
        with pytest.raises(errors.SnapshotUndecided, match="host settle"):
            a.driver.snapshots.create(guest.uuid, Wanted("x"))
    expect_settled(a, guest)
    assert a.driver.snapshots.all(guest.uuid) == ((), None)


def refused(*_: object) -> None:
    raise errors.LibvirtFailed(
        host="alpha", doing="it", reason="not today", code=1, domain=10, errno=0
    )


@pytest.mark.parametrize("while_", ["creating", "reverting"])
def test_a_guest_that_was_saved_in_between_can_be_settled(
    world: World, guest: Any, while_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Doing what the message says is enough."""
    a, uuid = world.a, guest.uuid
    if while_ == "reverting":
        a.driver.snapshots.create(uuid, Wanted("x"))
        write(a, guest, 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if while_ == "creating":
            patch.setattr(creation.Creation, "_commit", killed)
            a.driver.snapshots.create(uuid, Wanted("x"))
        patch.setattr(States, "kill", killed)
        a.driver.snapshots.revert(uuid, Return("x"))
    with domain_of(a, guest) as domain:
        domain.managedSave()
    (said,) = a.new_driver().settle()
    with domain_of(a, guest) as domain:
        if while_ == "creating":
            assert "virsh start" in said
            domain.create()
        else:
            assert "managedsave-remove" in said
            domain.managedSaveRemove()
    expect_settled(a, guest)
    assert (a.state_of(guest), byte(world, guest)) == ("running", 1)
    assert [each.name for each in a.driver.snapshots.all(uuid)[0]] == ["x"]


@contextlib.contextmanager
def domain_of(node: Node, guest: Any) -> Iterator["libvirt.virDomain"]:
    with node.libvirt() as conn:
        yield conn.lookupByUUIDString(guest.uuid)


def test_no_room_for_a_record_is_said(world: World) -> None:
    """Not that somebody else has changed it; and the next attempt waits for nobody."""
    with small(world) as filler:
        a, guest = world.a, world.spawn(world.a)
        fill(filler)
        with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        here = a.driver.node
        found = here.entitled(guest.uuid)
        named = msgspec.structs.replace(found, name="n" * 20_000)
        with pytest.raises(errors.DiskFull, match="could not be written"):
            here.publish_instance(named)
        assert here.entitled(guest.uuid) == found
        filler.unlink()
        here.publish_instance(named)
        assert here.entitled(guest.uuid) == named
        assert a.driver.settle() == []


# Stand-ins


def test_stand_ins_are_nobodys_instances(world: World, guest: Any) -> None:
    a = world.a
    power(a, guest, "off")
    chain = a.driver.node.files.layers(
        a.driver.node.entitled(guest.uuid).disks[0].volume
    )
    with merging.Merges(a.driver.node.host).stand_in(guest.uuid, chain, "x86_64") as it:
        assert a.driver.node.domains.exists(it)
        assert a.driver.list_instance_uuids() == [guest.uuid]
        assert len(a.driver.list_instances()) == 1


def test_a_stand_in_that_was_left_is_ended(world: World, guest: Any) -> None:
    """It has the layers open, and no other could have them."""
    a, uuid = world.a, guest.uuid
    a.driver.snapshots.create(uuid, Wanted("x"))
    write(a, guest, 2)
    power(a, guest, "off")
    chain = a.driver.node.files.layers(a.driver.node.entitled(uuid).disks[0].volume)
    other = "00000000-0000-4000-8000-000000000001"
    text = merging._stand_in_xml(other, f"{STAND_IN}{uuid}", chain, "x86_64")
    with a.libvirt() as conn:
        conn.createXML(text, libvirt.VIR_DOMAIN_START_PAUSED)
    a.driver.snapshots.delete(uuid, "x")
    assert byte(world, guest) == 2
    assert not a.driver.node.domains.exists(other)
    assert consistency.check(a.driver.node) == []


# Disks that a revert took away


def with_detached(world: World) -> Any:
    """A guest whose second disk a revert took away, because it was added later."""
    a, made = world.a, world.spawn(world.a, ephemeral_gb=1)
    power(a, made, "off")
    wanted = Wanted("x", Kind.CHECKPOINT, left_out=frozenset({"vdb"}))
    a.driver.snapshots.create(made.uuid, wanted)
    here = a.driver.node
    found = here.entitled(made.uuid)
    tree = xml.parse(found.snapshots[0].domain_xml)
    devices = tree.find("devices")
    assert devices is not None
    for disk in devices.findall("disk"):
        if disk.find("target").get("dev") == "vdb":  # type: ignore[union-attr]
            devices.remove(disk)
    text = xml.write(tree)
    then = msgspec.structs.replace(found.snapshots[0], domain_xml=text)
    here.publish_instance(msgspec.structs.replace(found, snapshots=(then,)))
    (ref,) = a.driver.snapshots.revert(made.uuid, Return("x"))
    assert a.driver.snapshots.detached(made.uuid) == (ref,)
    return made


@pytest.mark.parametrize("is_killed", [False, True], ids=["", "killed"])
def test_a_disk_that_was_detached_is_given_up(
    world: World, is_killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, made = world.a, with_detached(world)
    (ref,) = a.driver.snapshots.detached(made.uuid)
    with pytest.raises(errors.SnapshotRefused, match=r"vdz names 0.*vdb"):
        a.driver.snapshots.give_up(made.uuid, "vdz")
    if is_killed:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Snapshots, "_drop", killed)
            a.driver.snapshots.give_up(made.uuid, "vdb")
        assert a.new_driver().settle() == []
    else:
        a.driver.snapshots.give_up(made.uuid, ref.volume)
    assert a.driver.snapshots.detached(made.uuid) == ()
    assert not [name for name in a.files() if ref.volume in name]
    expect_settled(a, made)
    assert byte(world, made) == 0


def test_a_detached_disk_that_a_snapshot_holds_stays(world: World) -> None:
    a, made = world.a, with_detached(world)
    (ref,) = a.driver.snapshots.detached(made.uuid)
    here = a.driver.node
    found = here.entitled(made.uuid)
    frozen = msgspec.structs.replace(
        found.snapshots[0].disks[0], target="vdb", volume=ref.volume
    )
    held = msgspec.structs.replace(found.snapshots[0], disks=(frozen,))
    here.publish_instance(msgspec.structs.replace(found, snapshots=(held,)))
    with pytest.raises(errors.SnapshotRefused, match="snapshot x holds"):
        a.driver.snapshots.give_up(made.uuid, "vdb")
    assert a.driver.snapshots.detached(made.uuid) == (ref,)


# Inside of volumes, after a move


def test_a_state_is_kept_inside_after_a_move(world: World) -> None:
    """The layers' own headers name files that are gone."""
    a, b = world.a, world.b
    made = world.spawn(a)
    write(a, made, 1)
    a.driver.snapshots.create(made.uuid, Wanted("below"))
    write(a, made, 2)
    a.driver.snapshots.create(made.uuid, Wanted("between"))
    write(a, made, 3)
    world.finish(made, world.migrate(made))
    world.confirm(made)
    assert a.files() == []
    power(b, made, "off")
    inside = Wanted("in", places={"vda": Place.INTERNAL})
    b.driver.snapshots.create(made.uuid, inside)
    b.driver.power_on(None, made, None)
    write(b, made, 4)
    b.driver.snapshots.revert(made.uuid, Return("in", power="off"))
    assert set(world.read(b, made)[2 * 2**20 : 2 * 2**20 + 65536]) == {3}
    b.driver.snapshots.delete(made.uuid, "in")
    b.driver.snapshots.revert(made.uuid, Return("below", power="off"))
    assert set(world.read(b, made)[2 * 2**20 : 2 * 2**20 + 65536]) == {1}
    assert consistency.check(b.driver.node) == []
