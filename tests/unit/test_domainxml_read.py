# SPDX-License-Identifier: Apache-2.0
"""Domain XML that others wrote: what it leaves open is told, nothing filled in."""

from __future__ import annotations

import pytest

from virtmigrate import domainxml, errors, units
from virtmigrate.domainxml import Auth

ID = "7b2d8f9e-32b4-4f2e-9d65-0a3f8f1c2b11"


def disk_xml(inner: str, attributes: str = "type='file'") -> str:
    return (
        f"<domain type='kvm'><name>n</name><devices><disk {attributes}>{inner}"
        "<target dev='vda' bus='virtio'/></disk></devices></domain>"
    )


QCOW2 = "<driver name='qemu' type='qcow2'/><source file='/top'/>"
OPEN = {
    "no format": ("<source file='/top'/>", "format of /top"),
    "no end": (QCOW2, "whether /top has a backing layer"),
    "no format below": (
        QCOW2 + "<backingStore type='file'><source file='/b'/></backingStore>",
        "format of /b",
    ),
    "no end below": (
        QCOW2 + "<backingStore type='file'><format type='qcow2'/>"
        "<source file='/b'/></backingStore>",
        "whether /b has a backing layer",
    ),
    "no type below": (
        QCOW2 + "<backingStore><format type='raw'/><source file='/b'/></backingStore>",
        "has no type",
    ),
    "raw with backing": (
        "<driver type='raw'/><source file='/top'/><backingStore type='file'>"
        "<format type='raw'/><source file='/b'/></backingStore>",
        "/top is raw and has a backing layer",
    ),
    "unknown format": (
        "<driver type='vmdk'/><source file='/top'/><backingStore/>",
        "format vmdk",
    ),
    "no source": ("<driver type='raw'/>", "no source"),
    "empty source": ("<driver type='raw'/><source file=''/>", "no source"),
    "two sources": (QCOW2 + "<source file='/other'/><backingStore/>", "2 elements"),
}


@pytest.mark.parametrize(("inner", "problem"), OPEN.values(), ids=OPEN.keys())
def test_disk_left_open(inner: str, problem: str) -> None:
    (disk,) = domainxml.disks(disk_xml(inner))
    assert any(problem in each for each in disk.problems)
    assert all("disk vda" in each for each in disk.problems)
    with pytest.raises(errors.DomainNotUnderstood):
        disk.layers()


@pytest.mark.parametrize("kind", ["volume", "nvme", "vhostuser", "dir"])
def test_disk_of_unknown_source(kind: str) -> None:
    (disk,) = domainxml.disks(disk_xml("<source/>", f"type='{kind}'"))
    assert disk.chain == ()
    assert not disk.terminated
    assert disk.problems == (f"disk vda: a source of type {kind} is not understood",)


def test_disk_of_other_protocol() -> None:
    inner = "<driver type='raw'/><source protocol='nbd' name='x'/>"
    (disk,) = domainxml.disks(disk_xml(inner, "type='network'"))
    assert "protocol nbd" in disk.problems[0]


def test_raw_without_terminator_is_terminated() -> None:
    inner = "<driver type='raw'/><source file='/top'/>"
    (disk,) = domainxml.disks(disk_xml(inner))
    assert (disk.terminated, disk.problems) == (True, ())


def test_auth_beside_the_source() -> None:
    inner = (
        "<driver type='raw'/><source protocol='rbd' name='p/i'/>"
        f"<auth username='u'><secret type='ceph' uuid='{ID}'/></auth>"
    )
    (disk,) = domainxml.disks(disk_xml(inner, "type='network'"))
    assert disk.layers()[0].auth == Auth("u", ID)


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("<memory>4</memory>", 4096),
        ("<memory unit='b'>4097</memory>", 5 * units.KiB),
        ("<memory unit='MiB'>2</memory>", 2 * units.MiB),
        ("<memory unit='M'>2</memory>", 2 * units.MiB),
        ("<memory unit='KB'>1024</memory>", 1024_000),
        ("<memory unit='G'>1</memory>", units.GiB),
    ],
)
def test_memory_units(written: str, size: int) -> None:
    assert domainxml.memory(f"<domain>{written}</domain>") == size


@pytest.mark.parametrize(
    "text",
    [
        "<domain/>",
        "<domain><memory>x</memory></domain>",
        "<domain><memory>-1</memory></domain>",
        "<domain><memory unit='parsec'>1</memory></domain>",
        "<domain><memory>1</memory><memory>2</memory></domain>",
        "<volume/>",
        "<domain xmlns='urn:x'><memory>1</memory></domain>",
    ],
)
def test_memory_not_understood(text: str) -> None:
    with pytest.raises(errors.DomainNotUnderstood):
        domainxml.memory(text)


@pytest.mark.parametrize(
    ("written", "needed"),
    [
        ("", None),
        ("<cpu mode='host-passthrough'/>", None),
        ("<cpu mode='host-model'/>", None),
        ("<cpu><topology sockets='1' cores='1' threads='1'/></cpu>", None),
        ("<cpu match='exact'><model>Nehalem</model></cpu>", "Nehalem"),
        ("<cpu mode='custom'><model>Nehalem</model></cpu>", "Nehalem"),
    ],
)
def test_cpu_needed(written: str, needed: str | None) -> None:
    found = domainxml.cpu_needed(f"<domain>{written}</domain>")
    assert (found and found.model) == needed


def test_interfaces_leave_out_the_others() -> None:
    text = (
        "<domain><devices><interface type='user'><mac address='52:54:00:00:00:09'/>"
        "</interface></devices></domain>"
    )
    assert domainxml.interfaces(text) == ()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("org.qemu.guest_agent.0", "connected"), ("com.redhat.spice.0", None)],
)
def test_agent_state(name: str, expected: str | None) -> None:
    target = f"<target type='virtio' name='{name}' state='connected'/>"
    text = f"<domain><devices><channel>{target}</channel></devices></domain>"
    assert domainxml.agent_state(text) == expected
