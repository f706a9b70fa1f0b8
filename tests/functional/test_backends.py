# SPDX-License-Identifier: Apache-2.0
"""What kinds with files promise beyond the contract, on a real libvirt host."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

import sandbox
from virtmigrate import backends, conf, errors, host, model
from virtmigrate.backends import base, layout, terms
from virtmigrate.formats import DiskFormat
from virtmigrate.model import Role, VolumeState
from virtmigrate.units import MiB, TiB

SECONDS = 60.0
OWNER = "11111111-2222-3333-4444-555555555555"

BACKENDS = ["dir", "shared_dir"]


@pytest.fixture(scope="module")
def alpha(box: sandbox.Sandbox) -> Iterator[sandbox.Host]:
    yield box.add_host("back-alpha")
    box.remove_host("back-alpha")


@pytest.fixture(params=["local", "tls"])
def opened(request: pytest.FixtureRequest, alpha: sandbox.Host) -> Iterator[host.Host]:
    uri = alpha.uri if request.param == "tls" else alpha.local_uri
    with host.Host(uri) as found:
        yield found


@pytest.fixture(params=BACKENDS)
def backend(
    request: pytest.FixtureRequest,
    opened: host.Host,
    alpha: sandbox.Host,
    tmp_path: Path,
) -> Iterator[base.Backend]:
    """A backend with pools and a directory of its own."""
    name = "b" + tmp_path.name.encode().hex()[-24:]
    path = tmp_path / "virtmigrate.conf"
    path.write_text(
        f"[virtmigrate]\nenabled_backends = {name}\nrecord_grace = 1\n"
        f"[{name}]\nkind = {request.param}\npath = {alpha.storage / tmp_path.name}\n"
        "reserved_mib = 1\n"
    )
    found = backends.load(conf.load(path), opened)[name]
    found.ensure()
    try:
        yield found
    finally:
        with opened.session("cleaning up") as session:
            for pool in session.conn.listAllStoragePools(0):
                if pool.name().startswith(f"virtmigrate-{name}-"):
                    pool.destroy()
                    pool.undefine()


def volume(
    backend: base.Backend, name: str = "vda.op", *, size: int = MiB, pool: str = ""
) -> model.Volume:
    where = backend.pool(pool or backend.incoming.name)
    return model.Volume(
        name=name,
        pool=where.name,
        path=where.volume_path(name),
        format=DiskFormat.RAW,
        role=Role.ROOT,
        size=size,
        state=VolumeState.INCOMPLETE,
        owner=OWNER,
        operation="op",
        origin="alpha",
    )


def on_disks(backend: base.Backend, name: str, *, size: int = MiB) -> model.Volume:
    return volume(backend, name, size=size, pool=backend.disks.name)


def changed(of: model.Volume, **fields: object) -> model.Volume:
    return msgspec.structs.replace(of, **fields)


def make_hostile(path: Path) -> bytes:
    """Write a qcow2 header that claims 1 TiB over /etc/passwd; return all bytes."""
    name = b"/etc/passwd"
    fields = [(3, 4), (104, 8), (len(name), 4), (16, 4), (TiB, 8)]
    header = b"QFI\xfb" + b"".join(value.to_bytes(size) for value, size in fields)
    with path.open("r+b") as file:
        file.write(header.ljust(104, b"\0") + name)
    return path.read_bytes()


def everything(backend: base.Backend) -> list[str]:
    """All files below the backend's directory but its layout's."""
    root = Path(backend.settings.path)
    names = [path.name for path in root.rglob("*") if path.is_file()]
    return sorted(name for name in names if not name.startswith(layout.NAME))


# Loading


def test_unknown_kind(tmp_path: Path, opened: host.Host) -> None:
    path = tmp_path / "virtmigrate.conf"
    path.write_text("[local]\nkind = tape\n")
    with pytest.raises(errors.ConfigurationError, match="tape"):
        backends.load(conf.load(path), opened)


def test_every_kind_with_files_is_tested() -> None:
    kinds = backends.KINDS.items()
    assert {name for name, kind in kinds if kind.capabilities.files} == set(BACKENDS)


def test_ensure_twice(backend: base.Backend) -> None:
    backend.ensure()
    assert backend.disks.exists() and backend.incoming.exists()
    assert backend.volumes.names() == []


# Volumes and their records


def test_allocate(backend: base.Backend) -> None:
    wanted = volume(backend, size=5 * MiB)
    assert backend.allocate(wanted) == wanted
    assert backend.volumes.read("vda.op").body == wanted
    assert backend.incoming.physical("vda.op") == 5 * MiB
    assert backend.incoming.allocated("vda.op") == 0


def test_allocate_what_has_a_record(backend: base.Backend) -> None:
    backend.allocate(volume(backend))
    with pytest.raises(errors.RecordConflict):
        backend.allocate(volume(backend))
    assert backend.incoming.has("vda.op")


def test_allocate_where_somebody_has_a_volume(backend: base.Backend) -> None:
    backend.incoming.create_raw("vda.op", 10)
    with pytest.raises(errors.VolumeExists):
        backend.allocate(volume(backend))
    assert backend.incoming.physical("vda.op") == 10
    assert backend.volumes.find("vda.op") is None


def test_update_keeps_two_generations(backend: base.Backend) -> None:
    made = backend.allocate(volume(backend))
    for state in (VolumeState.USABLE, VolumeState.FROZEN, VolumeState.USABLE):
        made = backend.update(changed(made, state=state))
    stored = backend.volumes.read("vda.op")
    assert (stored.generation, stored.body) == (4, made)
    assert everything(backend) == ["vda.op", "vda.op.rec.3", "vda.op.rec.4"]


def test_remove(backend: base.Backend) -> None:
    backend.allocate(volume(backend))
    backend.allocate(volume(backend, "vdb.op"))
    backend.remove("vda.op")
    backend.remove("vda.op")
    assert everything(backend) == ["vdb.op", "vdb.op.rec.1"]


def test_remove_leaves_what_has_no_record(backend: base.Backend) -> None:
    backend.incoming.create_raw("vda.op", 10)
    backend.disks.create_raw("vda.op", 10)
    backend.remove("vda.op")
    assert everything(backend) == ["vda.op", "vda.op"]


def test_remove_what_lost_its_volume(backend: base.Backend) -> None:
    backend.allocate(volume(backend))
    backend.incoming.delete("vda.op")
    backend.remove("vda.op")
    assert everything(backend) == []


def test_remove_what_was_never_whole(backend: base.Backend) -> None:
    backend.volumes.pool.create_raw("vda.op.rec.1", 4096)
    backend.remove("vda.op")
    assert everything(backend) == []


def test_room_leaves_the_reserve(backend: base.Backend) -> None:
    free = backend.disks.room().free
    assert abs(backend.room() - (free - MiB)) < 64 * MiB


# Layers


def test_overlay_and_chain(backend: base.Backend) -> None:
    if not backend.capabilities.overlays:
        pytest.skip("this kind has no overlays")
    bottom = backend.allocate(on_disks(backend, "vda.op1"))
    top = changed(
        on_disks(backend, "vda.op2", size=2 * MiB),
        format=DiskFormat.QCOW2,
        backing="vda.op1",
    )
    backend.overlay(top, bottom)
    assert backend.chain("vda.op2") == (top, bottom)
    found = [(layer.source, layer.fmt) for layer in backend.layers("vda.op2")]
    assert found == [(top.path, DiskFormat.QCOW2), (bottom.path, DiskFormat.RAW)]
    backend.remove("vda.op2")
    assert backend.chain("vda.op1") == (bottom,)


def test_overlay_that_fails_leaves_nothing(backend: base.Backend) -> None:
    if not backend.capabilities.overlays:
        pytest.skip("this kind has no overlays")
    missing = on_disks(backend, "none")
    top = changed(on_disks(backend, "top"), format=DiskFormat.QCOW2, backing="none")
    with pytest.raises(errors.Error):
        backend.overlay(top, missing)
    assert everything(backend) == []


def test_overlay_where_a_volume_is(backend: base.Backend) -> None:
    if not backend.capabilities.overlays:
        pytest.skip("this kind has no overlays")
    bottom = backend.allocate(on_disks(backend, "vda.op1"))
    backend.disks.create_raw("top", 10)
    top = changed(on_disks(backend, "top"), format=DiskFormat.QCOW2, backing="vda.op1")
    with pytest.raises(errors.VolumeExists):
        backend.overlay(top, bottom)
    assert backend.disks.physical("top") == 10
    assert backend.volumes.find("top") is None


def test_overlay_without_the_capability(
    backend: base.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    poor = terms.Capabilities(
        formats=(DiskFormat.RAW,),
        overlays=False,
        snapshots=False,
        shared=False,
        streams=True,
        thick=False,
        files=True,
    )
    monkeypatch.setattr(backend, "capabilities", poor)
    with pytest.raises(errors.Unsupported, match=backend.name):
        backend.overlay(on_disks(backend, "top"), on_disks(backend, "bottom"))
    assert everything(backend) == []


def test_chain_with_a_missing_record(backend: base.Backend) -> None:
    backend.allocate(changed(volume(backend), backing="gone"))
    with pytest.raises(errors.RecordMissing, match="gone"):
        backend.chain("vda.op")


def test_chain_that_is_a_circle(backend: base.Backend) -> None:
    backend.allocate(changed(volume(backend, "a"), backing="b"))
    backend.allocate(changed(volume(backend, "b"), backing="a"))
    with pytest.raises(errors.RecordBroken, match="circle"):
        backend.chain("a")


# From incoming to where disks lie


def test_accept_twice(backend: base.Backend) -> None:
    backend.allocate(volume(backend))
    content = make_hostile(Path(backend.incoming.volume_path("vda.op")))
    pool, path = backend.accept("vda.op")
    assert backend.accept("vda.op") == (pool, path)
    assert (pool, path) == (backend.disks.name, backend.disks.volume_path("vda.op"))
    assert Path(path).read_bytes() == content
    assert not backend.incoming.has("vda.op")
    assert backend.disks.has("vda.op")


def test_accept_where_this_process_may_not(
    backend: base.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer's directory, or one of another user: it stays where it is."""
    backend.allocate(volume(backend))
    monkeypatch.setattr(os, "access", lambda *_args, **_named: False)
    for _ in range(2):
        found = backend.accept("vda.op")
        assert found == (
            backend.incoming.name,
            backend.incoming.volume_path("vda.op"),
        )
    assert backend.incoming.has("vda.op")


