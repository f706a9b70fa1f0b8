# SPDX-License-Identifier: Apache-2.0
"""What is asked for, and how a disk becomes the bytes of an image."""

import errno
import os
import subprocess
import threading
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import pytest

from virtmigrate import errors, mapping, sinks
from virtmigrate.livesnapshot import Kind, Quiesce, Target, outgoing
from virtmigrate.units import KiB, MiB


class Disk:
    """A disk of some data and holes, with faults to choose."""

    name = "vda"

    def __init__(self, size: int, data: Mapping[int, bytes]) -> None:
        self.size = size
        self.data = data
        self.changed = False
        self.error: OSError | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def content(self) -> bytes:
        found = bytearray(self.size)
        for start, data in self.data.items():
            found[start : start + len(data)] = data
        return bytes(found)

    def read(self, start: int, end: int) -> bytes | None:
        assert end <= self.size
        if self.error is not None:
            raise self.error
        return self.content[start:end]

    def skip(self, start: int) -> int:
        ends = [at + len(data) for at, data in self.data.items()]
        found = zip(self.data, ends, strict=True)
        return min(
            (max(at, start) for at, end in found if end > start), default=self.size
        )

    def demand_unchanged(self) -> None:
        if self.changed:
            raise errors.SourceChanged(volume=self.name, reason="on purpose")


class Meter:
    def __init__(self) -> None:
        self.passed = self.sent = 0

    def check(self) -> None:
        pass

    def count(self, passed: int, *, sent: int) -> None:
        self.passed += passed
        self.sent += sent


def a_disk() -> Disk:
    return Disk(
        6 * MiB + 512,
        {
            0: b"a" * 100 * KiB,
            MiB: bytes(MiB),
            3 * MiB - 5: b"b" * 10,
            6 * MiB: b"c" * 512,
        },
    )


def bytes_of(pieces: list[sinks.Piece]) -> bytes:
    return b"".join(bytes(p) if isinstance(p, int) else p for p in pieces)


def test_raw() -> None:
    disk, meter = a_disk(), Meter()
    image = outgoing.Outgoing(disk, "raw", meter)
    pieces = list(image.pieces("sha256"))
    assert bytes_of(pieces) == disk.content
    assert image.size == meter.passed == disk.size
    # What is sent is what holds something, by 64 KiB.
    assert meter.sent < 400 * KiB
    found = sinks.Print("sha256", disk.size)
    found.add(disk.content)
    assert image.digest("sha256") == found.hex()


def test_qcow2(tmp_path: Path) -> None:
    disk = a_disk()
    image = outgoing.Outgoing(disk, "qcow2", Meter())
    data = bytes_of(list(image.pieces(sinks.MANIFEST)))
    assert len(data) == image.size
    made, raw = tmp_path / "made", tmp_path / "raw"
    made.write_bytes(data)
    raw.write_bytes(disk.content)
    argv = ["qemu-img", "compare", "-f", "qcow2", "-F", "raw", str(made), str(raw)]
    subprocess.run(argv, check=True, timeout=60, stdout=subprocess.DEVNULL)


def test_another_digest_is_counted_by_reading_again() -> None:
    disk = a_disk()
    image = outgoing.Outgoing(disk, "raw", Meter())
    list(image.pieces("sha512"))
    found = sinks.Print("sha256", disk.size)
    found.add(disk.content)
    assert image.digest("sha256") == found.hex()


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_last_piece_waits_for_the_disk_to_be_unchanged(fmt: str) -> None:
    disk = a_disk()
    image = outgoing.Outgoing(disk, fmt, Meter())
    whole = len(list(image.pieces("sha256")))
    disk.changed = True
    got = []
    with pytest.raises(errors.SourceChanged):
        for piece in image.pieces("sha256"):
            got.append(piece)
    assert len(got) == whole - 1


def test_failing_disk_is_not_taken_for_a_failing_sink() -> None:
    disk = a_disk()
    image = outgoing.Outgoing(disk, "raw", Meter())
    disk.error = OSError(errno.EIO, os.strerror(errno.EIO))
    with pytest.raises(errors.SourceUnreadable, match=os.strerror(errno.EIO)):
        list(image.pieces("sha256"))


def test_who_stops_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    pieces = outgoing.Outgoing(a_disk(), "raw", Meter()).pieces("sha256")
    next(pieces)
    pieces.close()
    assert set(threading.enumerate()) == before


def test_disk_of_nothing() -> None:
    disk = Disk(3 * MiB, {})
    assert list(outgoing.Outgoing(disk, "raw", Meter()).pieces("md5")) == [3 * MiB]


@pytest.mark.parametrize(
    ("where", "other"),
    [
        ("/srv/a.qcow2", "/srv/a-vdb.qcow2"),
        ("/srv/a", "/srv/a-vdb"),
        ("/s.d/a", "/s.d/a-vdb"),
        ("/srv/.a", "/srv/.a-vdb"),
    ],
)
def test_files_of_other_disks(where: str, other: str) -> None:
    target = Target(kind=Kind.FILE, where=where, name="a")
    assert target.beside("vdb").where == other


def test_images_of_other_disks_are_new() -> None:
    target = Target(kind=Kind.SERVICE, where="x", name="a", is_new=False)
    other = target.beside("vdb")
    assert other.is_new and other.name == "a-vdb" and other.where != "x"


class Properties:
    """As Nova's are: reading what is not set is an error."""

    def __init__(self, **values: object) -> None:
        self._values = values

    def __getattr__(self, name: str) -> object:
        raise NotImplementedError(name)

    def get(self, name: str, default: object = None) -> object:
        return self._values.get(name, default)


@pytest.mark.parametrize("kind", [dict, Properties])
@pytest.mark.parametrize(
    ("properties", "expected"),
    [
        ({}, Quiesce.NO),
        ({"hw_qemu_guest_agent": "yes"}, Quiesce.TRY),
        ({"hw_qemu_guest_agent": False}, Quiesce.NO),
        ({"os_require_quiesce": True, "hw_qemu_guest_agent": True}, Quiesce.DEMAND),
    ],
    ids=str,
)
def test_what_an_image_wants(
    kind: Any, properties: dict[str, Any], expected: Quiesce
) -> None:
    meta = types.SimpleNamespace(properties=kind(**properties))
    assert mapping.quiescing(meta) is expected
    assert mapping.quiescing(None) is Quiesce.NO


def test_properties_that_an_image_service_keeps() -> None:
    instance = types.SimpleNamespace(project_id="p", kernel_id="", os_type=None)
    assert mapping.saved_properties(instance) == {
        "image_location": "snapshot",
        "image_state": "available",
        "owner_id": "p",
    }
