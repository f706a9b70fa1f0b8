# SPDX-License-Identifier: Apache-2.0
"""Images become raw files; qemu-img sees those that came through the door only."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from tests.unit import images
from virtmigrate import door, errors
from virtmigrate.door import confined, conversion, look, rules
from virtmigrate.units import KiB, MiB

ALL = door.Limits(formats=tuple(rules.ALLOWED))
SIZE = images.SIZE + MiB


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return images.make(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def looks_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look in this process: by the same rules, and without the start of another."""

    def ask(image: int, declared: str, limits: door.Limits, _: object) -> int:
        with os.fdopen(os.dup(image), "rb") as file:
            return rules.examine(file, declared, limits).virtual_size

    monkeypatch.setattr(look, "_ask", ask)


class Programs:
    """What would be started."""

    def __init__(self) -> None:
        self.started: list[list[str]] = []

    def run(self, argv: Sequence[str], **_: object) -> confined.Ended:
        self.started.append(list(argv))
        return confined.Ended(0, b"", b"")


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Programs:
    """All that the door starts, it starts by confined.run()."""
    found = Programs()
    monkeypatch.setattr(confined, "run", found.run)
    return found


def convert(source: Path, fmt: str, target: Path, size: int = SIZE) -> None:
    door.convert(source, fmt, target, size, ALL, lambda: None)


# What is written


@pytest.mark.parametrize(
    "name", ["qcow2-zstd", "vmdk", "vmdk-stream", "vmdk-footer", "vdi", "vhd", "vhdx"]
)
def test_bytes_are_those_of_the_disk(
    made: dict[str, Path], tmp_path: Path, name: str
) -> None:
    target = tmp_path / "a, b=c.raw"
    convert(made[name], images.declared(name), target)
    assert target.read_bytes() == images.content() + bytes(MiB)


def test_target_that_had_something(made: dict[str, Path], tmp_path: Path) -> None:
    """Its bytes are gone, its file is the same, and zeros are holes."""
    target = tmp_path / "target"
    target.write_bytes(b"\xff" * (SIZE + 4096))
    target.chmod(0o640)
    inode = target.stat().st_ino
    convert(made["qcow2"], "qcow2", target)
    assert target.read_bytes() == images.content() + bytes(MiB)
    found = target.stat()
    assert (found.st_ino, found.st_mode & 0o777) == (inode, 0o640)
    assert found.st_blocks * 512 < images.SIZE


