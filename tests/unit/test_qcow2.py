# SPDX-License-Identifier: Apache-2.0
"""A qcow2 header that arrives: refused for a data file, and for nothing else."""

import json
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtmigrate import qcow2
from virtmigrate.units import GiB, KiB, MiB

DATA_FILE = 1 << 2
OBJECTION = "names a file for its data"
DOCUMENTED = (1 << 0, 1 << 1, 1 << 3, 1 << 4)
"""Incompatible features besides: dirty, corrupt, compression, extended L2 entries."""


def header(
    version: int = 3,
    *,
    features: int = 0,
    backing: tuple[int, int] = (0, 0),
    encryption: int = 0,
    snapshots: int = 0,
    compatible: int = 0,
    autoclear: int = 0,
) -> bytes:
    """Return a header of 1 GiB, as the format's specification lays it out."""
    fixed = struct.pack(
        ">4sIQIIQIIQQIIQ",
        b"QFI\xfb",
        version,
        *backing,
        16,
        1 << 30,
        encryption,
        2,
        0x30000,
        0x10000,
        1,
        snapshots,
        0x40000 if snapshots else 0,
    )
    assert len(fixed) == 72
    more = struct.pack(">QQQII", features, compatible, autoclear, 4, qcow2.HEADER)
    return fixed + more


def test_header_is_as_long_as_the_specification_says() -> None:
    assert len(header()) == qcow2.HEADER


@pytest.mark.parametrize("others", [0, *DOCUMENTED, (1 << 64) - 1 - DATA_FILE])
@pytest.mark.parametrize("version", [3, 4, 0, 1, 258, 0x02000000, (1 << 32) - 1])
def test_a_data_file_is_refused(version: int, others: int) -> None:
    """Also in versions that QEMU does not read today."""
    head = header(version, features=DATA_FILE | others)
    assert qcow2.objection(head) == OBJECTION


@given(features=st.integers(0, (1 << 64) - 1))
def test_one_feature_decides(features: int) -> None:
    """What else is unknown, dirty or corrupt QEMU refuses or repairs by itself."""
    expected = OBJECTION if features & DATA_FILE else None
    assert qcow2.objection(header(features=features)) == expected


@given(rest=st.binary(min_size=32, max_size=32))
def test_version_2_has_no_features(rest: bytes) -> None:
    """Behind its 72 bytes lies a backing file's name, or an extension."""
    assert qcow2.objection(header(2)[:72] + rest) is None


@pytest.mark.parametrize(
    "head",
    [
        header(backing=(0x50000, 11)),
        header(backing=((1 << 64) - 1, (1 << 32) - 1)),
        header(encryption=2),
        header(snapshots=3),
        header(compatible=(1 << 64) - 1 - DATA_FILE),
        header(compatible=DATA_FILE, autoclear=(1 << 64) - 1),
    ],
    ids=["backing", "absurd backing", "luks", "snapshots", "compatible", "autoclear"],
)
def test_what_records_and_the_domain_say_is_not_asked_here(head: bytes) -> None:
    assert qcow2.objection(head) is None


@pytest.mark.parametrize("length", [0, 3, 4, 8, 72, 79, 80, qcow2.HEADER - 1])
@pytest.mark.parametrize("version", [2, 3])
def test_truncated_is_refused(version: int, length: int) -> None:
    assert qcow2.objection(header(version)[:length]) == "is no qcow2"
    head = header(version, features=DATA_FILE)[:length]
    assert qcow2.objection(head) == "is no qcow2"


def test_what_follows_the_header_does_not_count() -> None:
    assert qcow2.objection(header() + bytes(8) + b"data.raw") is None
    assert qcow2.objection(header(features=DATA_FILE) + bytes(8)) == OBJECTION


@pytest.mark.parametrize(
    "magic", [b"\0\0\0\0", b"QFI\xfa", b"qfi\xfb", b"QFI\0", b"KDMV"]
)
def test_another_format_is_refused(magic: bytes) -> None:
    assert qcow2.objection(magic + header()[4:]) == "is no qcow2"


@given(data=st.binary(max_size=200))
def test_any_bytes_have_an_answer(data: bytes) -> None:
    assert qcow2.objection(data) in (None, OBJECTION, "is no qcow2")
    if not data.startswith(b"QFI\xfb"):
        assert qcow2.objection(data) == "is no qcow2"


