# SPDX-License-Identifier: Apache-2.0
"""Changes of snapshots that fail: all is as it was, and says why."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from tests.functional import places
from tests.functional.conftest import World
from tests.functional.guestdisk import byte, power, write
from virtmigrate import consistency, domainxml, errors, merging, model
from virtmigrate.progress import Progress, Report
from virtmigrate.snapshot import Kind, Memory, Place, Return, Wanted, creation
from virtmigrate.snapshot.work import Work
from virtmigrate.units import KiB, MiB


@pytest.fixture
def guest(world: World) -> Any:
    made = world.spawn(world.a)
    write(world.a, made, 1)
    return made


def checkpoint(name: str, **fields: Any) -> Wanted:
    return Wanted(name, kind=Kind.CHECKPOINT, memory=Memory.EXTERNAL, **fields)


@pytest.mark.parametrize("place", [Place.EXTERNAL, Place.INTERNAL], ids=str)
def test_memory_is_written_once_while_paused(
    world: World, guest: Any, place: Place
) -> None:
    a, snapshots, uuid = world.a, world.a.driver.snapshots, guest.uuid
    a.driver.pause(guest)
    snapshots.create(uuid, checkpoint("first"))
    files = a.files()
    with pytest.raises(errors.SnapshotFailed, match="let it run"):
        snapshots.create(uuid, checkpoint("second", places={"vda": place}))
    assert [n for n in a.files() if "instances" not in n] == [
        n for n in files if "instances" not in n
    ]
    assert a.state_of(guest) == "paused"
    assert consistency.check(a.driver.node) == []
    a.driver.unpause(guest)
    snapshots.create(uuid, checkpoint("second", places={"vda": place}))
    snapshots.revert(uuid, Return("first"))
    assert byte(world, guest) == 1


@pytest.mark.parametrize("what", ["reboot", "suspend", "unpause"])
def test_a_guest_is_left_as_it_is_until_settled(
    world: World, guest: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing would start it again, or what is kept of it would change."""
    a = world.a
    acts: dict[str, Callable[[], object]] = {
        "reboot": lambda: a.driver.reboot(None, guest, None, "HARD"),
        "suspend": lambda: a.driver.suspend(None, guest),
        "unpause": lambda: a.driver.unpause(guest),
    }

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("virtmigrate.snapshot.creation.Creation._commit", killed)
        a.driver.snapshots.create(guest.uuid, Wanted("x"))
    before = "paused" if what == "unpause" else "running"
    power(a, guest, before)
    with pytest.raises(errors.InvalidState, match="host settle"):
        acts[what]()
    assert a.state_of(guest) == before
    assert a.new_driver().settle() == []
    acts[what]()
    assert a.state_of(guest) == ("shutoff" if what == "suspend" else "running")
    a.driver.resume(None, guest)
    assert a.state_of(guest) == "running"


@contextlib.contextmanager
def small(world: World) -> Iterator[Path]:
    """Have the backend on a file system of its own; yield a file to fill it with."""
    cluster: Any = None
    place = places.of_directory(
        places.EXT4, "none", world.a.host, "", world.tmp, cluster
    )
    with place as values:
        world.a.clear()
        world.a.path = Path(values["path"])
        world.a.new_driver()
        try:
            yield world.a.path.parent / "filler"
        finally:
            world.a.clear()


