# SPDX-License-Identifier: Apache-2.0
"""What a guest sees of a chain of files, by the real qemu-nbd."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from virtmigrate import errors, guestview, nbdserver
from virtmigrate.domainxml import Layer, SourceType
from virtmigrate.formats import DiskFormat
from virtmigrate.units import KiB, MiB

SECONDS = 60
BASE, TOP = 3 * MiB, 600 * MiB
DATA = [(0, 4 * KiB, 1), (MiB, MiB, 2), (300 * MiB, 128 * KiB, 3)]
"""Start, length and pattern; the first two are in the base."""


@pytest.fixture
def chain(tmp_path: Path) -> list[Layer]:
    """A layer over a raw file that is smaller."""
    base, top = tmp_path / "base", tmp_path / "top"
    with base.open("wb") as file:
        file.truncate(BASE)
        for start, length, pattern in DATA[:2]:
            file.seek(start)
            file.write(bytes([pattern]) * length)
    options = ["-f", "qcow2", "-b", str(base), "-F", "raw"]
    run("qemu-img", "create", "-q", *options, str(top), str(TOP))
    start, length, pattern = DATA[2]
    command = f"write -P {pattern} {start} {length}"
    run("qemu-io", "-f", "qcow2", "-c", command, str(top))
    return [layer(top, DiskFormat.QCOW2), layer(base, DiskFormat.RAW)]


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sees that no process and no directory stays."""
    # Not in tmp_path: the path of a socket has 107 characters at most.
    with tempfile.TemporaryDirectory(prefix="guestview-") as private:
        monkeypatch.setattr(tempfile, "tempdir", private)
        yield
        assert not list(Path(private).iterdir())
    assert not servers(tmp_path)


def run(*argv: str) -> None:
    subprocess.run(argv, check=True, timeout=SECONDS, stdout=subprocess.DEVNULL)


def layer(path: Path, fmt: DiskFormat) -> Layer:
    return Layer(type=SourceType.FILE, source=str(path), fmt=fmt)


def servers(tmp: Path) -> list[int]:
    """The processes that serve files of a directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            said = path.read_bytes()
            if b"qemu-nbd" in said and os.fsencode(tmp) in said:
                found.append(int(path.parent.name))
    return found


def test_it_is_read_as_its_guest_sees_it(chain: list[Layer], tmp_path: Path) -> None:
    with guestview.GuestView(chain, TOP) as view:
        for start, length, pattern in DATA:
            assert view.read(start, start + length) == bytes([pattern]) * length
        assert not any(view.read(BASE - KiB, BASE + KiB) or b"")
        assert len(servers(tmp_path)) == 1
        view.demand_unchanged()


def test_holes_are_passed_over(chain: list[Layer]) -> None:
    with guestview.GuestView(chain, TOP) as view:
        assert view.skip(0) == 0
        assert view.skip(4 * KiB) == MiB
        assert view.skip(MiB + 5) == MiB + 5
        assert view.skip(2 * MiB) == 300 * MiB
        assert view.skip(301 * MiB) == TOP
        assert view.read(400 * MiB, 401 * MiB) is None


def test_another_size_than_the_records(chain: list[Layer]) -> None:
    view = guestview.GuestView(chain, TOP - MiB)
    with pytest.raises(errors.SourceUnreadable, match="its record says"), view:
        pass


def test_a_base_of_another_size_than_its_record(chain: list[Layer]) -> None:
    with (
        pytest.raises(errors.SourceChanged, match="not 4194304"),
        guestview.GuestView(chain[1:], BASE + MiB),
    ):
        pass


@pytest.mark.parametrize("which", [0, 1])
def test_what_changes_is_found(chain: list[Layer], which: int) -> None:
    with guestview.GuestView(chain, TOP) as view:
        os.utime(chain[which].source)
        with pytest.raises(errors.SourceChanged):
            view.demand_unchanged()


def test_a_broken_image(chain: list[Layer]) -> None:
    with Path(chain[0].source).open("r+b") as file:
        # Where its table of clusters is.
        file.seek(40)
        file.write(b"\xff" * 8)
    view = guestview.GuestView(chain, TOP)
    with pytest.raises(errors.SourceUnreadable, match="table"), view:
        pass


@pytest.mark.parametrize(
    ("fmt", "reason"),
    [(DiskFormat.QCOW2, "is no qcow2"), (DiskFormat.RAW, "may not read")],
)
def test_obstacles(chain: list[Layer], fmt: DiskFormat, reason: str) -> None:
    path = Path(chain[1].source)
    if fmt is DiskFormat.RAW:
        path.unlink()
    found = guestview.obstacle([chain[0], layer(path, fmt)], TOP)
    assert found is not None
    assert reason in found


def test_what_is_no_file(tmp_path: Path) -> None:
    block = Layer(type=SourceType.BLOCK, source="/dev/null", fmt=DiskFormat.RAW)
    assert "is no file" in str(guestview.obstacle([block], MiB))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/null"), tmp_path):
        found = guestview.obstacle([layer(path, DiskFormat.RAW)], MiB)
        assert "is no file" in str(found)


def test_a_server_that_does_not_answer(
    chain: list[Layer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbdserver, "_ANSWER", 0.5)
    monkeypatch.setattr(nbdserver, "_ENDING", 0.5)
    with (
        pytest.raises(errors.SourceUnreadable, match="did not answer"),
        guestview.GuestView(chain, TOP) as view,
    ):
        (pid,) = servers(tmp_path)
        os.kill(pid, signal.SIGSTOP)
        view.read(MiB, 2 * MiB)


KILLED = """
import os, signal, sys
from virtmigrate import domainxml, nbdserver
from virtmigrate.formats import DiskFormat

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

nbdserver.Server._connected = die
layer = domainxml.Layer(domainxml.SourceType.FILE, sys.argv[1], DiskFormat.RAW)
with nbdserver.Server([layer], 1):
    pass
"""


def test_what_a_killed_process_left_is_removed(
    chain: list[Layer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = Path(tempfile.gettempdir())
    argv = [sys.executable, "-c", KILLED, chain[1].source]
    done = subprocess.run(
        argv, env={**os.environ, "TMPDIR": str(private)}, timeout=SECONDS
    )
    assert done.returncode == -signal.SIGKILL
    (left,) = private.iterdir()
    nbdserver.sweep()
    # It is too young: its process may be about to lock it.
    assert left.exists()
    monkeypatch.setattr(nbdserver, "_MAKING", -1)
    with nbdserver._locked(left):
        nbdserver.sweep()
        assert left.exists()
    nbdserver.sweep()
    assert not left.exists()
    # Ended by the kernel with its parent; by us, if that was killed too early for it.
    deadline = time.monotonic() + SECONDS
    while servers(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_is_no_directory_of_ours_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbdserver, "_MAKING", -1)
    private, elsewhere = Path(tempfile.gettempdir()), tmp_path / "elsewhere"
    elsewhere.mkdir()
    others = [private / "virtmigrate-nbd-link", private / "virtmigrate-nbd-file"]
    others[0].symlink_to(elsewhere)
    others[1].touch()
    nbdserver.sweep()
    assert all(each.exists() for each in (*others, elsewhere))
    for each in others:
        each.unlink()
