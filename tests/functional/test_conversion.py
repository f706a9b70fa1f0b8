# SPDX-License-Identifier: Apache-2.0
"""Disks that consist of layers, and go where only raw volumes are."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import sandbox
from sandbox.ceph import Ceph
from tests.functional.sides import (
    SIZE,
    Kinds,
    between,
    put_layer,
    spoil,
)
from virtmigrate import errors, model
from virtmigrate.formats import DiskFormat
from virtmigrate.progress import Progress, Report
from virtmigrate.units import MiB

KINDS = ("dir-ext4", "rbd")
DENSE = 16 * MiB
GROWN = 40 * MiB


@pytest.fixture(scope="module")
def hosts(box: sandbox.Sandbox) -> Iterator[tuple[sandbox.Host, sandbox.Host]]:
    yield box.add_host("conv-alpha"), box.add_host("conv-beta")
    box.remove_host("conv-alpha")
    box.remove_host("conv-beta")


@pytest.fixture(params=[KINDS], ids="-".join)
def kinds(
    request: pytest.FixtureRequest,
    hosts: tuple[sandbox.Host, sandbox.Host],
    tmp_path: Path,
    cluster: Callable[[], Ceph],
) -> Iterator[Kinds]:
    with between(request.param, hosts, tmp_path, cluster) as made:
        yield made


def layered(kinds: Kinds) -> Any:
    """An instance whose root is two layers over a raw volume, the upper one larger."""
    instance = kinds.spawn()
    put_layer(kinds.a, instance, SIZE, f"write -P 17 {4 * MiB} {DENSE}")
    put_layer(
        kinds.a,
        instance,
        GROWN,
        f"write -P 34 {30 * MiB} 70000",
        f"write -P 51 {5 * MiB + 512} 1000",
        f"write -z 0 {MiB}",
    )
    return instance


def processes(name: str) -> list[str]:
    """The programs that have a name among their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes().decode(errors="replace"))
    return [each for each in found if "qemu-nbd" in each and name in each]


def names(volumes: set[str]) -> set[str]:
    return {name for name in volumes if ".rec." not in name}


def expect_untouched(kinds: Kinds, instance: Any, before: str, there: set[str]) -> None:
    """It runs where it was, and nothing is left of a move."""
    top = kinds.a.disk(instance)[1].name
    assert kinds.a.state_of(instance) == "running"
    assert kinds.a.root(instance) == before
    assert names(kinds.b.volumes()) == names(there)
    assert not processes(top)


@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "after-the-stop"])
def test_layers_become_one_raw_volume(kinds: Kinds, ahead: bool) -> None:
    kinds.a.configure(send_ahead=ahead)
    instance = layered(kinds)
    before = kinds.a.root(instance)
    kinds.move(instance)
    name, volume = kinds.b.disk(instance)
    assert (name, volume.format, volume.size) == (kinds.b.name, DiskFormat.RAW, GROWN)
    assert volume.backing is None
    assert kinds.b.state_of(instance) == "running"
    assert kinds.b.root(instance) == before
    assert DENSE <= kinds.sent() <= DENSE + 8 * MiB, "holes are not sent"
    kinds.a.driver.confirm_migration(None, None, instance, None)
    assert not [name for name in kinds.a.volumes() if "vda" in name]
    kinds.b.driver.settle()
    assert kinds.b.root(instance) == before
    kinds.b.driver.destroy(None, instance, None)


def test_layers_are_reverted(kinds: Kinds) -> None:
    instance = layered(kinds)
    before, here = kinds.a.root(instance), kinds.a.volumes()
    chain = kinds.a.driver.node.backend(kinds.a.name).chain(
        kinds.a.disk(instance)[1].name
    )
    kinds.move(instance)
    spoil(kinds.b, instance)
    kinds.b.driver.destroy(None, instance, None)
    kinds.a.driver.finish_revert_migration(None, instance)
    assert kinds.a.state_of(instance) == "running"
    assert kinds.a.root(instance) == before
    assert names(kinds.a.volumes()) == names(here)
    backend = kinds.a.driver.node.backend(kinds.a.name)
    assert backend.chain(chain[0].name) == chain
    kinds.a.driver.destroy(None, instance, None)


