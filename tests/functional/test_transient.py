# SPDX-License-Identifier: Apache-2.0
"""Transient disks: what a guest writes goes when it is off, and the disk stays."""

import json
import os
import signal
import subprocess
import sys
import time
import types
import uuid as uuids
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import msgspec
import pytest

from sandbox import guest as guests
from tests.functional import guestdisk
from tests.functional.conftest import Node, World, digest, guest_view
from tests.functional.guestdisk import LENGTH, OFFSET, write
from tests.functional.test_cli import configuration
from virtmigrate import consistency, domainxml, errors, scratch, transient
from virtmigrate.backends import making
from virtmigrate.instance import Domains
from virtmigrate.snapshot import Memory, Return, Wanted
from virtmigrate.units import GiB, MiB

SIZE = 8 * MiB


def spawn(world: World, *targets: str, fmt: str = "raw", **flavor: int) -> Any:
    """A guest without a system, some of whose disks are transient."""
    made = world.instance(**flavor)
    made.flavor.extra_specs = {"virtmigrate:transient": ",".join(targets)}
    meta = {"path": str(world.image()), "disk_format": "raw"}
    if fmt == "qcow2":
        # From the cache: a layer over an image.
        meta["id"] = str(uuids.uuid4())
    world.a.driver.spawn(None, made, meta)
    return made


def layers(node: Node, instance: Any) -> list[str]:
    """The files of layers that lie in the host's directory, whatever records say."""
    found = [name for name in node.files() if "-transient." in name]
    return [name for name in found if ".rec." not in name]


def chain(node: Node, instance: Any, target: str = "vda") -> list[Path]:
    """The files of the disk itself."""
    here = node.driver.node
    refs = here.entitled(instance.uuid).disks
    (ref,) = (ref for ref in refs if ref.target == target)
    found = here.backend(ref.backend).layers(ref.volume)
    return [Path(layer.source) for layer in found]


def digests(node: Node, instance: Any, target: str = "vda") -> list[str]:
    return [digest(path) for path in chain(node, instance, target)]


def seen(world: World, node: Node, instance: Any, target: str = "vda") -> int:
    """What a block holds for a guest that runs, or is saved; by qemu-img."""
    here = node.driver.node
    record = here.entitled(instance.uuid)
    (ref,) = (ref for ref in record.disks if ref.target == target)
    below = here.backend(ref.backend).layers(ref.volume)
    top = here.scratch.tops(record)[target]
    out = world.tmp / "seen"
    first = OFFSET // LENGTH
    # It counts the blocks that it skips, too.
    argv = ["qemu-img", "dd", "-U", "-O", "raw", f"bs={LENGTH}", f"skip={first}"]
    argv += [f"count={first + 1}", f"if={guest_view((top, *below))}", f"of={out}"]
    subprocess.run(argv, check=True, timeout=60)
    found = set(out.read_bytes())
    assert len(found) == 1
    return found.pop()


def domain(conn: "libvirt.virConnect", instance: Any) -> "libvirt.virDomain":
    return conn.lookupByUUIDString(instance.uuid)


def crash(node: Node, instance: Any) -> None:
    """Have QEMU gone as with its host, and wait until libvirt has seen it."""
    argv = ["cat", f"/run/libvirt/qemu/{instance.name}.pid"]
    node.host.run(["kill", "-9", node.host.run(argv).stdout.strip()])
    wait_for(lambda: node.state_of(instance) == "shutoff")


def wait_for(is_so: Callable[[], bool], timeout: float = 240) -> None:
    deadline = time.monotonic() + timeout
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture
def guest(world: World) -> Iterator[Any]:
    """One that runs; its root is transient."""
    made = spawn(world, "vda")
    yield made
    world.a.driver.destroy(None, made)
    assert world.a.files() == []


# What goes, and what stays


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_thrown_away(world: World, fmt: str) -> None:
    a, guest = world.a, spawn(world, "vda", fmt=fmt)
    assert len(chain(a, guest)) == {"raw": 1, "qcow2": 2}[fmt]
    before = digests(a, guest)
    for end in (a.driver.power_off, lambda each: crash(a, each)):
        write(a, guest, 7)
        assert seen(world, a, guest) == 7
        assert len(layers(a, guest)) == 1
        end(guest)
        assert a.driver.settle() == []
        assert layers(a, guest) == []
        assert digests(a, guest) == before
        a.driver.power_on(None, guest, None)
        assert seen(world, a, guest) == 0
    assert consistency.check(a.driver.node) == []
    assert a.driver.settle() == []
    assert len(layers(a, guest)) == 1
    a.driver.destroy(None, guest)
    assert layers(a, guest) == []


