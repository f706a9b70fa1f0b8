# SPDX-License-Identifier: Apache-2.0
"""Transient disks where the disk's own backend has no layers: Ceph, and LVM.

The layer is a file, and its chain crosses backends.
"""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import sandbox
from sandbox.ceph import Ceph
from tests.functional import places
from tests.functional.guestdisk import LENGTH, OFFSET, write
from tests.functional.sides import Kinds, Side
from tests.functional.test_tenures import away, holder, made
from virtmigrate import consistency, domainxml, transient


@pytest.fixture(scope="module")
def hosts(box: sandbox.Sandbox) -> Iterator[tuple[sandbox.Host, sandbox.Host]]:
    yield box.add_host("ten-alpha"), box.add_host("ten-beta")
    for name in ("ten-alpha", "ten-beta"):
        box.remove_host(name)


@pytest.fixture
def rbd(
    hosts: tuple[sandbox.Host, sandbox.Host],
    tmp_path: Path,
    cluster: Callable[[], Ceph],
) -> Iterator[Kinds]:
    with made("rbd", hosts, tmp_path, cluster) as found:
        yield found


def spawn(kinds: Kinds) -> Any:
    """One that runs; its root is transient."""
    flavor = kinds.flavor(kinds.a)
    flavor.extra_specs["virtmigrate:transient"] = "vda"
    return kinds.spawn(flavor)


def layers(side: Side) -> set[str]:
    """What there is of layers, with their records, by libvirt's word."""
    return {name for name in side.volumes() if "-transient." in name}


def files(side: Side) -> list[str]:
    return sorted(name for name in layers(side) if ".rec." not in name)


def chain(side: Side, instance: Any) -> list[domainxml.FoundLayer]:
    """What the running guest's disk stands on, by libvirt's word."""
    with side.libvirt() as conn:
        text = conn.lookupByUUIDString(instance.uuid).XMLDesc(0)
    (disk,) = domainxml.disks(text)
    return list(disk.chain)


def block(byte: int) -> bytes:
    return bytes([byte]) * LENGTH


def kept(side: Side, instance: Any) -> bytes:
    """What a block of the disk itself holds."""
    return side.content(instance)[OFFSET : OFFSET + LENGTH]


def seen(side: Side, instance: Any, conf: Path, user: str) -> bytes:
    """What a block holds for the guest, by qemu-img."""
    top, below = chain(side, instance)
    pool, _, image = below.source.partition("/")
    base = {"driver": "rbd", "pool": pool, "image": image, "conf": str(conf)}
    spec = {
        "driver": "qcow2",
        "file": {"driver": "file", "filename": top.source},
        "backing": {"driver": "raw", "file": base | {"user": user}},
    }
    out, first = side.config.with_name("seen"), OFFSET // LENGTH
    argv = ["qemu-img", "dd", "-U", "-O", "raw", f"bs={LENGTH}", f"skip={first}"]
    argv += [f"count={first + 1}", f"if=json:{json.dumps(spec)}", f"of={out}"]
    subprocess.run(argv, check=True, timeout=60)
    return out.read_bytes()


def test_over_an_image_of_a_cluster(
    rbd: Kinds, cluster: Callable[[], Ceph], tmp_path: Path
) -> None:
    side, conf = rbd.a, cluster().conf
    guest = spawn(rbd)
    before, origin = side.root(guest), kept(side, guest)
    top, below = chain(side, guest)
    assert (top.fmt, below.fmt) == (
        domainxml.DiskFormat.QCOW2,
        domainxml.DiskFormat.RAW,
    )
    assert below.hosts and below.auth
    assert origin != block(7)
    write(side, guest, 7)
    assert seen(side, guest, conf, "tenures") == block(7)
    with side.libvirt() as conn:
        conn.lookupByUUIDString(guest.uuid).reset(0)
    side.restart()
    assert side.driver.settle() == []
    assert seen(side, guest, conf, "tenures") == block(7)
    assert consistency.check(side.driver.node) == []
    here = side.driver.node
    (said,) = transient.burdens(here, here.entitled(guest.uuid))
    assert "in backend files, which only ten-alpha has" in said
    # Its memory and its layer wait for each other.
    side.driver.suspend(None, guest)
    assert side.driver.settle() == []
    side.driver.resume(None, guest)
    assert seen(side, guest, conf, "tenures") == block(7)
    side.driver.power_off(guest)
    assert side.driver.settle() == []
    assert layers(side) == set()
    assert side.root(guest) == before
    side.driver.power_on(None, guest, None)
    assert seen(side, guest, conf, "tenures") == origin
    assert len(files(side)) == 1
    side.driver.destroy(None, guest)
    assert layers(side) == set()
    assert not [name for name in side.volumes() if "vda" in name]


