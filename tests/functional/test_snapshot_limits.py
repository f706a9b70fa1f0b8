# SPDX-License-Identifier: Apache-2.0
"""Space, room and depth of chains; chains that are made shorter; merges on the way."""

import logging
import os
import signal
from typing import Any

import libvirt
import msgspec
import pytest

from tests.functional.conftest import Node, World
from tests.functional.guestdisk import byte, power, write
from tests.functional.test_snapshot_failures import checkpoint, fill, small
from virtmigrate import consistency, errors, merging
from virtmigrate.formats import DiskFormat
from virtmigrate.progress import Progress, Report
from virtmigrate.snapshot import Place, Return, Wanted
from virtmigrate.snapshot.flattening import Flattening
from virtmigrate.units import KiB, MiB


@pytest.fixture
def guest(world: World) -> Any:
    made = world.spawn(world.a)
    write(world.a, made, 1)
    return made


def options(node: Node, **values: object) -> None:
    node.overrides = values
    node.new_driver()


def depth(node: Node, guest: Any) -> int:
    here = node.driver.node
    return len(here.files.chain(here.entitled(guest.uuid).disks[0].volume))


def names(node: Node, guest: Any) -> list[str]:
    return [each.name for each in node.driver.snapshots.all(guest.uuid)[0]]


# What is refused


def test_the_space_of_snapshots_is_limited(world: World) -> None:
    """Layers and files of memory count, and what the new one would write."""
    a, made = world.a, world.spawn(world.a, memory_mb=1024)
    options(a, max_snapshot_space=1)
    snapshots = a.driver.snapshots
    snapshots.create(made.uuid, Wanted("disk"))
    before = a.files()
    with pytest.raises(errors.SnapshotRefused, match="max_snapshot_space"):
        snapshots.create(made.uuid, checkpoint("memory"))
    assert a.files() == before
    options(a, max_snapshot_space=0)
    a.driver.snapshots.create(made.uuid, checkpoint("memory"))


