# SPDX-License-Identifier: Apache-2.0
"""Domain XML: what is built reads back equal, and libvirt takes it.

libvirt itself judges, through its test driver: it parses and formats with the
code of the QEMU driver, needs no daemon and touches no host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from virtmigrate import domainxml, errors, units
from virtmigrate.domainxml import (
    Auth,
    Cpu,
    Disk,
    DiskFormat,
    Domain,
    Firmware,
    Interface,
    InterfaceKind,
    Layer,
    SourceType,
    Topology,
)

SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")
ID = "7b2d8f9e-32b4-4f2e-9d65-0a3f8f1c2b11"

OVERLAY = Layer(SourceType.FILE, "/pool/über & 'top'.qcow2", DiskFormat.QCOW2)
MIDDLE = Layer(SourceType.BLOCK, "/dev/vg/middle", DiskFormat.QCOW2)
BASE = Layer(SourceType.FILE, "/pool/base", DiskFormat.RAW)
RBD = Layer(
    SourceType.NETWORK,
    "pool/image",
    DiskFormat.RAW,
    ("mon1:6789", "mon2", "[::1]:6789", "fe80::1"),
    Auth("nova", ID),
)

DISKS = (
    Disk("vda", (OVERLAY, MIDDLE, BASE), boot_order=1, serial="a-1"),
    Disk("vdb", (RBD,), cache="writeback", discard="ignore"),
    Disk("vdc", (BASE,), readonly=True),
    Disk("sda", (BASE,), bus="sata", device="cdrom"),
    Disk("sdb", (), bus="sata", device="cdrom"),
    Disk("sdc", (OVERLAY,), bus="scsi"),
)
INTERFACES = (
    Interface("52:54:00:00:00:01", "br0", mtu=1400, device="tap0"),
    Interface("52:54:00:00:00:02", "br-int", InterfaceKind.OVS, ID, "tap1"),
    Interface("52:54:00:00:00:03", "default", InterfaceKind.NETWORK, device="tap2"),
)
FIRMWARE = Firmware("/fw/code.fd", "/nv/vars.fd", "/fw/vars.fd")
CPU = Cpu(
    "custom",
    "Nehalem",
    (("require", "vmx"), ("disable", "svm")),
    "exact",
    "partial",
    Topology(1, 2, 1),
)

BARE = Domain(ID, "bare", 64 * units.MiB, 1, "qemu", "pc")
FULL = Domain(
    uuid=ID,
    name="a<b & \"c\" 'd' é",
    memory=256 * units.MiB,
    vcpus=2,
    virt_type="kvm",
    machine="q35",
    cpu=CPU,
    disks=DISKS,
    interfaces=INTERFACES,
    firmware=FIRMWARE,
    console_log="/log/console.log",
    metadata={"owner": "nova", "note": "<&>\"' é\n two", "empty": ""},
    title="a title",
    description="some words",
)
DOMAINS = {
    "bare": BARE,
    "full": FULL,
    "secure boot": dataclasses.replace(
        FULL, firmware=dataclasses.replace(FIRMWARE, secure=True)
    ),
    "rom": dataclasses.replace(BARE, firmware=Firmware("/fw/bios.bin", pflash=False)),
    "host CPU": dataclasses.replace(BARE, cpu=Cpu("host-passthrough")),
    "arm": dataclasses.replace(BARE, arch="aarch64", machine="virt"),
    "versioned": dataclasses.replace(BARE, machine="pc-q35-7.2"),
}


@pytest.fixture(name="libvirtd")
def fixture_libvirtd() -> Iterator[libvirt.virConnect]:
    connection = libvirt.open("test:///default")
    yield connection
    connection.close()


def through_libvirt(connection: libvirt.virConnect, text: str) -> str:
    """Define a domain in libvirt's test driver, and return what it made of it."""
    root = etree.fromstring(text)
    kind = root.get("type", "")
    root.set("type", "test")
    flags = libvirt.VIR_DOMAIN_DEFINE_VALIDATE
    domain = connection.defineXMLFlags(etree.tostring(root, encoding="unicode"), flags)
    wanted = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE
    result = str(domain.XMLDesc(wanted))
    domain.undefine()
    return result.replace("type='test'", f"type='{kind}'", 1)


def schema_errors(text: str) -> list[str]:
    schema = etree.RelaxNG(file=str(SCHEMA))
    schema.validate(etree.fromstring(text))
    return [entry.message for entry in schema.error_log]