@pytest.mark.parametrize("end", ["confirmed", "reverted"])
def test_moved_within_a_cluster(
    rbd: Kinds, cluster: Callable[[], Ceph], end: str
) -> None:
    a, b, conf = rbd.a, rbd.b, cluster().conf
    guest = spawn(rbd)
    before, origin = a.root(guest), kept(a, guest)
    write(a, guest, 7)
    rbd.move(guest)
    assert seen(b, guest, conf, "tenures") == origin
    write(b, guest, 8)
    now = a
    if end == "confirmed":
        a.driver.confirm_migration(None, None, guest)
        assert layers(a) == set()
        now = b
    else:
        b.driver.destroy(None, guest)
        a.driver.finish_revert_migration(None, guest)
    for side in (a, b):
        side.driver.settle()
        assert side.driver.settle() == []
    assert (len(files(a)), len(files(b))) == ((0, 1) if now is b else (1, 0))
    expected = block(8) if now is b else origin
    assert seen(now, guest, conf, "tenures") == expected
    now.driver.power_off(guest)
    assert now.root(guest) == before
    now.driver.destroy(None, guest)


def test_host_is_lost(rbd: Kinds, cluster: Callable[[], Ceph]) -> None:
    """Who takes it over begins with the disk; what comes back removes its own."""
    a, b, conf = rbd.a, rbd.b, cluster().conf
    guest = spawn(rbd)
    before, origin = a.root(guest), kept(a, guest)
    write(a, guest, 7)
    (lost,) = files(a)
    with away(a):
        b.driver.take_over(guest.uuid)
        assert holder(b, guest) == ("ten-beta", None)
        assert b.state_of(guest) == "running"
        assert seen(b, guest, conf, "tenures") == origin
        write(b, guest, 8)
        assert b.root(guest) == before
    a.restart()
    (left,) = a.driver.settle()
    assert "ten-beta's now" in left
    assert a.state_of(guest) == "shutoff"
    assert files(a) == [lost]
    a.driver.destroy(None, guest)
    assert layers(a) == set()
    assert a.driver.settle() == []
    assert seen(b, guest, conf, "tenures") == block(8)
    b.driver.destroy(None, guest)


@pytest.mark.parametrize("kind", ["lvm"])
def test_over_a_logical_volume(
    machine: Callable[[], sandbox.Machine], tmp_path: Path, kind: str
) -> None:
    gamma = machine()
    group = {"kind": kind, "lvm_group": gamma.group}
    side = Side(gamma, tmp_path / "a", group, "thelvm", places.GRACE[kind])
    try:
        kinds = Kinds(side, side, tmp_path)
        guest = spawn(kinds)
        before = side.root(guest)
        assert side.disk(guest)[0] == "thelvm"
        top, below = chain(side, guest)
        assert below.source == f"/dev/{gamma.group}/{side.disk(guest)[1].name}"
        assert [f"files/{Path(top.source).name}"] == files(side)
        write(side, guest, 7)
        assert side.root(guest) == before
        here = side.driver.node
        assert here.files.disks.allocated(Path(top.source).name) > 0
        side.driver.power_off(guest)
        assert side.driver.settle() == []
        assert layers(side) == set()
        side.driver.power_on(None, guest, None)
        assert side.state_of(guest) == "running"
        assert side.root(guest) == before
        side.driver.destroy(None, guest)
        assert side.driver.node.backend("thelvm").drain(60)
        assert layers(side) == set()
    finally:
        side.close()