def fill(filler: Path) -> None:
    """Leave room for records only."""
    with filler.open("wb") as file:
        for step in (64 * MiB, MiB, 4096):
            with contextlib.suppress(OSError):
                while True:
                    os.posix_fallocate(file.fileno(), file.seek(0, 2), step)
        file.truncate(file.seek(0, 2) - MiB // 2)


@pytest.mark.parametrize("state", ["running", "off"])
def test_no_room_to_merge(world: World, state: str) -> None:
    a = world.a
    with small(world) as filler:
        guest = world.spawn(a)
        snapshots, uuid = a.driver.snapshots, guest.uuid
        snapshots.create(uuid, Wanted("first"))
        offsets = range(2 * MiB, 6 * MiB, 64 * KiB)
        for number, offset in enumerate(offsets, start=1):
            write(a, guest, number, offset)
        power(a, guest, state)
        fill(filler)
        with pytest.raises(errors.Error, match="room for it"):
            snapshots.delete(uuid, "first")
        assert a.driver.settle() != []
        assert byte(world, guest) == 1
        assert a.state_of(guest) == {"off": "shutoff"}.get(state, state)
        filler.unlink()
        assert a.driver.settle() == []
        assert byte(world, guest, offsets[-1]) == len(offsets)
        owned = [s for s in a.driver.node.files.catalog.all() if s.body.owner == uuid]
        assert len(owned) == 1
        assert consistency.check(a.driver.node) == []


def slow(after: float) -> Progress:
    """Progress that somebody cancels, seconds after the freezing began."""
    made: list[Progress] = []

    def look(report: Report) -> None:
        if report.phase == "freezing":
            threading.Timer(after, made[0].cancel).start()

    made.append(Progress(look, interval=0))
    return made[0]


@pytest.mark.parametrize("why", ["cancelled", "too late"])
@pytest.mark.parametrize("state", ["running", "paused"])
def test_memory_is_given_up(world: World, why: str, state: str) -> None:
    a, snapshots = world.a, world.a.driver.snapshots
    # It takes seconds to look through, and no room.
    guest = world.spawn(a, memory_mb=8192)
    write(a, guest, 1)
    power(a, guest, state)
    before = {name for name in a.files() if "instances" not in name}
    limit = 0.05 if why == "too late" else 60
    progress = slow(0.05) if why == "cancelled" else None
    began = time.monotonic()
    with pytest.raises((errors.Cancelled, errors.SnapshotFailed)):
        snapshots.create(guest.uuid, checkpoint("x", timeout=limit), progress)
    assert time.monotonic() - began < 30
    assert {name for name in a.files() if "instances" not in name} == before
    assert a.state_of(guest) == state
    assert byte(world, guest) == 1
    assert consistency.check(a.driver.node) == []
    assert a.driver.settle() == []


def test_names_at_their_limits(world: World, guest: Any) -> None:
    snapshots, uuid = world.a.driver.snapshots, guest.uuid
    longest = "a" * 64
    for wanted in (Wanted(longest + "a"), Wanted("x", layer=longest + "a")):
        with pytest.raises(errors.SnapshotRefused, match="64 at most"):
            snapshots.create(uuid, wanted)
    snapshots.create(uuid, Wanted(longest, layer=longest, description="d" * 4096))
    write(world.a, guest, 2)
    with pytest.raises(errors.SnapshotRefused, match="64 at most"):
        snapshots.revert(uuid, Return(longest, layer="../x"))
    snapshots.revert(uuid, Return(longest, layer=longest))
    assert byte(world, guest) == 1
    snapshots.delete(uuid, longest)
    assert byte(world, guest) == 1


def test_limits(world: World, guest: Any) -> None:
    world.a.overrides = {"max_chain": 3, "max_snapshots": 4}
    world.a.new_driver()
    snapshots, uuid = world.a.driver.snapshots, guest.uuid
    for number in (1, 2):
        snapshots.create(uuid, Wanted(f"s{number}"))
        write(world.a, guest, number + 1)
    with pytest.raises(errors.SnapshotRefused, match="max_chain"):
        snapshots.create(uuid, Wanted("s3"))
    with pytest.raises(errors.SnapshotRefused, match="max_chain"):
        snapshots.revert(uuid, Return("s1", keep="s3"))
    snapshots.revert(uuid, Return("s1"))
    for number in (3, 4):
        snapshots.create(uuid, Wanted(f"s{number}"))
        snapshots.revert(uuid, Return("s1"))
    with pytest.raises(errors.SnapshotRefused, match="max_snapshots"):
        snapshots.create(uuid, Wanted("s5"))
    assert byte(world, guest) == 1
    assert consistency.check(world.a.driver.node) == []


@pytest.mark.parametrize("what", ["the guest ends", "libvirtd ends"])
def test_it_ends_while_memory_is_written(world: World, what: str) -> None:
    a, snapshots = world.a, world.a.driver.snapshots
    guest = world.spawn(a, memory_mb=8192)
    write(a, guest, 1)
    before = {name for name in a.files() if "instances" not in name}
    striking: list[threading.Timer] = []

    def look(report: Report) -> None:
        if report.phase == "freezing" and not striking:
            striking.append(threading.Timer(0.3, strike))
            striking[0].start()

    def strike() -> None:
        if what == "libvirtd ends":
            a.host.kill_libvirtd()
            return
        with contextlib.suppress(libvirt.libvirtError), a.libvirt() as conn:
            conn.lookupByUUIDString(guest.uuid).destroy()

    with pytest.raises(errors.Error):
        snapshots.create(guest.uuid, checkpoint("x"), Progress(look, interval=0))
    striking[0].join()
    a.host.start_libvirtd()
    assert a.new_driver().settle() == []
    assert {name for name in a.files() if "instances" not in name} == before
    state = "running" if what == "libvirtd ends" else "shutoff"
    assert a.state_of(guest) == state
    assert byte(world, guest) == 1
    a.driver.power_on(None, guest, None)
    a.driver.snapshots.create(guest.uuid, Wanted("after"))


@pytest.mark.parametrize("what", ["the guest ends", "libvirtd ends"])
def test_it_ends_while_a_layer_is_merged(
    world: World, guest: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, uuid = world.a, guest.uuid
    a.driver.snapshots.create(uuid, Wanted("first"))
    write(a, guest, 2)
    pivot = merging._pivot
    ended: list[str] = []

    def strike(domain: "libvirt.virDomain", target: str) -> None:
        if ended:
            pivot(domain, target)
        elif what == "libvirtd ends":
            a.host.kill_libvirtd()
        else:
            domain.destroy()
        ended.append(target)

    monkeypatch.setattr(merging, "_pivot", strike)
    with contextlib.suppress(errors.Error):
        a.driver.snapshots.delete(uuid, "first")
    assert ended
    a.host.start_libvirtd()
    assert a.new_driver().settle() == []
    assert a.driver.snapshots.all(uuid) == ((), None)
    assert byte(world, guest) == 2
    state = "running" if what == "libvirtd ends" else "shutoff"
    assert a.state_of(guest) == state
    owned = [s for s in a.driver.node.files.catalog.all() if s.body.owner == uuid]
    assert len(owned) == 1
    assert consistency.check(a.driver.node) == []
    a.driver.power_on(None, guest, None)
    a.driver.snapshots.create(uuid, Wanted("after"))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("state", ["running", "off"])
def test_it_ends_where_the_domain_is_defined(
    world: World, guest: Any, state: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the domain names is there, and it starts."""
    a, uuid = world.a, guest.uuid
    a.driver.snapshots.create(uuid, Wanted("first"))
    write(a, guest, 2)
    power(a, guest, state)
    define, calls = Work.define, list(range(count))

    def end(work: Work, text: str, found: model.Instance) -> None:
        calls.pop()
        if not calls:
            raise KeyboardInterrupt
        define(work, text, found)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Work, "define", end)
        a.driver.snapshots.delete(uuid, "first")
    assert a.new_driver().settle() == []
    assert byte(world, guest) == 2
    power(a, guest, "off")
    a.driver.power_on(None, guest, None)
    assert a.disk(guest).name == a.driver.node.entitled(uuid).disks[0].volume
    assert consistency.check(a.driver.node) == []


def test_it_ends_where_a_new_snapshot_is_told(
    world: World, guest: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The domain says what the record says, and names the end of its chain."""
    a, uuid = world.a, guest.uuid

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Work, "define", end)
        a.driver.snapshots.create(uuid, Wanted("first"))
    assert a.new_driver().settle() == []
    (first,), _ = a.driver.snapshots.all(uuid)
    text = a.driver.node.domains.xml(uuid)
    assert first.id in str(domainxml.metadata_of(text))
    assert len(domainxml.disks(text)[0].chain) == 2


def test_a_repair_leaves_an_open_change_alone(
    world: World, guest: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its memory is not published yet, and it is finished all the same."""
    a, uuid = world.a, guest.uuid

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(creation.Creation, "_commit", end)
        a.driver.snapshots.create(uuid, checkpoint("first"))
    found = consistency.check(a.driver.node)
    assert [said for _, said in consistency.repair(found) if said] == []
    assert a.driver.settle() == []
    write(a, guest, 2)
    a.driver.snapshots.revert(uuid, Return("first"))
    assert byte(world, guest) == 1


def test_a_snapshot_without_its_volumes(world: World, guest: Any) -> None:
    a, uuid, backend = world.a, guest.uuid, world.a.driver.node.files
    a.driver.snapshots.create(uuid, checkpoint("first"))
    (first,), _ = a.driver.snapshots.all(uuid)
    gone = [first.memory_volume, first.disks[0].volume]
    for name in gone:
        backend.volumes.remove(name)
    found = [each for each in consistency.check(a.driver.node) if each.name == uuid]
    assert {each.kind for each in found} == {consistency.Kind.MISSING}
    assert sorted(each.detail for each in found) == sorted(
        f"its snapshots: {name} has no record" for name in gone
    )


def test_nothing_is_removed_while_a_record_cannot_be_read(
    world: World, guest: Any
) -> None:
    """It is of a layer that stands on what would be written to."""
    a, uuid, snapshots = world.a, guest.uuid, world.a.driver.snapshots
    snapshots.create(uuid, Wanted("first"))
    write(a, guest, 2)
    snapshots.create(uuid, Wanted("second"))
    branch = snapshots.all(uuid)[0][-1].disks[0].volume
    snapshots.revert(uuid, Return("first"))
    write(a, guest, 3)
    paths = [each for each in a.path.rglob("*") if f"{branch}.rec." in each.name]
    kept = {path: path.read_bytes() for path in paths}
    for path in paths:
        path.write_bytes(b"broken")
    # A driver that had read it would remember.
    with pytest.raises(errors.RecordError):
        a.new_driver().snapshots.delete(uuid, "first")
    assert a.new_driver().settle() != []
    assert byte(world, guest) == 3
    for path, text in kept.items():
        path.write_bytes(text)
    assert a.new_driver().settle() == []
    a.driver.snapshots.revert(uuid, Return("second"))
    assert byte(world, guest) == 2


def test_a_layer_in_another_chain_is_not_merged(world: World, guest: Any) -> None:
    a, uuid = world.a, guest.uuid
    a.driver.snapshots.create(uuid, Wanted("first"))
    merges = merging.Merges(a.driver.node.host)
    top, below = (layer.source for layer in domainxml.disks(a.xml(guest))[0].chain)
    assert not merges.merge(uuid, "vda", "/nowhere/top", "/nowhere/base")
    assert merges.merge(uuid, "vda", top, below)
    assert merges.merge(uuid, "vda", top, below)
