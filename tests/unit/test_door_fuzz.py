# SPDX-License-Identifier: Apache-2.0
"""Headers that chance has written: refused or harmless, and the look never breaks.

VIRTMIGRATE_FUZZ is the number of headers of each kind; a few by default.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oslo_concurrency import processutils

from tests.unit import images
from virtmigrate import door
from virtmigrate.door import __main__ as child
from virtmigrate.door import confined, conversion, rules
from virtmigrate.units import GiB, KiB, MiB

EXAMPLES = int(os.environ.get("VIRTMIGRATE_FUZZ", "10"))
ALL = door.Limits(formats=tuple(rules.ALLOWED))
FUZZED = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES <= 10,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

PLACES = {
    "qcow2": [(0, 256), (64 * KiB, 64), (192 * KiB, 64)],
    "qcow2-v2": [(0, 128)],
    "qcow2-zlib": [(0, 256)],
    "vmdk": [(0, 80), (512, 1024), (10 * KiB, 512)],
    "vmdk-footer": [(0, 80), (512, 1024)],
    "vdi": [(64, 512)],
    "vhd": [(0, 128), (512, 1024)],
    "vhdx": [(0, 64), (64 * KiB, 128), (192 * KiB, 128), (2 * MiB, 256)],
}
"""Where the headers of each kind lie: offset and length."""

TEXT = [
    b'parentFileNameHint="/etc/passwd"\n',
    b'RW 8 FLAT "/etc/passwd" 0\n',
    b'createType="monolithicFlat"\n',
    b"parentCID=00000001\n",
    images.JSON,
]


@st.composite
def changes(draw: st.DrawFn, name: str) -> list[tuple[int, bytes]]:
    """Draw a few writes into the places of a header."""
    written = []
    for _ in range(draw(st.integers(1, 3))):
        offset, length = draw(st.sampled_from(PLACES[name]))
        number = st.integers(0, 63).map(lambda bit: 1 << bit)
        data = st.one_of(
            st.binary(min_size=1, max_size=8),
            number.map(lambda value: value.to_bytes(8, "big")),
            number.map(lambda value: value.to_bytes(8, "little")),
            st.sampled_from([bytes(4), b"\xff" * 8, *TEXT]),
        )
        shift = draw(st.one_of(st.integers(0, length // 4 - 1).map(lambda x: 4 * x)))
        written.append((offset + shift, draw(data)))
    return written


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    yield images.make(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize("name", PLACES)
def test_changed_header_is_refused_or_harmless(
    made: dict[str, Path], tmp_path: Path, name: str
) -> None:
    original, path, fmt = made[name].read_bytes(), tmp_path / name, name.split("-")[0]

    @FUZZED
    @given(written=changes(name))
    def look(written: list[tuple[int, bytes]]) -> None:
        data = bytearray(original)
        for offset, new in written:
            data[offset : offset + len(new)] = new
        path.write_bytes(data)
        with path.open("rb") as image:
            told = child._look(image, fmt, ALL)
        assert bool(told.refused) != bool(told.format)
        if told.format:
            assert 0 < told.virtual_size <= ALL.max_size
            assert_names_nothing(bytes(data), fmt)
            assert_harmless(path, fmt, told.virtual_size)

    look()


@FUZZED
@given(data=st.binary(max_size=2048), fmt=st.sampled_from(list(rules.ALLOWED)))
def test_any_bytes_have_an_answer(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, fmt: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(data)
    with path.open("rb") as image:
        told = child._look(image, fmt, ALL)
    assert bool(told.refused) != bool(told.format)
    assert not told.format or fmt == "raw"


def assert_names_nothing(data: bytes, fmt: str) -> None:
    """Read what names other files again, in the plainest way."""
    if fmt == "qcow2":
        assert data[8:20] == bytes(12), "backing file"
        assert data[32:36] == bytes(4), "encryption"
        if data[7] == 3:
            assert data[79] & 0b10100 == 0, "data file, or L2 entries of another kind"
            assert b"DATA" not in data[104:1024]
    if fmt == "vmdk":
        assert data[:4] == b"KDMV" and data[12:20] != bytes(8)
        assert b"parentfilenamehint" not in data[512 : 512 + 20 * 512].lower()
    if fmt == "vdi":
        assert data[0x1A8:0x1C8] == bytes(32)
    if fmt == "vhd":
        assert data[63] == 3


def assert_harmless(path: Path, fmt: str, size: int) -> None:
    """Ask qemu-img, which may refuse what we let in, and may name no other file."""
    driver = {
        **conversion.DRIVERS[fmt],
        "file": {"driver": "file", "filename": str(path)},
    }
    ended = confined.run(
        [
            confined.require("qemu-img"),
            *("info", "--output=json"),
            "json:" + msgspec.json.encode(driver).decode(),
        ],
        limits=processutils.ProcessLimits(
            address_space=GiB, core_file_size=0, cpu_time=10, file_size=0
        ),
        seconds=60,
        check=lambda: None,
    )
    if ended.code:
        # Not by a signal: that would be a hole in QEMU that the door lets through.
        assert ended.code == 1, ended
        return
    told = msgspec.json.decode(ended.output)
    assert not {"backing-filename", "full-backing-filename", "encrypted"} & set(told)
    assert told["virtual-size"] == size
    details = told.get("format-specific", {}).get("data", {})
    assert "data-file" not in details
    assert all(each["filename"] == str(path) for each in details.get("extents", []))