# Building


@pytest.mark.parametrize("domain", DOMAINS.values(), ids=DOMAINS.keys())
def test_build_follows_the_schema(domain: Domain) -> None:
    assert schema_errors(domainxml.build(domain)) == []


@pytest.mark.parametrize("domain", DOMAINS.values(), ids=DOMAINS.keys())
def test_build_reads_back_equal(domain: Domain) -> None:
    assert_same(domainxml.build(domain), domain)


@pytest.mark.parametrize("domain", DOMAINS.values(), ids=DOMAINS.keys())
def test_build_survives_libvirt(domain: Domain, libvirtd: libvirt.virConnect) -> None:
    assert_same(through_libvirt(libvirtd, domainxml.build(domain)), domain)


def assert_same(text: str, domain: Domain) -> None:
    found = domainxml.read(text)
    for name in ("uuid", "name", "memory", "vcpus", "virt_type", "machine", "arch"):
        assert getattr(found, name) == getattr(domain, name)
        assert getattr(domainxml, name)(text) == getattr(domain, name)
    assert found.cpu == domain.cpu
    assert found.firmware == domain.firmware
    assert found.console_log == domain.console_log
    assert found.interfaces == domain.interfaces
    assert (found.metadata or {}) == domain.metadata
    assert [disk.target for disk in found.disks] == [d.target for d in domain.disks]
    for there, built in zip(found.disks, domain.disks, strict=True):
        assert there.layers() == built.chain
        assert there.terminated
        assert (there.bus, there.device) == (built.bus, built.device)
        assert there.readonly == (built.readonly or built.device == "cdrom")
        assert (there.boot_order, there.serial) == (built.boot_order, built.serial)
        assert there.cache == built.cache


@pytest.mark.parametrize("domain", DOMAINS.values(), ids=DOMAINS.keys())
def test_build_has_no_obstacles(domain: Domain, libvirtd: libvirt.virConnect) -> None:
    text = domainxml.build(domain)
    assert domainxml.obstacles(text) == ()
    assert domainxml.obstacles(through_libvirt(libvirtd, text)) == ()


def test_build_every_chain_has_an_end() -> None:
    root = etree.fromstring(domainxml.build(FULL))
    for disk in root.findall("devices/disk"):
        sources = disk.findall(".//source")
        stores = disk.findall(".//backingStore")
        assert len(stores) == len(sources)
        assert all(store.get("type") for store in stores[:-1])
        assert disk.xpath("string(driver/@type)") in ("raw", "qcow2")
        if stores:
            assert (len(stores[-1]), dict(stores[-1].attrib)) == (0, {})


def test_build_devices() -> None:
    root = etree.fromstring(domainxml.build(FULL))
    for path, value in (
        ("count(genid)", 1),
        ("count(features/acpi)", 1),
        ("string(devices/channel/target/@name)", "org.qemu.guest_agent.0"),
        ("string(devices/rng/backend)", "/dev/urandom"),
        ("string(devices/serial/log/@append)", "on"),
        ("string(devices/serial/target/@type)", "isa-serial"),
        ("string(devices/memballoon/@model)", "virtio"),
        ("string(os/nvram)", "/nv/vars.fd"),
    ):
        assert root.xpath(path) == value


def test_build_rounds_memory_up() -> None:
    domain = dataclasses.replace(BARE, memory=64 * units.MiB + 1)
    assert domainxml.memory(domainxml.build(domain)) == 64 * units.MiB + units.KiB


def test_build_refuses_raw_with_backing() -> None:
    domain = dataclasses.replace(BARE, disks=(Disk("vda", (BASE, BASE)),))
    with pytest.raises(errors.DomainNotUnderstood, match="/pool/base is raw"):
        domainxml.build(domain)


def test_build_refuses_disk_without_layer() -> None:
    domain = dataclasses.replace(BARE, disks=(Disk("vda", ()),))
    with pytest.raises(errors.DomainNotUnderstood, match="at least one layer"):
        domainxml.build(domain)


def test_build_refuses_what_xml_cannot_carry() -> None:
    with pytest.raises(errors.XmlRefused):
        domainxml.build(dataclasses.replace(BARE, name="a\0b"))
    with pytest.raises(errors.XmlRefused):
        domainxml.build(dataclasses.replace(BARE, metadata={"a b": ""}))