def test_a_start_drops_what_is_left(world: World, guest: Any) -> None:
    """Without a settle between them."""
    a = world.a
    write(a, guest, 7)
    (old,) = layers(a, guest)
    crash(a, guest)
    a.driver.power_on(None, guest, None)
    assert seen(world, a, guest) == 0
    assert old not in layers(a, guest)
    assert len(layers(a, guest)) == 1


def test_the_host_loses_power(world: World, guest: Any) -> None:
    a = world.a
    before = digests(a, guest)
    write(a, guest, 7)
    a.driver.cleanup_host("alpha")
    for pid in a.host.qemu_pids():
        os.kill(pid, signal.SIGKILL)
    a.host.kill_libvirtd()
    a.host.start_libvirtd()
    a.new_driver()
    assert a.state_of(guest) == "shutoff"
    assert layers(a, guest) == []
    a.driver.power_on(None, guest, None)
    assert seen(world, a, guest) == 0
    assert digests(a, guest) == before


def test_kept_by_what_is_no_end(world: World, guest: Any) -> None:
    a = world.a
    write(a, guest, 7)
    with a.libvirt() as conn:
        domain(conn, guest).reset(0)
    a.driver.pause(guest)
    assert a.new_driver().settle() == []
    a.driver.unpause(guest)
    assert seen(world, a, guest) == 7
    a.driver.suspend(None, guest)
    assert a.state_of(guest) == "shutoff"
    assert a.new_driver().settle() == []
    a.driver.resume(None, guest)
    assert a.state_of(guest) == "running"
    assert seen(world, a, guest) == 7


def test_memory_that_is_dropped_takes_it_along(world: World, guest: Any) -> None:
    a = world.a
    write(a, guest, 7)
    a.driver.suspend(None, guest)
    with a.libvirt() as conn:
        domain(conn, guest).managedSaveRemove(0)
    assert a.driver.settle() == []
    assert layers(a, guest) == []


def test_reboots(world: World) -> None:
    a = world.a
    # It has no system that would hear.
    a.overrides |= {"shutdown_timeout": 1}
    a.new_driver()
    guest = spawn(world, "vda")
    before = digests(a, guest)
    write(a, guest, 7)
    a.driver.reboot(None, guest, None, "SOFT")
    assert seen(world, a, guest) == 7
    a.driver.reboot(None, guest, None, "HARD")
    assert seen(world, a, guest) == 0
    assert len(layers(a, guest)) == 1
    assert digests(a, guest) == before


@pytest.mark.timeout(900)
def test_a_real_guest(world: World) -> None:
    """Its counter on one disk goes on, on the other it begins anew."""
    a, made = world.a, world.instance(memory_mb=128, ephemeral_gb=1)
    made.flavor.extra_specs = {"virtmigrate:transient": "vdb"}
    meta = {"path": str(guests.image().path), "disk_format": "raw"}
    a.driver.spawn(None, made, meta)
    console = a.host.logs / f"qemu/virtmigrate-{made.uuid}.log"
    before = digests(a, made, "vdb")

    def beats_since(boots: int, count: int) -> list[guests.Beat]:
        """The first beats after so many boots."""
        wait_for(lambda: len(after(boots)) >= count)
        return after(boots)

    def after(boots: int) -> list[guests.Beat]:
        text = console.read_text(errors="replace").replace("\r", "")
        parts = text.split("BOOT ")
        if len(parts) <= boots:
            return []
        found = guests.BEAT.findall(parts[boots])
        return [guests.Beat(int(n), c, guests.further_disks(r)) for n, c, r in found]

    first = beats_since(1, 2)
    assert (first[0].number, first[0].disks) == (1, {"vdb": 1})
    with a.libvirt() as conn:
        domain(conn, made).reset(0)
    again = beats_since(2, 2)[0]
    assert again.number > 2 and again.disks["vdb"] > 2
    a.driver.power_off(made, timeout=60, retry_interval=5)
    assert "HALT" in console.read_text(errors="replace")
    number = guests.beats(console)[-1].number
    assert a.driver.settle() == []
    assert layers(a, made) == []
    assert digests(a, made, "vdb") == before
    a.driver.power_on(None, made, None)
    cold = beats_since(3, 1)[0]
    assert (cold.number, cold.disks) == (number + 1, {"vdb": 1})
    a.driver.destroy(None, made)


