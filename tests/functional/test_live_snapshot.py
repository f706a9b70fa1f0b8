# SPDX-License-Identifier: Apache-2.0
"""Running instances that become images: their guests go on, and the images boot."""

import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox import guest as guests
from tests.functional import guestdisk
from tests.functional.conftest import Node, World
from tests.functional.test_agent import wait_for
from virtmigrate import consistency, errors, livesnapshot, snapshottree
from virtmigrate.livesnapshot import Kind, Target, Wanted, outgoing, packing
from virtmigrate.progress import Progress, Report
from virtmigrate.snapshot import Return
from virtmigrate.snapshot import Wanted as Snapshot
from virtmigrate.units import KiB, MiB

FORMATS = ("raw", "qcow2")


def to_file(path: Path, fmt: str = "qcow2", **options: Any) -> Wanted:
    target = Target(kind=Kind.FILE, where=str(path), name=path.name)
    return Wanted(target=target, format=fmt, **options)


def save(node: Node, instance: Any, wanted: Wanted) -> list[livesnapshot.Saved]:
    return node.driver.saves.save(instance.uuid, wanted, node.progress)


def raw_of(path: Path, fmt: str, tmp: Path) -> bytes:
    """What a guest sees of an image, by QEMU's tool."""
    out = tmp / "as-raw"
    argv = ["qemu-img", "convert", "-f", fmt, "-O", "raw", str(path), str(out)]
    subprocess.run(argv, check=True, timeout=60)
    return out.read_bytes()


def expect_clean(
    node: Node, instance: Any, power: str = "running", layers: int = 1
) -> None:
    """It has the disks that it had, no snapshot, and nothing is open."""
    driver = node.driver
    record = driver.node.entitled(instance.uuid)
    assert record.snapshots == () and record.change is None
    for ref in record.disks:
        assert len(driver.node.backend(ref.backend).chain(ref.volume)) == layers
    assert consistency.check(driver.node) == []
    assert node.state_of(instance) == power
    # A journal without a first step is of nothing; it goes when it is old.
    assert [p for p in (node.state / "images").glob("*") if p.stat().st_size] == []
    assert driver.settle() == []


@pytest.fixture
def instance(world: World) -> Any:
    made = world.spawn(world.a)
    guestdisk.write(world.a, made, 7)
    return made