def test_cpu_xml() -> None:
    root = etree.fromstring(domainxml.cpu_xml(CPU))
    assert (root.tag, root.findtext("model")) == ("cpu", "Nehalem")


# Round trips of any value

NAMES = st.text(
    st.characters(exclude_categories=("Cs", "Cc", "Cn")) | st.sampled_from("<&>'\""),
    min_size=1,
)
PATHS = NAMES.map(lambda name: "/" + name)
HOSTS = st.tuples(st.from_regex(r"[a-z0-9.-]+|[0-9a-f]+::[0-9a-f]+", fullmatch=True))
FILES = st.builds(
    Layer,
    st.sampled_from([SourceType.FILE, SourceType.BLOCK]),
    PATHS,
    st.just(DiskFormat.QCOW2),
)
IMAGES = st.builds(
    Layer,
    st.just(SourceType.NETWORK),
    NAMES,
    st.just(DiskFormat.QCOW2),
    HOSTS,
    st.none() | st.builds(Auth, NAMES, st.uuids().map(str)),
)
CHAINS = st.tuples(
    st.lists(FILES | IMAGES, min_size=1, max_size=6), st.sampled_from(DiskFormat)
).map(lambda drawn: (*drawn[0][:-1], dataclasses.replace(drawn[0][-1], fmt=drawn[1])))


@given(st.lists(CHAINS, max_size=4))
def test_any_chain_reads_back_equal(chains: list[tuple[Layer, ...]]) -> None:
    disks = tuple(Disk(f"vd{n}", chain) for n, chain in enumerate(chains))
    text = domainxml.build(dataclasses.replace(BARE, disks=disks))
    assert [disk.layers() for disk in domainxml.disks(text)] == chains


@given(CHAINS, CHAINS)
def test_any_chain_replaces_any(old: tuple[Layer, ...], new: tuple[Layer, ...]) -> None:
    disks = (Disk("vda", old), Disk("vdb", old))
    built = domainxml.build(dataclasses.replace(BARE, disks=disks))
    edited = domainxml.with_disks(built, {"vda": new})
    wanted = (Disk("vda", new), Disk("vdb", old))
    assert etree.canonicalize(edited) == etree.canonicalize(
        domainxml.build(dataclasses.replace(BARE, disks=wanted))
    )


VALUES = st.dictionaries(
    st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_.-]*", fullmatch=True), NAMES, max_size=5
)


@settings(max_examples=25)
@given(values=VALUES)
def test_any_metadata_survives_libvirt(values: dict[str, str]) -> None:
    connection = libvirt.open("test:///default")
    text = domainxml.with_metadata(domainxml.build(BARE), values)
    assert domainxml.metadata_of(text) == values
    assert domainxml.metadata_of(through_libvirt(connection, text)) == values
    connection.close()


# Metadata


def test_metadata_of_nothing() -> None:
    assert domainxml.metadata_of(domainxml.build(BARE)) is None


def test_with_metadata_leaves_others_alone() -> None:
    other = '<x:a xmlns:x="urn:x"><!-- c --> b </x:a>'
    text = (
        "<domain>\n  <name>n</name>\n"
        f"  <metadata>\n    {other}\n  </metadata>\n</domain>"
    )
    once = domainxml.with_metadata(text, {"a": "1"})
    twice = domainxml.with_metadata(once, {"b": "2"})
    assert domainxml.metadata_of(twice) == {"b": "2"}
    assert other in twice
    assert twice.count("\n") == text.count("\n") + 3


def test_metadata_by_libvirts_calls(libvirtd: libvirt.virConnect) -> None:
    domain = libvirtd.lookupByName("test")
    kind = libvirt.VIR_DOMAIN_METADATA_ELEMENT
    values = {"a": "1 < 2", "b": "", "c": "é"}
    prefix, uri = domainxml.METADATA_PREFIX, domainxml.METADATA_URI
    domain.setMetadata(kind, domainxml.metadata_element(values), prefix, uri)
    assert domainxml.metadata_values(domain.metadata(kind, uri)) == values
    assert domainxml.metadata_of(domain.XMLDesc()) == values


def test_metadata_twice_is_refused() -> None:
    text = domainxml.build(FULL)
    start, end = text.index("<virtmigrate:"), text.index("  </metadata>")
    with pytest.raises(errors.DomainNotUnderstood, match="twice"):
        domainxml.metadata_of(text[:end] + text[start:end] + text[end:])