# The bound


@pytest.mark.timeout(600)
def test_limit(world: World) -> None:
    """QEMU pauses a guest whose layer is full, and never writes more."""
    a, made = world.a, world.instance(memory_mb=128, ephemeral_gb=1)
    a.overrides |= {"transient_limit_mib": 2}
    a.new_driver()
    made.flavor.extra_specs = {"virtmigrate:transient": "vdb"}
    meta = {"path": str(guests.image().path), "disk_format": "raw"}
    a.driver.spawn(None, made, meta, power_on=False)
    before = digests(a, made, "vdb")
    with a.driver.node.claimed(made.uuid):
        a.driver.node.start(made.uuid, paused=True)
    for number in range(64):
        # All of the room, by clusters that the guest's own one is none of.
        fill(a, made, 512 * MiB + number * 64 * 1024)
    (file,) = [a.path / name for name in layers(a, made)]
    assert file.stat().st_size == 2 * MiB
    a.driver.unpause(made)
    wait_for(lambda: a.state_of(made) == "paused")
    with a.libvirt() as conn:
        assert domain(conn, made).diskErrors(0) == {
            "vdb": libvirt.VIR_DOMAIN_DISK_ERROR_NO_SPACE
        }
    (said,) = a.driver.settle()
    assert "transient disk vdb cannot take more (no space" in said
    assert file.stat().st_size == 2 * MiB
    assert file.stat().st_blocks * 512 <= 2 * MiB
    a.driver.power_off(made)
    assert a.driver.settle() == []
    assert digests(a, made, "vdb") == before
    a.driver.destroy(None, made)


def fill(node: Node, instance: Any, offset: int) -> None:
    guestdisk.write(node, instance, 9, offset, disk=1)


def test_all_of_a_disk_fits(world: World, guest: Any) -> None:
    """Without a limit a layer takes what the disk does."""
    a = world.a
    for offset in range(0, SIZE, 64 * 1024):
        write(a, guest, 9, offset)
    a.driver.suspend(None, guest)
    (file,) = [a.path / name for name in layers(a, guest)]
    argv = ["qemu-img", "map", "-f", "qcow2", "--output=json", str(file)]
    found = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    assert found.count('"data": true') >= 1
    assert '"present": false' not in found
    argv = ["qemu-img", "check", "-f", "qcow2", str(file)]
    assert subprocess.run(argv, timeout=60).returncode == 0
    a.driver.resume(None, guest)
    assert seen(world, a, guest) == 9


# Declared and not


def test_declared_later(world: World) -> None:
    a, guest = world.a, spawn(world)
    write(a, guest, 1)
    with pytest.raises(errors.TransientRefused, match="is running: turn it off"):
        a.driver.set_transient(guest.uuid, "vda", transient=True)
    a.driver.power_off(guest)
    for _ in range(2):
        a.driver.set_transient(guest.uuid, "vda", transient=True)
    a.driver.power_on(None, guest, None)
    write(a, guest, 2)
    assert seen(world, a, guest) == 2
    a.driver.power_off(guest)
    a.driver.set_transient(guest.uuid, "vda", transient=False)
    assert layers(a, guest) == []
    assert "readonly" not in a.driver.node.domains.xml(guest.uuid)
    a.driver.power_on(None, guest, None)
    assert guestdisk.byte(world, guest) == 1
    write(a, guest, 3)
    assert guestdisk.byte(world, guest) == 3
    assert layers(a, guest) == []


def test_declared_by_an_image(world: World) -> None:
    made = world.instance()
    meta = {
        "path": str(world.image()),
        "disk_format": "raw",
        "properties": {"virtmigrate_transient": "vda"},
    }
    world.a.driver.spawn(None, made, meta)
    write(world.a, made, 7)
    assert seen(world, world.a, made) == 7
    assert guestdisk.byte(world, made) == 0