class Gate:
    """Stops the reading of a disk after its first bytes, until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        self.error: BaseException | None = None
        piece = outgoing.Outgoing._piece

        def stopped(image: Any, start: int, end: int) -> bytes | None:
            if start >= MiB:
                self.reached.set()
                assert self.go.wait(100)
            return piece(image, start, end)

        monkeypatch.setattr(outgoing.Outgoing, "_piece", stopped)
        monkeypatch.setattr(outgoing, "_AHEAD", 1)
        monkeypatch.setattr(outgoing, "_READERS", 1)

    def run(self, work: Callable[[], object]) -> None:
        def body() -> None:
            try:
                work()
            except BaseException as e:
                self.error = e

        self._thread = threading.Thread(target=body, daemon=True)
        self._thread.start()
        assert self.reached.wait(60), self.error

    def end(self) -> BaseException | None:
        self.go.set()
        self._thread.join(100)
        assert not self._thread.is_alive()
        return self.error


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.go.set()


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_file_of_what_the_guest_saw(
    world: World, instance: Any, tmp_path: Path, fmt: str
) -> None:
    path = tmp_path / f"saved.{fmt}"
    expected = world.read(world.a, instance)
    reports: list[Report] = []
    world.a.progress = Progress(reports.append, interval=0)
    (saved,) = save(world.a, instance, to_file(path, fmt))
    assert raw_of(path, fmt, tmp_path) == expected
    assert expected[guestdisk.OFFSET] == 7
    assert (saved.disk, saved.format) == ("vda", fmt)
    assert (saved.size, saved.virtual_size) == (path.stat().st_size, len(expected))
    assert saved.consistency == "crash"
    assert path.stat().st_blocks * 512 < 2 * MiB
    assert reports[-1].phase == "merging"
    told = [each for each in reports if each.phase == "saving vda"]
    assert told[-1].done == told[-1].total == saved.size
    assert [each.name for each in tmp_path.iterdir() if each.name[0] == "."] == []
    expect_clean(world.a, instance)


@pytest.mark.timeout(400)
def test_the_guest_goes_on_and_the_image_boots(world: World, tmp_path: Path) -> None:
    """Its records are whole, up to a moment of the saving; and so are its own later."""
    a = world.a
    image = guests.image().path
    instance = world.spawn(a, image, memory_mb=128)
    console = a.host.logs / f"qemu/virtmigrate-{instance.uuid}.log"

    def beat() -> int:
        return guests.beats(console)[-1].number if guests.beats(console) else 0

    wait_for(lambda: beat() > 1, 90)
    before = beat()
    path = tmp_path / "saved.qcow2"
    save(a, instance, to_file(path, bandwidth=16 * MiB))
    after = beat()
    wait_for(lambda: beat() > after + 1, 60)
    raw = tmp_path / "raw"
    raw.write_bytes(raw_of(path, "qcow2", tmp_path))
    log = guests.verify(raw)
    assert log.problems == [] and log.boots == 1
    assert before <= log.last <= after
    expect_clean(a, instance)
    a.driver.power_off(instance)
    now = tmp_path / "now"
    now.write_bytes(world.read(a, instance))
    assert guests.verify(now).problems == []
    assert guests.verify(now).last >= after + 1
    a.driver.destroy(None, instance, None)

    other = world.instance(memory_mb=128)
    meta = {"path": str(path), "id": "saved", "disk_format": "qcow2"}
    a.driver.spawn(None, other, meta)
    console = a.host.logs / f"qemu/virtmigrate-{other.uuid}.log"
    wait_for(lambda: len(guests.beats(console)) > 1, 90)
    assert guests.boots(console) == [log.last + 1]


def test_compressed(world: World, instance: Any, tmp_path: Path) -> None:
    """Of a chain, whose data compresses well; staged, and proven by its content."""
    a, path = world.a, tmp_path / "saved.qcow2"
    a.driver.snapshots.create(instance.uuid, Snapshot("old"))
    for offset in range(3 * MiB, 6 * MiB, 64 * KiB):
        guestdisk.write(a, instance, 5, offset=offset)
    expected = world.read(a, instance)
    plain = save(a, instance, to_file(tmp_path / "plain"))[0].size
    (saved,) = save(a, instance, to_file(path, compress=True))
    assert raw_of(path, "qcow2", tmp_path) == expected
    assert saved.size == path.stat().st_size < plain - 2 * MiB
    assert list((a.state / "staging").iterdir()) == []
    with pytest.raises(errors.ConfigurationError, match="only qcow2"):
        save(a, instance, to_file(tmp_path / "no", "raw", compress=True))
    a.driver.snapshots.delete(instance.uuid, "old")
    expect_clean(a, instance)


def test_what_was_compressed_is_compared(
    world: World, instance: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tool that writes something else makes no image."""
    run = packing.Packer._run

    def spoiled(packer: packing.Packer, *args: Any) -> None:
        run(packer, *args)
        path = next(each for each in args if isinstance(each, Path))
        argv = ["qemu-io", "-f", "qcow2", "-c", "write -P 1 2M 64k", str(path)]
        subprocess.run(argv, check=True, timeout=60, stdout=subprocess.DEVNULL)

    monkeypatch.setattr(packing.Packer, "_run", spoiled)
    with pytest.raises(errors.ImageNotSaved) as caught:
        save(world.a, instance, to_file(tmp_path / "saved", compress=True))
    assert isinstance(caught.value.__cause__, errors.VerificationFailed)
    assert list(tmp_path.glob("*saved*")) == []
    assert list((world.a.state / "staging").iterdir()) == []
    expect_clean(world.a, instance)


def test_power_changes_meanwhile_do_no_harm(
    world: World, instance: Any, tmp_path: Path, gate: Gate
) -> None:
    a, path = world.a, tmp_path / "saved.raw"
    gate.run(lambda: save(a, instance, to_file(path, "raw")))
    guestdisk.write(a, instance, 9)
    a.driver.power_off(instance)
    a.driver.power_on(None, instance, None)
    guestdisk.write(a, instance, 8, offset=4 * MiB)
    a.driver.power_off(instance)
    assert gate.end() is None
    assert path.read_bytes()[guestdisk.OFFSET] == 7
    assert path.read_bytes()[4 * MiB] == 0
    expect_clean(a, instance, "shutoff")
    assert guestdisk.byte(world, instance) == 9
    assert guestdisk.byte(world, instance, 4 * MiB) == 8