def test_target_through_a_link_is_refused(
    made: dict[str, Path], tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("precious")
    (tmp_path / "link").symlink_to(elsewhere)
    with pytest.raises(errors.ImageNotConverted):
        convert(made["qcow2"], "qcow2", tmp_path / "link")
    assert elsewhere.read_text() == "precious"


def test_progress_is_told(made: dict[str, Path], tmp_path: Path) -> None:
    told: list[int] = []
    door.convert(
        made["qcow2"], "qcow2", tmp_path / "t", SIZE, ALL, lambda: None, told.append
    )
    assert told and all(0 <= each <= SIZE for each in told)


# What is refused


@pytest.mark.parametrize("fmt", ["raw", "iso"])
def test_raw_is_not_converted(
    made: dict[str, Path], tmp_path: Path, programs: Programs, fmt: str
) -> None:
    with pytest.raises(errors.ImageNotConverted, match="do not become"):
        convert(made[fmt], fmt, tmp_path / "t")
    assert not programs.started and not (tmp_path / "t").exists()


def test_target_that_is_too_small(
    made: dict[str, Path], tmp_path: Path, programs: Programs
) -> None:
    with pytest.raises(errors.ImageNotConverted, match="do not become"):
        convert(made["qcow2"], "qcow2", tmp_path / "t", images.SIZE - 512)
    assert not programs.started


@pytest.mark.parametrize("inner", ["qcow2", "vmdk", "vdi"])
def test_image_inside_an_image(
    made: dict[str, Path], tmp_path: Path, inner: str
) -> None:
    """Nobody here probes the disk; whoever does by mistake finds no header."""
    outer = tmp_path / "outer"
    images.qemu_img("convert", "-f", "raw", "-O", "qcow2", made[inner], outer)
    size = 16 * MiB
    with pytest.raises(errors.ImageRefused, match=f"of the disk in it: .*like {inner}"):
        convert(outer, "qcow2", tmp_path / "t", size)


def test_no_hostile_image_is_opened_by_qemu_img(
    made: dict[str, Path], tmp_path: Path, programs: Programs
) -> None:
    path = tmp_path / "hostile"
    for case in images.HOSTILE:
        path.write_bytes(case.change(made[case.base].read_bytes()))
        with pytest.raises(errors.ImageRefused):
            convert(path, case.format, tmp_path / "t", 1 << 62)
    assert not programs.started


def test_qemu_img_is_told_everything(
    made: dict[str, Path], tmp_path: Path, programs: Programs
) -> None:
    """All formats, the kind of both files, and that there is no backing file."""
    for fmt in conversion.DRIVERS:
        convert(made[fmt], fmt, tmp_path / "t")
    assert len(programs.started) == len(conversion.DRIVERS)
    for argv, fmt in zip(programs.started, conversion.DRIVERS, strict=True):
        assert Path(argv[0]).name == "qemu-img"
        [image] = [each for each in argv if each.startswith("json:")]
        told = msgspec.json.decode(image.removeprefix("json:"))
        assert told["file"] == {"driver": "file", "filename": str(made[fmt])}
        assert told["driver"] == {"vhd": "vpc"}.get(fmt, fmt)
        assert ("backing" in told) == (fmt in ("qcow2", "vmdk"))
        assert told.get("backing") is None
        assert argv[-1].startswith("driver=raw,file.driver=file,file.filename=")
        assert not {"-f", "-O", "-o", "-B"} & set(argv)


# What goes wrong


def slow_qemu_img(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """Put another program in the place of qemu-img; it writes its process id."""
    pid = tmp_path / "pid"
    program = tmp_path / "qemu-img"
    program.write_text(f"#!/bin/sh\necho $$ >{pid}\n{script}\n")
    program.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return pid


def test_conversion_that_takes_too_long(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = slow_qemu_img(tmp_path, monkeypatch, "exec sleep 600")
    limits = door.Limits(convert_seconds=1)
    with pytest.raises(errors.ImageNotConverted, match="too long"):
        door.convert(made["qcow2"], "qcow2", tmp_path / "t", SIZE, limits, lambda: None)
    assert not Path(f"/proc/{pid.read_text().strip()}").exists()


def test_cancelled_conversion_leaves_no_process(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = slow_qemu_img(tmp_path, monkeypatch, "exec sleep 600")

    def check() -> None:
        if pid.exists() and pid.read_text().strip():
            raise errors.Cancelled

    with pytest.raises(errors.Cancelled):
        door.convert(made["qcow2"], "qcow2", tmp_path / "t", SIZE, ALL, check)
    assert not Path(f"/proc/{pid.read_text().strip()}").exists()


def test_conversion_that_fails_says_why(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_qemu_img(tmp_path, monkeypatch, "printf 'no\\033[1m room' >&2; exit 1")
    with pytest.raises(errors.ImageNotConverted, match=r"ended with 1: no\\x1b"):
        convert(made["qcow2"], "qcow2", tmp_path / "t")


def test_broken_content_is_not_converted(made: dict[str, Path], tmp_path: Path) -> None:
    """The header is in order; what it leads to is not."""
    path = tmp_path / "broken"
    data = bytearray(made["qcow2"].read_bytes())
    table = int.from_bytes(data[40:48], "big")
    data[table : table + 8] = b"\xff" * 8
    path.write_bytes(data)
    with pytest.raises(errors.ImageNotConverted, match="ended with 1"):
        convert(path, "qcow2", tmp_path / "t")


def test_bomb_is_bounded(tmp_path: Path) -> None:
    """One compressed cluster, named again and again, fills no more than the disk."""
    raw, bomb = tmp_path / "raw", tmp_path / "bomb"
    raw.write_bytes(b"\xee" * 64 * KiB + bytes(4 * MiB - 64 * KiB))
    images.qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", raw, bomb)
    data = bytearray(bomb.read_bytes())
    first = int.from_bytes(data[40:48], "big")
    table = int.from_bytes(data[first : first + 8], "big") & ((1 << 56) - 512)
    data[table : table + 64 * 8] = data[table : table + 8] * 64
    bomb.write_bytes(data)
    target = tmp_path / "t"
    door.convert(bomb, "qcow2", target, 4 * MiB, ALL, lambda: None)
    assert target.read_bytes() == b"\xee" * 4 * MiB
    small = door.Limits(max_size=2 * MiB)
    with pytest.raises(errors.ImageRefused, match="more than"):
        door.convert(bomb, "qcow2", target, 4 * MiB, small, lambda: None)


def test_qemu_img_cannot_write_more_than_the_target(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f"exec head -c {2 * SIZE} /dev/zero >{tmp_path}/t"
    slow_qemu_img(tmp_path, monkeypatch, script)
    with pytest.raises(errors.ImageNotConverted):
        convert(made["qcow2"], "qcow2", tmp_path / "t")
    assert (tmp_path / "t").stat().st_size <= SIZE


def test_compared_by_qemu_img(made: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "t"
    convert(made["vhd"], "vhd", target, images.SIZE)
    command = ["qemu-img", "compare", "-f", "vpc", "-F", "raw"]
    done = subprocess.run(
        [*command, made["vhd"], target], timeout=images.SECONDS, capture_output=True
    )
    assert done.returncode == 0, done.stdout