def test_refused(world: World, guest: Any) -> None:
    a, uuid = world.a, guest.uuid
    before = a.files()
    with pytest.raises(errors.TransientRefused, match="writes to vda only"):
        a.driver.set_transient(uuid, "vdx", transient=True)
    with pytest.raises(errors.TransientRefused, match="writes to vda only"):
        spawn(world, "vdx")
    assert a.files() == before
    other = spawn(world)
    a.driver.snapshots.create(other.uuid, Wanted("s"))
    a.driver.power_off(other)
    with pytest.raises(errors.TransientRefused, match="snapshot s holds it"):
        a.driver.set_transient(other.uuid, "vda", transient=True)
    a.driver.snapshots.delete(other.uuid, "s")
    a.driver.set_transient(other.uuid, "vda", transient=True)
    a.driver.destroy(None, other)


PROGRAM = """
import sys
from virtmigrate.cli import instance, main
app = main.App()
app.command_manager.add_command("instance transient", instance.Transient)
sys.exit(app.run(sys.argv[1:]))
"""


def test_the_command(world: World, tmp_path: Path) -> None:
    a, guest = world.a, spawn(world)
    file = tmp_path / "virtmigrate.conf"
    file.write_text(configuration(world))

    def run(*words: str) -> "subprocess.CompletedProcess[str]":
        argv = [sys.executable, "-c", PROGRAM, "--config-file", str(file), *words]
        return subprocess.run(argv, capture_output=True, text=True, timeout=90)

    word = ("instance", "transient", guest.name, "vda")
    refused = run(*word, "on")
    assert refused.returncode == 1
    assert "the guest is running: turn it off first" in refused.stderr
    a.driver.power_off(guest)
    done = run(*word, "on", "-f", "json")
    assert json.loads(done.stdout)["transient"] is True
    (row,) = json.loads(run("instance", "list", "-f", "json").stdout)
    assert (row["uuid"], row["transient"]) == (guest.uuid, "vda")
    assert run(*word, "off").returncode == 0
    (row,) = json.loads(run("instance", "list", "-f", "json").stdout)
    assert row["transient"] is None


# Without us


def test_started_past_us(world: World, guest: Any) -> None:
    """By libvirt alone the disk is read-only, and a settle says what to do."""
    a = world.a
    before = digests(a, guest)
    a.driver.power_off(guest)
    with a.libvirt() as conn:
        domain(conn, guest).create()
        (disk,) = domainxml.disks(domain(conn, guest).XMLDesc(0))
        assert disk.readonly
        assert not domain(conn, guest).autostart()
    (said,) = a.driver.settle()
    assert "was started without virtmigrate" in said
    write(a, guest, 7)
    assert digests(a, guest) == before
    a.driver.reboot(None, guest, None, "HARD")
    write(a, guest, 7)
    assert a.driver.settle() == []


# What fails


