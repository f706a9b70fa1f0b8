# SPDX-License-Identifier: Apache-2.0
"""A guest whose memory was saved: for a state inside of its disks, or by libvirt."""

from pathlib import Path
from typing import Any

import pytest

from tests.functional.conftest import World
from tests.functional.guestdisk import byte, write
from virtmigrate import consistency, domainstate, errors
from virtmigrate.instance import Domains
from virtmigrate.snapshot import Kind, Memory, Place, Return, Wanted
from virtmigrate.snapshot.creation import Creation
from virtmigrate.units import MiB

SAVED = Wanted(
    "saved",
    kind=Kind.CHECKPOINT,
    memory=Memory.EXTERNAL,
    places={"vda": Place.INTERNAL},
)


class Killed(BaseException):
    """The end of a process, as far as a test needs it."""


@pytest.fixture
def guest(world: World) -> Any:
    """A guest with one snapshot, on a layer."""
    made = world.spawn(world.a)
    write(world.a, made, 1)
    world.a.driver.snapshots.create(made.uuid, Wanted("below"))
    write(world.a, made, 2)
    return made


@pytest.mark.parametrize("when", ["snapshot taken", "snapshot undone"])
def test_memory_is_restored_once(
    world: World, guest: Any, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its disks have changed since: with the old memory it would destroy them."""
    a = world.a
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Creation, "_commit", killed)
        if when == "snapshot undone":
            patch.setattr(domainstate.States, "keep_inside", killed)
            patch.setattr("virtmigrate.snapshot.work.Work.drop_states", killed)
        a.driver.snapshots.create(guest.uuid, SAVED)
    assert a.state_of(guest) == "running"
    write(a, guest, 3)
    a.driver.node.domains.kill(guest.uuid)
    expect_undone(world, guest, 3)


def test_a_guest_that_ends_before_it_is_published_stays_off(
    world: World, guest: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpause = domainstate.States.unpause

    def ends(states: domainstate.States, uuid: str) -> None:
        monkeypatch.setattr(domainstate.States, "unpause", unpause)
        states.unpause(uuid)
        world.a.driver.node.domains.kill(guest.uuid)

    monkeypatch.setattr(domainstate.States, "unpause", ends)
    world.a.driver.snapshots.create(guest.uuid, SAVED)
    assert world.a.state_of(guest) == "shutoff"
    assert consistency.check(world.a.driver.node) == []


@pytest.mark.parametrize("written", ["nothing", "nothing but a head", "a part"])
def test_a_host_that_fails_before_memory_is_written(
    world: World, guest: Any, written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = world.a

    def fails(states: domainstate.States, uuid: str, path: str) -> None:
        if written != "nothing":
            Domains.save_to(states, uuid, path)
            with Path(path).open("r+b") as file:
                # As libvirt begins it.
                file.write(b"LibvirtQemudPart")
                file.truncate(MiB if written == "a part" else 50)
        states.kill(uuid)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(domainstate.States, "save_to", fails)
        patch.setattr(Creation, "recover", killed)
        a.driver.snapshots.create(guest.uuid, SAVED)
    expect_undone(world, guest, 2)


def test_nothing_is_begun_while_libvirt_has_it_saved(world: World, guest: Any) -> None:
    a, snapshots, uuid = world.a, world.a.driver.snapshots, guest.uuid
    a.driver.suspend(None, guest)
    before = a.files()
    for begin in (
        lambda: snapshots.create(uuid, Wanted("x")),
        lambda: snapshots.revert(uuid, Return("below")),
        lambda: snapshots.delete(uuid, "below"),
    ):
        with pytest.raises(errors.SnapshotRefused, match="resume it first"):
            begin()
    assert a.files() == before
    a.driver.resume(None, guest)
    assert (a.state_of(guest), byte(world, guest)) == ("running", 2)
    snapshots.delete(uuid, "below")


@pytest.mark.parametrize("left", ["deleting", "tidying up"])
def test_what_was_cut_short_waits_for_a_saved_guest(
    world: World, guest: Any, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = world.a
    with monkeypatch.context() as patch, pytest.raises(Killed):
        where = "Snapshots._drop" if left == "deleting" else "Tidying.run"
        patch.setattr(f"virtmigrate.snapshot.{where}", killed)
        a.driver.snapshots.delete(guest.uuid, "below")
    a.driver.suspend(None, guest)
    (said,) = a.new_driver().settle()
    assert f"{left} of instance {guest.uuid}" in said
    assert "resume it first" in said
    a.driver.resume(None, guest)
    assert (a.state_of(guest), byte(world, guest)) == ("running", 2)
    assert a.driver.settle() == []
    assert (a.state_of(guest), byte(world, guest)) == ("running", 2)
    assert a.driver.snapshots.all(guest.uuid) == ((), None)
    assert consistency.check(a.driver.node) == []


# Private


def killed(*_: object, **__: object) -> None:
    raise Killed


def expect_undone(world: World, guest: Any, value: int) -> None:
    """Expect a guest that is off, with what its disk held, and can be started."""
    a = world.a
    assert a.new_driver().settle() == []
    assert a.state_of(guest) == "shutoff"
    assert byte(world, guest) == value
    assert [each.name for each in a.driver.snapshots.all(guest.uuid)[0]] == ["below"]
    assert consistency.check(a.driver.node) == []
    a.driver.power_on(None, guest, None)
    assert a.state_of(guest) == "running"