def test_layers_are_resized(kinds: Kinds) -> None:
    instance = layered(kinds)
    kinds.a.driver.power_off(instance)
    before = kinds.a.content(instance)
    kinds.move(instance, root_gb=1)
    assert kinds.b.disk(instance)[1].size == 1024 * MiB
    after = kinds.b.content(instance)
    assert after[:GROWN] == before
    assert not after[GROWN:].strip(b"\0")
    kinds.a.driver.confirm_migration(None, None, instance, None)
    kinds.b.driver.destroy(None, instance, None)


def test_an_image_below_stays(kinds: Kinds) -> None:
    """It is nobody's, and others stand on it."""
    instance = layered(kinds)
    name, top = kinds.a.disk(instance)
    backend = kinds.a.driver.node.backend(name)
    image = backend.chain(top.name)[-1]
    cached = {"role": model.Role.IMAGE, "owner": "image-cache"}
    backend.update(msgspec.structs.replace(image, **cached))
    before = kinds.a.root(instance)
    kinds.move(instance)
    kinds.a.driver.confirm_migration(None, None, instance, None)
    assert kinds.b.root(instance) == before
    disks = {n for n in names(kinds.a.volumes()) if "vda" in n}
    assert disks == {f"{name}/{image.name}"}
    backend.remove(image.name)
    kinds.b.driver.destroy(None, instance, None)


@pytest.mark.parametrize("said", ["/etc/passwd", "nbd://localhost/x", "/nowhere"])
def test_what_a_header_says_is_below_is_not_believed(kinds: Kinds, said: str) -> None:
    instance = layered(kinds)
    before = kinds.a.root(instance)
    kinds.a.driver.power_off(instance)
    _, top = kinds.a.disk(instance)
    argv = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", said, "-F", "raw"]
    subprocess.run([*argv, top.path], check=True, timeout=60)
    kinds.move(instance)
    assert kinds.b.root(instance) == before
    kinds.a.driver.confirm_migration(None, None, instance, None)
    kinds.b.driver.destroy(None, instance, None)


DATA_FILE = 72, b"\0\0\0\0\0\0\0\4"
OTHER_SIZE = 24, (GROWN * 2).to_bytes(8, "big")


@pytest.mark.parametrize(
    ("header", "reason"),
    [(DATA_FILE, "names a file for its data"), (OTHER_SIZE, "its record says")],
    ids=["data-file", "size"],
)
def test_a_header_that_lies_is_refused(
    kinds: Kinds, header: tuple[int, bytes], reason: str
) -> None:
    instance = layered(kinds)
    before, there = kinds.a.root(instance), kinds.b.volumes()
    _, top = kinds.a.disk(instance)
    offset, lie = header
    with Path(top.path).open("r+b") as file:
        file.seek(offset)
        truth = file.read(len(lie))
        file.seek(offset)
        file.write(lie)
        file.flush()
        with pytest.raises(errors.MigrationRefused, match=reason):
            kinds.move(instance)
        file.seek(offset)
        file.write(truth)
    expect_untouched(kinds, instance, before, there)
    kinds.a.driver.destroy(None, instance, None)


