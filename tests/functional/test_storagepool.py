# SPDX-License-Identifier: Apache-2.0
"""Pools and volumes of a real libvirt host."""

import concurrent.futures
import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

import sandbox
from virtmigrate import errors, host, storagepool
from virtmigrate.units import KiB, MiB, TiB

SECONDS = 60.0


@pytest.fixture(scope="module")
def alpha(box: sandbox.Sandbox) -> Iterator[sandbox.Host]:
    yield box.add_host("pool-alpha")
    box.remove_host("pool-alpha")


@pytest.fixture(scope="module")
def beta(box: sandbox.Sandbox) -> Iterator[sandbox.Host]:
    yield box.add_host("pool-beta")
    box.remove_host("pool-beta")


@pytest.fixture
def directory(alpha: sandbox.Host, tmp_path: Path) -> Path:
    return alpha.storage / tmp_path.name


@pytest.fixture
def here(alpha: sandbox.Host) -> Iterator[host.Host]:
    with host.Host(alpha.local_uri) as opened:
        yield opened


@pytest.fixture
def pool(here: host.Host, directory: Path) -> storagepool.Pool:
    made = storagepool.Pool(here, directory.name)
    made.ensure_directory(str(directory))
    return made


def hostile_header() -> bytes:
    """A qcow2 header that claims 1 TiB and a backing file of the host's."""
    name = b"/etc/passwd"
    fields = [(3, 4), (104, 8), (len(name), 4), (16, 4), (TiB, 8)]
    header = b"QFI\xfb" + b"".join(value.to_bytes(size) for value, size in fields)
    return header.ljust(104, b"\0") + name


def image_info(path: Path) -> dict[str, object]:
    argv = ["qemu-img", "info", "--output=json", "-f", "qcow2", str(path)]
    done = subprocess.run(argv, capture_output=True, check=True, timeout=SECONDS)
    found: dict[str, object] = json.loads(done.stdout)
    return found


# Pools


def test_directory_is_made_through_libvirt(
    pool: storagepool.Pool, directory: Path
) -> None:
    assert directory.is_dir()
    assert pool.exists()
    assert pool.path == str(directory)
    assert pool.names() == []
    pool.ensure_directory(str(directory))


def test_directory_is_there_after_a_restart(
    pool: storagepool.Pool, alpha: sandbox.Host, directory: Path
) -> None:
    pool.create_raw("vol", 4096)
    alpha.stop_libvirtd()
    alpha.start_libvirtd()
    assert pool.names() == ["vol"]


def test_pool_that_lies_elsewhere(here: host.Host, pool: storagepool.Pool) -> None:
    other = storagepool.Pool(here, pool.name)
    with pytest.raises(errors.ConfigurationError, match="lies at"):
        other.ensure_directory(pool.path + "-other")


def test_pool_that_is_not_there(here: host.Host) -> None:
    pool = storagepool.Pool(here, "none")
    assert not pool.exists()
    with pytest.raises(errors.PoolNotFound, match="none"):
        pool.names()


def test_ownership(here: host.Host, directory: Path) -> None:
    ownership = storagepool.Ownership(uid=1234, gid=2345, mode="0640")
    pool = storagepool.Pool(here, directory.name, ownership=ownership)
    pool.ensure_directory(str(directory))
    pool.create_raw("vol", 10)
    pool.create_overlay("top", MiB, pool.volume_path("vol"), "raw")
    for path in (directory, directory / "vol"):
        found = path.stat()
        assert (found.st_uid, found.st_gid) == (1234, 2345)
        assert found.st_mode & 0o666 == 0o640
    assert (directory / "top").stat().st_mode & 0o777 == 0o640


def test_nobody_else_reads_by_default(pool: storagepool.Pool, directory: Path) -> None:
    pool.create_raw("vol", 10)
    assert directory.stat().st_mode & 0o666 == 0o600
    assert (directory / "vol").stat().st_mode & 0o777 == 0o600


def test_room(alpha: sandbox.Host, here: host.Host, directory: Path) -> None:
    alpha.mount_storage(16 * MiB)
    try:
        pool = storagepool.Pool(here, directory.name)
        pool.ensure_directory(str(directory))
        before = pool.room()
        assert before.capacity == 16 * MiB
        (directory / "file").write_bytes(bytes(4 * MiB))
        assert pool.room().free <= before.free - 4 * MiB
    finally:
        alpha.unmount_storage()


# Volumes


def test_raw_volume_is_sparse_and_whole(
    pool: storagepool.Pool, directory: Path
) -> None:
    pool.create_raw("vol", 3 * TiB + 5)
    found = (directory / "vol").stat()
    assert found.st_size == pool.physical("vol") == 3 * TiB + 5
    assert found.st_blocks == pool.allocated("vol") == 0


def test_raw_volume_is_created_exclusively(
    pool: storagepool.Pool, directory: Path
) -> None:
    (directory / "vol").write_bytes(b"somebody else's")
    for _ in range(2):
        with pytest.raises(errors.VolumeExists, match="vol"):
            pool.create_raw("vol", 4096)
    assert (directory / "vol").read_bytes() == b"somebody else's"