def test_no_room_for_memory_is_seen_before_it_is_written(world: World) -> None:
    with small(world) as filler:
        a, made = world.a, world.spawn(world.a, memory_mb=8192)
        write(a, made, 1)
        before = a.files()
        with pytest.raises(errors.SnapshotRefused, match=r"has room for .* needed"):
            a.driver.snapshots.create(made.uuid, checkpoint("memory"))
        assert a.files() == before
        a.driver.snapshots.create(made.uuid, Wanted("disk"))
        write(a, made, 2)
        fill(filler)
        free = a.driver.node.files.disks.room().free
        a.backend = {"reserved_mib": free // MiB + 1}
        options(a)
        with pytest.raises(errors.SnapshotRefused, match=r"has room for 0 B.* needed"):
            a.driver.snapshots.create(made.uuid, Wanted("another"))
        assert names(a, made) == ["disk"]
        a.backend = {}
        filler.unlink()


def test_chains_that_get_slow_are_named(
    world: World, guest: Any, caplog: pytest.LogCaptureFixture
) -> None:
    a = world.a
    options(a, warn_chain=2)
    caplog.set_level(logging.WARNING)
    a.driver.snapshots.create(guest.uuid, Wanted("s1"))
    assert "warn_chain" not in caplog.text
    a.driver.snapshots.create(guest.uuid, Wanted("s2"))
    assert "vda stands on 3 layers" in caplog.text
    for count in (1, 0):
        caplog.clear()
        assert a.driver.settle() == []
        assert caplog.text.count("vda stands on 3 layers") == count
    options(a, warn_chain=0)
    assert "warn_chain" not in caplog.text


# Shorter chains


@pytest.mark.parametrize("state", ["running", "off"])
def test_automatic_snapshots_go_where_chains_get_deep(
    world: World, guest: Any, state: str
) -> None:
    """The oldest first, no more than needed, and none that a user has made."""
    a, snapshots = world.a, world.a.driver.snapshots
    for number in range(1, 6):
        write(a, guest, number)
        wanted = Wanted(f"s{number}", automatic=number != 3)
        snapshots.create(guest.uuid, wanted)
    write(a, guest, 6)
    power(a, guest, state)
    assert a.driver.settle() == []
    assert depth(a, guest) == 6
    options(a, flatten_chain=4)
    assert depth(a, guest) == 6
    assert a.driver.settle() == []
    assert (names(a, guest), depth(a, guest)) == (["s3", "s4", "s5"], 4)
    options(a, flatten_chain=1)
    assert a.driver.settle() == []
    assert (names(a, guest), depth(a, guest)) == (["s3"], 2)
    assert byte(world, guest) == 6
    a.driver.snapshots.revert(guest.uuid, Return("s3"))
    assert byte(world, guest) == 3
    assert consistency.check(a.driver.node) == []


@pytest.mark.parametrize("state", ["running", "off"])
@pytest.mark.parametrize("is_killed", [False, True], ids=["", "killed"])
def test_an_active_layer_comes_to_stand_alone(
    world: World,
    guest: Any,
    state: str,
    is_killed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what snapshots hold is what it was."""
    a, snapshots = world.a, world.a.driver.snapshots
    for number in (1, 2):
        write(a, guest, number, number * MiB)
        snapshots.create(guest.uuid, Wanted(f"s{number}"))
    write(a, guest, 3, 3 * MiB)
    # So that QEMU writes down what it holds.
    a.driver.pause(guest)
    a.driver.unpause(guest)
    whole = world.read(a, guest)
    power(a, guest, state)
    options(a, flatten_chain=1, flatten_by="pull")
    if is_killed:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Flattening, "_pull", killed)
            a.driver.settle()
    assert a.driver.settle() == []
    assert (names(a, guest), depth(a, guest)) == (["s1", "s2"], 1)
    assert a.state_of(guest) == {"off": "shutoff"}.get(state, state)
    kill_qemu(a)
    assert world.read(a, guest) == whole
    assert a.driver.settle() == []
    assert consistency.check(a.driver.node) == []
    power(a, guest, "off")
    a.driver.power_on(None, guest, None)
    write(a, guest, 4, 3 * MiB)
    snapshots = a.driver.snapshots
    for number in (1, 2):
        snapshots.revert(guest.uuid, Return(f"s{number}", power="off"))
        found = [byte(world, guest, offset * MiB) for offset in (1, 2, 3)]
        assert found[:number] == list(range(1, number + 1))
        assert found[2] not in (3, 4)
    snapshots.delete(guest.uuid, "s1")
    snapshots.delete(guest.uuid, "s2")
    assert depth(a, guest) == 1


def test_a_layer_with_states_inside_is_not_flattened(
    world: World, guest: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """They need what it stands on."""
    a, snapshots = world.a, world.a.driver.snapshots
    snapshots.create(guest.uuid, Wanted("below"))
    power(a, guest, "off")
    inside = Wanted("in", places={"vda": Place.INTERNAL})
    snapshots.create(guest.uuid, inside)
    options(a, flatten_chain=1, flatten_by="pull")
    assert a.driver.settle() == []
    assert caplog.text.count("states lie inside") == 1
    assert a.driver.node.entitled(guest.uuid).change is None
    a.driver.snapshots.revert(guest.uuid, Return("in"))
    assert byte(world, guest) == 1


def test_a_layer_that_another_instance_stands_on_stays(
    world: World, guest: Any
) -> None:
    a, here = world.a, world.a.driver.node
    a.driver.snapshots.create(guest.uuid, Wanted("s"))
    write(a, guest, 2)
    (frozen,) = a.driver.snapshots.all(guest.uuid)[0][0].disks
    base = here.files.volumes.read(frozen.volume).body
    clone = msgspec.structs.replace(
        base,
        name="clone.0123456789abcdef",
        path=base.path.replace(base.name, "clone.0123456789abcdef"),
        owner="3e1f7c1a-0d0a-4ef6-9a35-5c1f0b9c7d11",
        backing=base.name,
        format=DiskFormat.QCOW2,
    )
    here.files.overlay(clone, base)
    before = here.files.disks.read(base.name, limit=16 * MiB)
    a.driver.snapshots.delete(guest.uuid, "s")
    assert here.files.disks.read(base.name, limit=16 * MiB) == before
    assert (byte(world, guest), depth(a, guest)) == (2, 2)
    here.files.remove(clone.name)
    a.driver.snapshots.create(guest.uuid, Wanted("next"))
    a.driver.snapshots.delete(guest.uuid, "next")
    assert (byte(world, guest), depth(a, guest)) == (2, 1)


def killed(*_: object) -> None:
    raise KeyboardInterrupt


# Merges


def filled(world: World) -> Any:
    """A guest with a snapshot and 32 MiB in the layer over it."""
    made = world.spawn(world.a, world.image(64 * MiB))
    world.a.driver.snapshots.create(made.uuid, Wanted("s"))
    for offset in range(2 * MiB, 34 * MiB, 4 * MiB):
        write(world.a, made, 1 + offset // MiB, offset)
    return made


@pytest.mark.parametrize("state", ["running", "off"])
def test_a_merge_says_how_far_it_is(
    world: World, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = filled(world)
    power(world.a, made, state)
    seen: list[Report] = []
    progress = Progress(seen.append, interval=0)
    monkeypatch.setattr(merging, "_commit", slowly)
    world.a.driver.snapshots.delete(made.uuid, "s", progress=progress)
    merged = [each for each in seen if each.phase == "merging a layer of vda"]
    assert len({each.done for each in merged}) > 2
    assert all(0 <= each.done <= each.total for each in merged)
    assert any(each.left for each in merged)


def slowly(
    domain: "libvirt.virDomain", target: str, top: str, base: str, *, is_active: bool
) -> None:
    """As it is begun, but for its rate: 256 KiB per second."""
    flags = libvirt.VIR_DOMAIN_BLOCK_COMMIT_BANDWIDTH_BYTES
    flags |= libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE if is_active else 0
    domain.blockCommit(target, base, None if is_active else top, 256 * KiB, flags)


@pytest.mark.parametrize("name", ["s1", "s2"])
def test_what_was_merged_outlives_qemu(world: World, name: str) -> None:
    """QEMU may be killed right after: the layer is gone by then."""
    a, made = world.a, world.spawn(world.a, world.image(64 * MiB))
    snapshots = a.driver.snapshots
    snapshots.create(made.uuid, Wanted("s0"))
    for number in (1, 2):
        write(a, made, number, number * 8 * MiB)
        snapshots.create(made.uuid, Wanted(f"s{number}"))
    write(a, made, 3, 24 * MiB)
    # As a guest that wants to keep it does.
    a.driver.pause(made)
    a.driver.unpause(made)
    snapshots.delete(made.uuid, name)
    kill_qemu(a)
    found = [byte(world, made, number * 8 * MiB) for number in (1, 2, 3)]
    assert found == [1, 2, 3]


def kill_qemu(node: Node) -> None:
    for pid in node.host.qemu_pids():
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("state", ["running", "off"])
def test_a_merge_is_cancelled(
    world: World, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest has all that it wrote, and settling does the rest."""
    a, made = world.a, filled(world)
    power(a, made, state)
    progress = Progress()
    commit = merging._commit

    def begin(*args: Any, **kwargs: Any) -> None:
        commit(*args, **kwargs)
        progress.cancel()

    with monkeypatch.context() as patch:
        patch.setattr(merging, "_commit", begin)
        # QEMU is faster than anybody: its job never seems to be over.
        job = merging.Merges._job_of
        patch.setattr(
            merging.Merges,
            "_job_of",
            lambda *args: (found := job(*args)) and {"cur": 0, "end": 1 + found["end"]},
        )
        with pytest.raises(errors.SnapshotPutOff, match="host settle"):
            a.driver.snapshots.delete(made.uuid, "s", progress=progress)
    assert a.state_of(made) == {"off": "shutoff"}.get(state, state)
    assert (names(a, made), depth(a, made)) == ([], 2)
    assert byte(world, made, 30 * MiB) == 31
    assert a.driver.settle() == []
    assert depth(a, made) == 1
    assert byte(world, made, 30 * MiB) == 31
    assert consistency.check(a.driver.node) == []


def test_a_delete_is_cancelled_before_it_began(world: World, guest: Any) -> None:
    a, progress = world.a, Progress()
    a.driver.snapshots.create(guest.uuid, Wanted("s"))
    progress.cancel()
    with pytest.raises(errors.Cancelled):
        a.driver.snapshots.delete(guest.uuid, "s", progress=progress)
    assert (names(a, guest), depth(a, guest)) == (["s"], 2)
    assert a.driver.node.entitled(guest.uuid).change is None