def test_a_start_that_fails(
    world: World, guest: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = world.a
    a.driver.power_off(guest)

    def fail(*_: object, **__: object) -> None:
        raise errors.LibvirtFailed(
            host="a", doing="starting", code=1, domain=1, reason="it does not"
        )

    with monkeypatch.context() as patched:
        patched.setattr(Domains, "start_with", fail)
        with pytest.raises(errors.LibvirtFailed):
            a.driver.power_on(None, guest, None)
    assert layers(a, guest) == []
    assert a.state_of(guest) == "shutoff"
    a.driver.power_on(None, guest, None)
    assert seen(world, a, guest) == 0


def test_the_second_layer_fails(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    a, guest = world.a, spawn(world, "vda", "vdb", ephemeral_gb=1)
    assert len(layers(a, guest)) == 2
    a.driver.power_off(guest)
    make = making.Making.scratch
    made: list[Any] = []

    def second(*args: Any) -> Any:
        if made:
            raise errors.NoSpace(host="a", pool="x", free=0, wanted=1, reserved=0)
        made.append(make(*args))
        return made[0]

    with monkeypatch.context() as patched:
        patched.setattr(making.Making, "scratch", second)
        with pytest.raises(errors.NoSpace):
            a.driver.power_on(None, guest, None)
    assert made
    assert layers(a, guest) == []
    a.driver.power_on(None, guest, None)
    assert len(layers(a, guest)) == 2


def test_a_header_that_does_not_last(
    world: World, guest: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = world.a
    a.driver.power_off(guest)
    assert a.driver.settle() == []
    before = a.files()
    with monkeypatch.context() as patched:
        read = types.SimpleNamespace(download=lambda *_: b"")
        patched.setattr(making, "wire", read)
        with pytest.raises(errors.ShortTransfer):
            a.driver.power_on(None, guest, None)
    assert a.files() == before
    a.driver.power_on(None, guest, None)


def test_a_disk_without_a_record(world: World, guest: Any) -> None:
    """What does not fit is named."""
    here = world.a.driver.node
    ((backend, layer),) = here.scratch.owned(guest.uuid)
    assert layer.transient is not None
    over = msgspec.structs.replace(layer.transient, volume="gone")
    backend.update(msgspec.structs.replace(layer, transient=over))
    (found,) = consistency.check(here)
    assert (found.name, found.kind) == (layer.name, consistency.Kind.MISSING)
    assert "it stands on gone in local, which has no record" in found.detail


# Snapshots


def test_snapshots(world: World) -> None:
    a, guest = world.a, spawn(world, "vdb", ephemeral_gb=1)
    snapshots, uuid = a.driver.snapshots, guest.uuid
    write(a, guest, 1)
    write(a, guest, 7, disk=1)
    with pytest.raises(errors.SnapshotRefused, match="vdb is transient"):
        snapshots.create(uuid, Wanted("s"))
    left_out = frozenset({"vdb"})
    with pytest.raises(errors.SnapshotRefused, match="leave the memory out"):
        snapshots.create(uuid, Wanted("s", memory=Memory.EXTERNAL, left_out=left_out))
    snapshots.create(uuid, Wanted("s", left_out=left_out))
    assert seen(world, a, guest, "vdb") == 7
    write(a, guest, 2)
    snapshots.revert(uuid, Return("s"))
    assert a.state_of(guest) == "running"
    assert guestdisk.byte(world, guest) == 1
    assert seen(world, a, guest, "vdb") == 0
    write(a, guest, 7, disk=1)
    (disk,) = chain(a, guest, "vdb")
    assert disk.stat().st_blocks == 0
    snapshots.delete(uuid, "s")
    assert seen(world, a, guest, "vdb") == 7
    assert a.driver.settle() == []
    assert consistency.check(a.driver.node) == []
    a.driver.power_off(guest)
    a.driver.set_transient(uuid, "vdb", transient=False)
    snapshots.create(uuid, Wanted("all"))
    a.driver.destroy(None, guest)


# Moves


def burdens(node: Node, instance: Any) -> list[str]:
    here = node.driver.node
    return transient.burdens(here, here.entitled(instance.uuid))


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_moved(world: World, fmt: str) -> None:
    a, b, guest = world.a, world.b, spawn(world, "vda", fmt=fmt)
    write(a, guest, 7)
    (said,) = burdens(a, guest)
    assert "disk vda is transient" in said and "only" in said
    ticket = world.migrate(guest)
    world.finish(guest, ticket)
    assert b.state_of(guest) == "running"
    assert seen(world, b, guest) == 0
    write(b, guest, 8)
    before = digests(b, guest)
    world.confirm(guest)
    assert layers(a, guest) == []
    b.driver.power_off(guest)
    for node in (a, b):
        node.driver.settle()
        assert node.driver.settle() == []
    assert digests(b, guest) == before
    if fmt == "raw":
        # The source keeps the image in its cache.
        world.expect_one(guest, b, "shutoff")
    b.driver.power_on(None, guest, None)
    assert seen(world, b, guest) == 0


def test_moved_and_back(world: World, guest: Any) -> None:
    a, b = world.a, world.b
    before = digests(a, guest)
    write(a, guest, 7)
    world.finish(guest, world.migrate(guest))
    with pytest.raises(errors.InvalidState, match="is open"):
        b.driver.set_transient(guest.uuid, "vda", transient=False)
    write(b, guest, 8)
    world.revert(guest)
    assert a.state_of(guest) == "running"
    assert seen(world, a, guest) == 0
    assert digests(a, guest) == before
    b.driver.settle()
    assert b.driver.settle() == []
    assert b.files() == []


def test_grown(world: World) -> None:
    """A resize grows the disk itself, and the layer over it is as large."""
    a, b = world.a, world.b
    guest = spawn(world, "vda", fmt="qcow2", root_gb=1)
    world.finish(guest, world.migrate(guest, root_gb=2))
    root = chain(b, guest)[0]
    argv = ["qemu-img", "info", "-U", "-f", "qcow2", str(root)]
    said = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    assert f"({2 * GiB} bytes)" in said
    with b.libvirt() as conn:
        assert domain(conn, guest).blockInfo("vda")[0] == 2 * GiB
    before = digests(b, guest)
    write(b, guest, 8, offset=GiB + OFFSET)
    world.confirm(guest)
    b.driver.power_off(guest)
    assert digests(b, guest) == before
    assert a.driver.settle() == []
    b.driver.destroy(None, guest)


def test_a_paused_one_is_put_back(
    world: World, guest: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A move that fails gives back the memory of a paused guest, and what fits it."""
    a = world.a
    write(a, guest, 7)
    a.driver.pause(guest)

    def fail(*_: object) -> None:
        # The guest is off by now, and somebody settles.
        assert a.state_of(guest) is None
        raise errors.MigrationError(instance="x", operation="y", reason="no")

    with monkeypatch.context() as patched:
        patched.setattr("virtmigrate.migration.cargo.Cargo.send", fail)
        with pytest.raises(errors.MigrationRolledBack):
            world.migrate(guest)
    assert a.state_of(guest) == "paused"
    assert seen(world, a, guest) == 7
    assert a.driver.settle() == []
    a.driver.unpause(guest)
    assert a.state_of(guest) == "running"


@pytest.mark.parametrize("is_shared", [False, True], ids=["copied", "shared"])
def test_a_paused_one_is_reverted(world: World, is_shared: bool) -> None:
    """Its peer began without the layer: there is none that its memory would fit."""
    if is_shared:
        world.share()
    a, guest = world.a, spawn(world, "vda")
    before = digests(a, guest)
    write(a, guest, 7)
    a.driver.pause(guest)
    world.finish(guest, world.migrate(guest))
    world.revert(guest)
    assert a.state_of(guest) == "paused"
    assert seen(world, a, guest) == 0
    for node in (world.b, a):
        node.driver.settle()
        assert node.driver.settle() == []
    assert len(layers(a, guest)) == 1
    assert digests(a, guest) == before
    a.driver.destroy(None, guest)


@pytest.mark.parametrize("end", ["confirm", "revert"])
def test_moved_where_both_see_it(world: World, end: str) -> None:
    """Nothing is put over the disk itself: nobody writes to it."""
    world.share()
    a, b, guest = world.a, world.b, spawn(world, "vda", fmt="qcow2")
    before, disk = digests(a, guest), chain(a, guest)
    write(a, guest, 7)
    world.finish(guest, world.migrate(guest))
    assert chain(b, guest) == disk
    assert seen(world, b, guest) == 0
    write(b, guest, 8)
    getattr(world, end)(guest)
    for node in (a, b):
        node.driver.settle()
        assert node.driver.settle() == []
    node = b if end == "confirm" else a
    assert node.state_of(guest) == "running"
    assert digests(node, guest) == before
    assert len(layers(a, guest)) == 1
    node.driver.destroy(None, guest)


def test_records_know_it(world: World, guest: Any) -> None:
    here = world.a.driver.node
    ((backend, layer),) = here.scratch.owned(guest.uuid)
    assert layer.transient is not None
    (ref,) = here.entitled(guest.uuid).disks
    assert (layer.transient.backend, layer.transient.volume) == (
        ref.backend,
        ref.volume,
    )
    assert scratch.transient(here.entitled(guest.uuid)) == [ref]
    assert [each.name for each in backend.chain(ref.volume)] == [ref.volume]
    # Once more by a driver that shares nothing with this one.
    other = types.SimpleNamespace(uuid=guest.uuid)
    assert world.a.new_driver().get_info(other).power.value == "running"
    assert world.a.driver.settle() == []
    assert seen(world, world.a, guest) == 0