def test_one_of_many_creates(alpha: sandbox.Host, pool: storagepool.Pool) -> None:
    won: list[int] = []
    failed: list[BaseException] = []
    start = threading.Barrier(4, timeout=SECONDS)

    def race() -> None:
        with host.Host(alpha.uri) as opened:
            mine = storagepool.Pool(opened, pool.name)
            try:
                for number in range(25):
                    start.wait()
                    try:
                        mine.create_raw(f"vol-{number}", 4096)
                        won.append(number)
                    except errors.VolumeExists:
                        pass
            except BaseException as e:
                failed.append(e)
                start.abort()

    threads = [threading.Thread(target=race) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert not failed
    assert sorted(won) == list(range(25))


def test_listing_leaves_nobody_out(alpha: sandbox.Host, pool: storagepool.Pool) -> None:
    """virStoragePoolListVolumes asks for a count first: who comes in between counts."""
    kept = [f"kept{number}" for number in range(4)]
    for name in kept:
        pool.create_raw(name, 0)
    stop = threading.Event()

    def churn(number: int) -> None:
        with host.Host(alpha.uri) as other:
            same = storagepool.Pool(other, pool.name)
            while not stop.is_set():
                same.create_raw(f"new{number}", 0)
                same.delete(f"new{number}")

    with concurrent.futures.ThreadPoolExecutor() as threads:
        churning = [threads.submit(churn, number) for number in range(2)]
        try:
            for _ in range(400):
                assert set(kept) <= set(pool.names())
        finally:
            stop.set()
    for one in churning:
        one.result()


@pytest.mark.parametrize("size", [0, 1, 4096, 262_120, 262_121, 3 * MiB + 7])
def test_written_is_read(pool: storagepool.Pool, directory: Path, size: int) -> None:
    data = bytes(i % 251 for i in range(1000)) * (size // 1000 + 1)
    pool.create_raw("vol", size)
    pool.write("vol", data[:size])
    assert (directory / "vol").read_bytes() == data[:size]
    assert pool.read("vol", limit=size) == data[:size]


def test_read_has_a_limit(pool: storagepool.Pool) -> None:
    pool.create_raw("vol", 4097)
    with pytest.raises(ValueError, match="4097 bytes, more than 4096"):
        pool.read("vol", limit=4096)


@pytest.mark.parametrize("length", [512, 64 * KiB, 5 * MiB])
def test_physical_is_a_stat(
    pool: storagepool.Pool, directory: Path, length: int
) -> None:
    pool.create_raw("vol", length)
    with (directory / "vol").open("r+b") as file:
        file.write(hostile_header())
    assert pool.physical("vol") == length
    pool.refresh()
    assert pool.physical("vol") == length
    assert len(pool.read("vol", limit=length)) == length


def test_volume_that_is_not_there(pool: storagepool.Pool) -> None:
    with pytest.raises(errors.VolumeNotFound, match="none"):
        pool.physical("none")
    with pytest.raises(errors.VolumeNotFound, match="none"):
        pool.allocated("none")
    with pytest.raises(errors.VolumeNotFound, match="none"):
        pool.read("none", limit=1)
    with pytest.raises(errors.VolumeNotFound, match="none"):
        pool.write("none", b"x")
    pool.delete("none")
    assert not pool.has("none")


def test_file_that_another_made_is_found(
    pool: storagepool.Pool, directory: Path
) -> None:
    (directory / "vol").write_bytes(b"12345")
    assert pool.physical("vol") == 5
    (directory / "vol2").write_bytes(b"123456")
    assert pool.read("vol2", limit=10) == b"123456"
    assert pool.has("vol") and pool.has("vol2")


def test_delete(pool: storagepool.Pool, directory: Path) -> None:
    pool.create_raw("vol", 4096)
    pool.delete("vol")
    pool.delete("vol")
    assert not list(directory.iterdir())


@pytest.mark.parametrize("name", ["../vol", "a/b", "/etc/vol"])
def test_name_that_leaves_the_directory(pool: storagepool.Pool, name: str) -> None:
    with pytest.raises(errors.HostError):
        pool.create_raw(name, 10)


def test_name_that_is_xml(pool: storagepool.Pool, directory: Path) -> None:
    name = "<b>&amp;'\""
    pool.create_raw(name, 10)
    assert [path.name for path in directory.iterdir()] == [name]
    assert pool.physical(name) == 10


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_overlay_names_its_formats(
    pool: storagepool.Pool, directory: Path, fmt: str
) -> None:
    base = directory / "base"
    subprocess.run(["qemu-img", "create", "-q", "-f", fmt, base, "1M"], check=True)
    pool.create_overlay("top", 3 * MiB, str(base), fmt)
    found = image_info(directory / "top")
    assert found["virtual-size"] == 3 * MiB
    assert found["backing-filename"] == str(base)
    assert found["backing-filename-format"] == fmt
    data = found["format-specific"]
    assert isinstance(data, dict) and data["data"]["compat"] == "1.1"


def test_overlay_over_a_layer_whose_header_names_what_is_gone(
    pool: storagepool.Pool, directory: Path
) -> None:
    """What a layer stands on is what its record says: it may have moved."""
    make = ["qemu-img", "create", "-q", "-f", "qcow2"]
    below, gone = directory / "below", directory / "gone"
    subprocess.run([*make, gone, "1M"], check=True)
    subprocess.run([*make, "-b", gone, "-F", "qcow2", below, "1M"], check=True)
    gone.unlink()
    pool.create_overlay("top", MiB, str(below), "qcow2")
    argv = ["qemu-img", "info", "--output=json", str(directory / "top")]
    found = json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)
    assert found["backing-filename"] == str(below)
    file = {"driver": "file", "filename": str(directory / "top")}
    alone = {"driver": "qcow2", "file": file, "backing": None}
    check = ["qemu-img", "check", "-q", f"json:{json.dumps(alone)}"]
    subprocess.run(check, check=True, timeout=SECONDS)


def test_overlay_over_a_hostile_raw_disk(
    pool: storagepool.Pool, directory: Path
) -> None:
    pool.create_raw("base", MiB)
    with (directory / "base").open("r+b") as file:
        file.write(hostile_header())
    before = (directory / "base").read_bytes()
    pool.create_overlay("top", MiB, pool.volume_path("base"), "raw")
    argv = ["qemu-img", "compare", "-f", "qcow2", "-F", "raw"]
    compared = [*argv, str(directory / "top"), str(directory / "base")]
    subprocess.run(compared, check=True, timeout=SECONDS, capture_output=True)
    assert (directory / "base").read_bytes() == before
    assert image_info(directory / "top")["virtual-size"] == MiB


# This machine's view


def test_is_local(pool: storagepool.Pool, directory: Path) -> None:
    assert pool.is_local()
    assert not list(directory.iterdir())


def test_same_path_on_another_machine_is_not_local(
    beta: sandbox.Host, here: host.Host, directory: Path
) -> None:
    """The path exists here too, and the volumes that libvirt makes are elsewhere."""
    path = beta.storage / directory.name
    with host.Host(beta.uri) as there:
        pool = storagepool.Pool(there, directory.name)
        pool.ensure_directory(str(path))
        # Hidden from the host's own daemon, as a machine of its own would be.
        beta.run(["mount", "-t", "tmpfs", "tmpfs", str(path)])
        try:
            assert path.is_dir()
            assert not pool.is_local()
            assert not list(path.iterdir())
        finally:
            beta.run(["umount", "--lazy", str(path)])


def test_path_that_is_not_here(here: host.Host, pool: storagepool.Pool) -> None:
    pool._path = "/nowhere"
    assert not pool.is_local()


# A host in trouble


def test_full_pool(alpha: sandbox.Host, here: host.Host, directory: Path) -> None:
    alpha.mount_storage(MiB)
    try:
        pool = storagepool.Pool(here, directory.name)
        pool.ensure_directory(str(directory))
        pool.create_raw("vol", 4 * MiB)
        try:
            pool.write("vol", b"x" * (4 * MiB))
        except errors.Error:
            return
        # libvirt may forget a late error: reading back is what counts.
        assert pool.read("vol", limit=4 * MiB) != b"x" * (4 * MiB)
    finally:
        alpha.unmount_storage()


def test_daemon_that_died_is_reached_again(
    alpha: sandbox.Host, pool: storagepool.Pool
) -> None:
    pool.create_raw("vol", 10)
    alpha.kill_libvirtd()
    with pytest.raises(errors.HostError):
        pool.names()
    alpha.start_libvirtd()
    assert pool.names() == ["vol"]


def test_many_at_once_wait_for_each_other(
    alpha: sandbox.Host, pool: storagepool.Pool
) -> None:
    """While one uploads, libvirt refreshes the pool and refuses the others."""
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with host.Host(alpha.local_uri) as opened:
                mine = storagepool.Pool(opened, pool.name)
                for turn in range(12):
                    name = f"vol-{number}-{turn}"
                    data = bytes([number]) * 20_000
                    mine.create_raw(name, len(data))
                    mine.write(name, data)
                    assert mine.read(name, limit=MiB) == data
                    assert mine.physical(name) == len(data)
                    mine.delete(name)
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert not failed
    assert pool.names() == []


def test_an_error_that_the_binding_lost_is_known(
    pool: storagepool.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A libvirt object that is freed between call and exception clears the error."""
    pool.create_raw("twice", 4096)
    monkeypatch.setattr(libvirt.libvirtmod, "virGetLastError", lambda: None)
    with pytest.raises(errors.VolumeExists):
        pool.create_raw("twice", 4096)
    with pytest.raises(errors.VolumeNotFound):
        pool.physical("none")
    pool.delete("none")