def test_a_guest_that_is_off_gets_no_layer(
    world: World, instance: Any, tmp_path: Path, gate: Gate
) -> None:
    a, path = world.a, tmp_path / "saved.qcow2"
    a.overrides["lock_timeout"] = 1.0
    a.driver.power_off(instance)
    a.new_driver()
    gate.run(lambda: save(a, instance, to_file(path)))
    assert a.driver.snapshots.all(instance.uuid) == ((), None)
    with pytest.raises(errors.InstanceBusy):
        a.driver.power_on(None, instance, None)
    assert gate.end() is None
    assert raw_of(path, "qcow2", tmp_path)[guestdisk.OFFSET] == 7
    expect_clean(a, instance, "shutoff")


def test_what_is_refused_meanwhile(
    world: World, instance: Any, tmp_path: Path, gate: Gate
) -> None:
    """Moves, a second image, deletions that would write to what is read."""
    a, path = world.a, tmp_path / "saved.raw"
    a.driver.snapshots.create(instance.uuid, Snapshot("old"))
    guestdisk.write(a, instance, 9)
    gate.run(lambda: save(a, instance, to_file(path, "raw")))
    with pytest.raises(errors.MigrationRefused, match="an image is being made"):
        world.migrate(instance)
    with pytest.raises(errors.InstanceBusy, match="another image"):
        save(a, instance, to_file(tmp_path / "other"))
    with pytest.raises(errors.SnapshotRefused, match="an image is being made"):
        a.driver.snapshots.delete(instance.uuid, "old")
    # These do no harm.
    guestdisk.write(a, instance, 1)
    a.driver.snapshots.create(instance.uuid, Snapshot("new"))
    a.driver.snapshots.revert(instance.uuid, Return("old"))
    assert a.driver.settle() == []
    assert gate.end() is None
    assert path.read_bytes()[guestdisk.OFFSET] == 9
    tree, _ = a.driver.snapshots.all(instance.uuid)
    assert [each.name for each in tree] == ["old", "new"]
    assert guestdisk.byte(world, instance) == 7
    assert consistency.check(a.driver.node) == []


def test_an_instance_that_is_destroyed_meanwhile(
    world: World, instance: Any, tmp_path: Path, gate: Gate
) -> None:
    """What was opened is read to its end: the image is what it was."""
    a, path = world.a, tmp_path / "saved.raw"
    expected = world.read(a, instance)
    gate.run(lambda: save(a, instance, to_file(path, "raw")))
    a.driver.destroy(None, instance, None)
    assert a.files() == []
    assert gate.end() is None
    assert path.read_bytes() == expected
    assert a.files() == []
    assert a.driver.settle() == [] and not list((a.state / "images").iterdir())


def test_its_snapshot_deleted_by_hand_is_no_image(
    world: World, instance: Any, tmp_path: Path, gate: Gate
) -> None:
    """What is read was written to: that is seen before the last byte goes."""
    a, path = world.a, tmp_path / "saved.qcow2"
    gate.run(lambda: save(a, instance, to_file(path)))
    guestdisk.write(a, instance, 9)
    (made,) = a.driver.snapshots.all(instance.uuid)[0]
    assert made.by.startswith(snapshottree.IN_THE_MAKING)
    a.driver.snapshots.delete(instance.uuid, made.name)
    error = gate.end()
    assert isinstance(error, errors.ImageNotSaved), error
    assert isinstance(error.__cause__, errors.SourceChanged | errors.SourceUnreadable)
    assert list(tmp_path.glob("*saved*")) == []
    expect_clean(a, instance)
    assert guestdisk.byte(world, instance) == 9