def test_persist(backend: base.Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.fstat(fd).st_ino)
        real(fd)

    backend.allocate(volume(backend))
    pool, path = backend.accept("vda.op")
    monkeypatch.setattr(os, "fsync", fsync)
    assert backend.persist(pool, "vda.op")
    assert Path(path).stat().st_ino in synced


def test_persist_where_this_process_cannot(
    backend: base.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.allocate(volume(backend))
    monkeypatch.setattr(os, "access", lambda *_args, **_named: False)
    assert not backend.persist(backend.incoming.name, "vda.op")


def test_local_file(backend: base.Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    backend.allocate(volume(backend))
    found = backend.local_file(backend.incoming, "vda.op")
    assert found == Path(backend.incoming.volume_path("vda.op"))
    assert backend.local_file(backend.incoming, "none") is None


# What a guest wrote


def test_hostile_disk_is_never_believed(backend: base.Backend) -> None:
    made = backend.allocate(on_disks(backend, "vda.op"))
    content = make_hostile(Path(made.path))
    backend.disks.refresh()
    assert backend.disks.physical("vda.op") == MiB
    assert [layer.fmt for layer in backend.layers("vda.op")] == [DiskFormat.RAW]
    made = backend.update(changed(made, state=VolumeState.FROZEN))
    top = changed(
        on_disks(backend, "vda.op2"), format=DiskFormat.QCOW2, backing="vda.op"
    )
    backend.overlay(top, made)
    argv = ["qemu-img", "compare", "-f", "qcow2", "-F", "raw", top.path, made.path]
    subprocess.run(argv, check=True, timeout=SECONDS, capture_output=True)
    assert Path(made.path).read_bytes() == content
    assert backend.volumes.read("vda.op").body.size == MiB
    backend.remove("vda.op2")
    assert Path(made.path).read_bytes() == content
