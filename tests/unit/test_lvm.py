# SPDX-License-Identifier: Apache-2.0
"""What of the volume group needs no group."""

import threading

import libvirt
import pytest

from virtmigrate import errors, model, poolxml, record, translation, xml
from virtmigrate.backends import clearing, group


def test_device_mapper_names() -> None:
    assert group.mapped_name("vg", "vda.0123") == "vg-vda.0123"
    assert group.mapped_name("my-vg", "vda-r1.x") == "my--vg-vda--r1.x"


def test_a_pool_of_a_group() -> None:
    text = xml.write(poolxml.logical("virtmigrate-x-disks", "vg"))
    assert "<name>vg</name>" in text
    assert "<path>/dev/vg</path>" in text


def test_a_record_says_how_long_it_is() -> None:
    for owner in ("a", "a" * 4096, "a" * 5000):
        body = model.Hold(operation=owner, until=1.0)
        data = record.encode(body, "vda.1", 7)
        assert record.length_of(data[:4096]) == len(data)
        padded = data + b"\xa5" * 4096
        found = padded[: record.length_of(padded[:4096])]
        assert record.decode(found, model.Hold, "vda.1", 7) == body


@pytest.mark.parametrize(
    "head",
    [
        b"",
        bytes(4096),
        b"\xa5" * 4096,
        b"virtmigrate-record 1 1 x vda\n",
        b"virtmigrate-record 1 1 9" + b"9" * 20 + b" vda\n",
        b"virtmigrate-record 1 1 5 vda",
    ],
)
def test_what_is_no_record_has_no_length(head: bytes) -> None:
    assert record.length_of(head) == 0


def test_names_of_records() -> None:
    assert record.is_volume_name("vda.1.rec.12")
    for other in ("vda.1", "vda.1.manifest", "vda.rec.0", "vda.rec.x", ".rec"):
        assert not record.is_volume_name(other)


class FromLibvirt(libvirt.libvirtError):  # type: ignore[misc]
    def __init__(self, text: str) -> None:
        Exception.__init__(self, text)
        code, domain = libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_FROM_STORAGE
        self.err = (code, domain, text, 2, None, None, None, -1, -1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('Volume group "vg" has insufficient free space (1 extents)', errors.DiskFull),
        ('Logical Volume "x" already exists in volume group "vg"', errors.VolumeExists),
    ],
)
def test_what_lvm_says(text: str, expected: type[errors.Error]) -> None:
    doing = translation.Doing(
        host="h", doing="d", lost=False, seconds=1.0, pool="p", volume="x"
    )
    assert isinstance(translation.translate(FromLibvirt(text), doing), expected)


def test_volumes_are_cleared_one_after_the_other() -> None:
    seen: list[str] = []
    goes = threading.Event()

    def clear(name: str) -> None:
        assert goes.wait(10)
        seen.append(name)
        if name == "b":
            raise errors.StorageError(host="h", pool="p", reason="in use")

    queue = clearing.Clearing(clear)
    for name in ("a", "b", "a", "c"):
        queue.add(name)
    assert not queue.wait(0.01)
    goes.set()
    assert queue.wait(10)
    assert seen == ["a", "b", "c"]
    # A thread that ended is followed by another.
    queue.add("b")
    assert queue.wait(10)
    assert seen[3:] == ["b"]


def test_what_waits_is_forgotten_at_the_end() -> None:
    seen: list[str] = []
    began, goes = threading.Event(), threading.Event()

    def clear(name: str) -> None:
        began.set()
        assert goes.wait(10)
        seen.append(name)

    queue = clearing.Clearing(clear)
    queue.add("a")
    queue.add("b")
    assert began.wait(10)
    queue.close()
    assert queue.wait(0)
    goes.set()
    queue.add("c")
    assert queue.wait(10)
    assert seen == ["a", "c"]