def test_what_another_host_left_is_in_nobodys_way(
    world: World, instance: Any, tmp_path: Path
) -> None:
    """A snapshot without its operation: moves wait until it is deleted by its name."""
    a = world.a
    left = Snapshot("image-left", by=snapshottree.IN_THE_MAKING + "elsewhere")
    a.driver.snapshots.create(instance.uuid, left)
    save(a, instance, to_file(tmp_path / "saved"))
    with pytest.raises(errors.MigrationRefused, match="an image is being made"):
        world.migrate(instance)
    a.driver.snapshots.delete(instance.uuid, "image-left")
    expect_clean(a, instance)


def test_cancelled(world: World, instance: Any, tmp_path: Path, gate: Gate) -> None:
    a, path = world.a, tmp_path / "saved.qcow2"
    gate.run(lambda: save(a, instance, to_file(path)))
    a.progress.cancel()
    assert isinstance(gate.end(), errors.Cancelled)
    assert list(tmp_path.glob("*saved*")) == []
    expect_clean(a, instance)


def test_too_late(world: World, instance: Any, tmp_path: Path) -> None:
    # At 64 KiB a second it takes half a minute.
    wanted = to_file(tmp_path / "saved.raw", "raw", bandwidth=64 * KiB, timeout=2.0)
    with pytest.raises(errors.ImageNotSaved, match="longer than 2 s"):
        save(world.a, instance, wanted)
    assert list(tmp_path.glob("*saved*")) == []
    expect_clean(world.a, instance)


def test_no_room_in_the_middle(world: World, instance: Any, tmp_path: Path) -> None:
    """A full file system: a real one, of 1 MiB."""
    mount = tmp_path / "small"
    mount.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", "size=1m", "li", str(mount)]
    subprocess.run(argv, check=True, timeout=60)
    try:
        with pytest.raises(errors.ImageNotSaved, match="no room for it"):
            save(world.a, instance, to_file(mount / "saved.raw", "raw"))
        assert list(mount.iterdir()) == []
    finally:
        subprocess.run(["umount", str(mount)], check=True, timeout=60)
    guestdisk.write(world.a, instance, 9)
    expect_clean(world.a, instance)
    assert guestdisk.byte(world, instance) == 9


def test_a_file_that_is_there_is_not_replaced(
    world: World, instance: Any, tmp_path: Path
) -> None:
    path = tmp_path / "saved"
    path.write_text("precious")
    with pytest.raises(errors.ImageNotTaken, match="such a file already"):
        save(world.a, instance, to_file(path))
    assert path.read_text() == "precious"
    expect_clean(world.a, instance)


def test_the_layer_is_kept(world: World, instance: Any, tmp_path: Path) -> None:
    wanted = to_file(tmp_path / "saved", keep_layer=True, by="somebody")
    save(world.a, instance, wanted)
    ((made,), current) = world.a.driver.snapshots.all(instance.uuid)
    assert (made.by, current) == ("somebody", made.id)
    world.a.driver.snapshots.delete(instance.uuid, made.name)
    expect_clean(world.a, instance)


def test_all_disks_are_of_one_moment(world: World, tmp_path: Path, gate: Gate) -> None:
    """And none is left where one fails, not even those that were published."""
    a = world.a
    instance = world.spawn(a, ephemeral_gb=1)
    guestdisk.write(a, instance, 3)
    guestdisk.write(a, instance, 4, disk=1)
    first, second = tmp_path / "saved.raw", tmp_path / "saved-vdb.raw"
    wanted = to_file(first, "raw", all_disks=True)
    gate.run(lambda: save(a, instance, wanted))
    second.write_text("precious")
    error = gate.end()
    assert isinstance(error, errors.ImageNotSaved), error
    assert [each.name for each in tmp_path.glob("*saved*")] == [second.name]
    assert second.read_text() == "precious"
    expect_clean(a, instance)

    second.unlink()
    found = save(a, instance, wanted)
    assert [each.disk for each in found] == ["vda", "vdb"]
    for path, byte in ((first, 3), (second, 4)):
        with path.open("rb") as file:
            file.seek(guestdisk.OFFSET)
            assert file.read(1) == bytes([byte])
    expect_clean(a, instance)


def test_one_disk_leaves_the_others_alone(world: World, tmp_path: Path) -> None:
    a = world.a
    instance = world.spawn(a, ephemeral_gb=1)
    before = a.disk(instance, "vdb")
    save(a, instance, to_file(tmp_path / "saved", keep_layer=True))
    assert a.disk(instance, "vdb") == before