def test_files_that_may_not_be_read_are_refused(
    kinds: Kinds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pretended: root, who runs the tests, may read all files."""
    instance = layered(kinds)
    before, there = kinds.a.root(instance), kinds.b.volumes()
    with monkeypatch.context() as patch:
        patch.setattr("virtmigrate.backends.dir.DirBackend.local_file", lambda *_: None)
        with pytest.raises(errors.MigrationRefused, match="may not read volume vda"):
            kinds.move(instance)
    with monkeypatch.context() as patch:
        patch.setattr("virtmigrate.nbdserver.PROGRAMS", ("qemu-nbd", "no-such"))
        with pytest.raises(errors.MigrationRefused, match="needs no-such"):
            kinds.move(instance)
    expect_untouched(kinds, instance, before, there)
    kinds.a.driver.destroy(None, instance, None)


def test_a_failure_halfway_leaves_nothing(kinds: Kinds) -> None:
    kinds.a.configure(send_ahead=False, stream_length=2)
    instance = layered(kinds)
    before, there = kinds.a.root(instance), kinds.b.volumes()
    seen: list[str] = []

    def fail(report: Report) -> None:
        if report.phase == "converting vda" and report.done > report.total / 2:
            seen.extend(processes(kinds.a.disk(instance)[1].name))
            raise OSError("injected")

    kinds.a.driver._progress = lambda: Progress(fail, interval=0)
    with pytest.raises(errors.MigrationRolledBack, match="injected"):
        kinds.move(instance)
    assert seen
    expect_untouched(kinds, instance, before, there)
    kinds.a.driver.destroy(None, instance, None)


def test_what_reads_is_killed(kinds: Kinds) -> None:
    kinds.a.configure(send_ahead=False, stream_length=2)
    instance = layered(kinds)
    before, there = kinds.a.root(instance), kinds.b.volumes()

    def kill(report: Report) -> None:
        if report.phase == "converting vda" and report.done > report.total / 2:
            for child in children("qemu-nbd"):
                os.kill(child, signal.SIGKILL)

    kinds.a.driver._progress = lambda: Progress(kill, interval=0)
    with pytest.raises(errors.MigrationRolledBack, match="reading vda"):
        kinds.move(instance)
    expect_untouched(kinds, instance, before, there)
    kinds.a.driver.destroy(None, instance, None)


def children(program: str) -> list[int]:
    """The processes of a program that this one started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, _, rest = path.read_text().partition(" (")
            name, _, rest = rest.rpartition(") ")
            if name == program and int(rest.split()[1]) == os.getpid():
                found.append(int(pid))
    return found


def test_a_killed_conversion_is_gone_on_with(kinds: Kinds) -> None:
    options = {"send_ahead": False, "stream_length": 2, "resume_age": 600}
    kinds.a.configure(**options)
    instance = layered(kinds)
    before, top = kinds.a.root(instance), kinds.a.disk(instance)[1].name
    argv = [sys.executable, "-m", "tests.functional.sides", str(kinds.a.config)]
    argv += [instance.uuid, kinds.b.host.name, kinds.b.name, "converting", "0.4"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100)
    assert done.returncode == -signal.SIGKILL, done.stderr
    first = int(done.stdout)
    assert first >= 4 * MiB
    deadline = time.monotonic() + 20
    while processes(top) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes(top)
    kinds.a.restart()
    assert kinds.a.state_of(instance) == "running"
    assert kinds.a.root(instance) == before
    kinds.move(instance)
    # Two workers, each with what was not acknowledged.
    assert kinds.sent() <= DENSE + 8 * MiB - first + 4 * MiB
    assert kinds.b.root(instance) == before
    kinds.a.driver.confirm_migration(None, None, instance, None)
    kinds.b.driver.destroy(None, instance, None)


@pytest.mark.parametrize(
    "kinds", [("dir-ext4", "dir-falloc")], ids="-".join, indirect=True
)
@pytest.mark.parametrize("flatten", [True, False], ids=["flattened", "as-it-is"])
def test_layers_between_directories(kinds: Kinds, flatten: bool) -> None:
    kinds.a.configure(flatten_disks=flatten)
    instance = layered(kinds)
    before = kinds.a.root(instance)
    kinds.move(instance)
    name, top = kinds.b.disk(instance)
    chain = kinds.b.driver.node.backend(name).chain(top.name)
    assert len(chain) == (1 if flatten else 3)
    assert kinds.b.root(instance) == before
    kinds.a.driver.confirm_migration(None, None, instance, None)
    assert not [name for name in kinds.a.volumes() if "vda" in name]
    kinds.b.driver.destroy(None, instance, None)