@pytest.mark.parametrize("name", ["/a", "/pool/vda.0123456789abcdef", "/" + "x" * 1022])
@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_a_new_layer_says_what_it_stands_on(
    tmp_path: Path, name: str, fmt: str
) -> None:
    layer = new_layer(tmp_path)
    head = qcow2.with_backing(layer.read_bytes()[: qcow2.CLUSTER], name, fmt)
    with layer.open("r+b") as file:
        file.write(head)
    told = information(layer)
    assert told["backing-filename"] == name
    assert told["backing-filename-format"] == fmt
    assert told["virtual-size"] == MiB


@pytest.mark.parametrize("long", ["/" + "x" * 1023, "/" + "é" * 512])
def test_a_path_that_is_too_long(tmp_path: Path, long: str) -> None:
    head = new_layer(tmp_path).read_bytes()[: qcow2.CLUSTER]
    with pytest.raises(ValueError, match="too long"):
        qcow2.with_backing(head, long, "raw")


def test_only_a_new_layer_is_told(tmp_path: Path) -> None:
    head = new_layer(tmp_path).read_bytes()[: qcow2.CLUSTER]
    written = qcow2.with_backing(head, "/below", "raw")
    endless = head[:104] + b"\1" * (qcow2.CLUSTER - 104)
    for each in (written, head[:-1], b"\0" * qcow2.CLUSTER, endless):
        with pytest.raises(ValueError, match=r"no new qcow2|no end"):
            qcow2.with_backing(each, "/other", "raw")


def new_layer(tmp_path: Path) -> Path:
    layer = tmp_path / "layer"
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", str(layer), "1M"]
    subprocess.run(argv, check=True, timeout=60)
    return layer


def information(layer: Path) -> dict[str, Any]:
    argv = ["qemu-img", "info", "--output=json", "-f", "qcow2", str(layer)]
    said = subprocess.run(argv, check=True, timeout=60, capture_output=True).stdout
    found: dict[str, Any] = json.loads(said)
    return found


SIZES = (512, 64 * KiB, 8 * MiB, 10 * GiB + 512, 5000 * GiB)


@pytest.mark.parametrize("size", SIZES)
def test_blank_as_qemu_sees_it(tmp_path: Path, size: int) -> None:
    path = tmp_path / "blank"
    with path.open("wb") as file:
        file.write(qcow2.blank(size))
        file.truncate(qcow2.longest(size))
    argv = ["qemu-img", "check", "-q", "-f", "qcow2", str(path)]
    assert subprocess.run(argv, timeout=60).returncode == 0
    argv = ["qemu-img", "info", "-f", "qcow2", "--output=json", str(path)]
    done = subprocess.run(argv, check=True, capture_output=True, timeout=60)
    said = json.loads(done.stdout)
    assert said["virtual-size"] == size
    assert "backing-filename" not in said
    assert qcow2.objection(qcow2.blank(size)) is None


@pytest.mark.parametrize("size", [64 * KiB, 8 * MiB, 40 * MiB + 512])
def test_longest_is_enough(tmp_path: Path, size: int) -> None:
    """A file of that many bytes takes a disk that is written to everywhere."""
    path, room = tmp_path / "full", qcow2.longest(size)
    with path.open("wb") as file:
        file.write(qcow2.blank(size))
        file.truncate(room)
    slice_ = {"driver": "raw", "offset": 0, "size": room}
    file_ = {"driver": "file", "filename": str(path)}
    spec = {"driver": "qcow2", "file": slice_ | {"file": file_}}
    ends = range(0, size, 8 * MiB)
    writes = [f"write -P 5 {at} {min(8 * MiB, size - at)}" for at in ends]
    argv = ["qemu-io", *(word for w in writes for word in ("-c", w))]
    argv += ["-c", f"read -P 5 0 {size}", f"json:{json.dumps(spec)}"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    assert "failed" not in done.stdout
    assert path.stat().st_size == room


def test_less_is_not_enough(tmp_path: Path) -> None:
    """QEMU keeps to the room of the file."""
    path, size, room = tmp_path / "small", 8 * MiB, 2 * MiB
    with path.open("wb") as file:
        file.write(qcow2.blank(size))
        file.truncate(room)
    slice_ = {"driver": "raw", "offset": 0, "size": room}
    file_ = {"driver": "file", "filename": str(path)}
    spec = {"driver": "qcow2", "file": slice_ | {"file": file_}}
    argv = ["qemu-io", "-c", f"write -P 5 0 {size}", f"json:{json.dumps(spec)}"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert "No space left on device" in done.stdout + done.stderr
    assert path.stat().st_size == room
