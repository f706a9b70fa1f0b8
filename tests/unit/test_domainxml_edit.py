# SPDX-License-Identifier: Apache-2.0
"""Domain XML: what an edit changes, and that it changes nothing else."""

from __future__ import annotations

import difflib

import pytest
from lxml import etree

from virtmigrate import domainxml, errors, units
from virtmigrate.domainxml import (
    Auth,
    DiskFormat,
    Interface,
    InterfaceKind,
    Layer,
    SourceType,
)

ID = "7b2d8f9e-32b4-4f2e-9d65-0a3f8f1c2b11"

# As libvirt 9.0 wrote it of a running domain, shortened.
LIVE = """<domain type="kvm" id="7">
  <name>n</name>
  <memory unit="KiB">65536</memory>
  <currentMemory unit="KiB">65536</currentMemory>
  <vcpu placement="static" current="1">2</vcpu>
  <os>
    <type arch="x86_64" machine="pc-q35-7.2">hvm</type>
    <loader readonly="yes" type="pflash">/fw/code.fd</loader>
    <nvram template="/fw/vars.fd">/nv/vars.fd</nvram>
  </os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type="file" device="disk" snapshot="manual">
      <driver name="qemu" type="qcow2" cache="none" io="native"/>
      <source file="/top" index="5" startupPolicy="optional"/>
      <backingStore type="file" index="6">
        <format type="raw"/>
        <source file="/base"/>
        <backingStore/>
      </backingStore>
      <target dev="vda" bus="virtio"/>
      <iotune>
        <total_iops_sec>10</total_iops_sec>
      </iotune>
      <alias name="virtio-disk0"/>
      <address type="pci" domain="0x0000" bus="0x05" slot="0x00" function="0x0"/>
    </disk>
    <disk type="file" device="cdrom">
      <driver name="qemu" type="raw"/>
      <source file="/config"/>
      <backingStore/>
      <target dev="sda" bus="sata"/>
      <readonly/>
      <alias name="ua-config"/>
      <address type="drive" controller="0" bus="0" target="0" unit="0"/>
    </disk>
    <interface type="network">
      <mac address="52:54:00:AA:bb:01"/>
      <source network="default" portid="00000000" bridge="virbr0"/>
      <target dev="vnet0"/>
      <model type="virtio"/>
      <mtu size="1400"/>
      <alias name="net0"/>
      <address type="pci" domain="0x0000" bus="0x01" slot="0x00" function="0x0"/>
    </interface>
    <interface type="user">
      <mac address="52:54:00:aa:bb:02"/>
    </interface>
    <serial type="pty">
      <source path="/dev/pts/0"/>
      <log file="/log/console.log" append="on"/>
      <target type="isa-serial" port="0"/>
      <alias name="serial0"/>
    </serial>
    <console type="pty" tty="/dev/pts/0">
      <source path="/dev/pts/0"/>
      <log file="/log/console.log" append="on"/>
      <target type="serial" port="0"/>
      <alias name="serial0"/>
    </console>
    <channel type="unix">
      <source mode="bind" path="/var/lib/libvirt/qemu/channel/target/domain-7-n/org.x"/>
      <target type="virtio" name="org.x" state="connected"/>
    </channel>
    <channel type="unix">
      <source mode="bind" path="/srv/own"/>
      <target type="virtio" name="org.y"/>
    </channel>
    <graphics type="vnc" port="5907" autoport="yes" listen="127.0.0.1"/>
    <vsock model="virtio">
      <cid auto="yes" address="3"/>
    </vsock>
  </devices>
  <seclabel type="dynamic" model="dac" relabel="yes">
    <label>+0:+0</label>
    <imagelabel>+0:+0</imagelabel>
  </seclabel>
  <seclabel type="none" model="apparmor"/>
</domain>"""

TOP = Layer(SourceType.FILE, "/new/'t&p'", DiskFormat.QCOW2)
BASE = Layer(SourceType.BLOCK, "/dev/vg/base", DiskFormat.RAW)


def changes(before: str, after: str) -> tuple[list[str], list[str]]:
    """Return the lines that went and those that came, without indentation."""
    lines = list(difflib.ndiff(before.splitlines(), after.splitlines()))
    gone = [line[2:].strip() for line in lines if line.startswith("- ")]
    come = [line[2:].strip() for line in lines if line.startswith("+ ")]
    return gone, come


# Disks


def test_with_disks_changes_the_chain_only() -> None:
    edited = domainxml.with_disks(LIVE, {"vda": (TOP, BASE)})
    gone, come = changes(LIVE, edited)
    assert gone == [
        '<source file="/top" index="5" startupPolicy="optional"/>',
        '<backingStore type="file" index="6">',
        '<source file="/base"/>',
    ]
    assert come == [
        "<source file=\"/new/'t&amp;p'\"/>",
        '<backingStore type="block">',
        '<source dev="/dev/vg/base"/>',
    ]


def test_with_disks_changes_type_and_format() -> None:
    image = Layer(SourceType.NETWORK, "p/i", DiskFormat.RAW, ("m:1",), Auth("u", ID))
    edited = domainxml.with_disks(LIVE, {"vda": (image,)})
    vda, sda = domainxml.disks(edited)
    assert vda.layers() == (image,)
    assert sda == domainxml.disks(LIVE)[1]
    assert '<driver name="qemu" type="raw" cache="none" io="native"/>' in edited
    assert '<disk type="network" device="disk" snapshot="manual">' in edited


def test_with_disks_empties_a_drive() -> None:
    edited = domainxml.with_disks(LIVE, {"sda": ()})
    assert domainxml.disks(edited)[1].chain == ()
    assert domainxml.disks(edited)[1].problems == ()
    assert changes(LIVE, edited) == (
        ['<source file="/config"/>', "<backingStore/>"],
        [],
    )


def test_with_disks_unknown() -> None:
    with pytest.raises(errors.DomainNotUnderstood, match="0 disks vdz"):
        domainxml.with_disks(LIVE, {"vdz": (BASE,)})


def test_with_disks_twice_there() -> None:
    double = LIVE.replace('dev="sda"', 'dev="vda"')
    with pytest.raises(errors.DomainNotUnderstood, match="2 disks vda"):
        domainxml.with_disks(double, {"vda": (BASE,)})


def test_with_disks_raw_with_backing() -> None:
    with pytest.raises(errors.DomainNotUnderstood, match="is raw"):
        domainxml.with_disks(LIVE, {"vda": (BASE, TOP)})


# Size


def test_with_size() -> None:
    edited = domainxml.with_size(LIVE, memory=128 * units.MiB, vcpus=4)
    assert changes(LIVE, edited) == (
        [
            '<memory unit="KiB">65536</memory>',
            '<currentMemory unit="KiB">65536</currentMemory>',
            '<vcpu placement="static" current="1">2</vcpu>',
        ],
        [
            '<memory unit="KiB">131072</memory>',
            '<currentMemory unit="KiB">131072</currentMemory>',
            '<vcpu placement="static">4</vcpu>',
        ],
    )


def test_with_size_where_little_is_written() -> None:
    text = "<domain><memory unit='GiB'>1</memory></domain>"
    edited = domainxml.with_size(text, memory=2 * units.GiB, vcpus=2)
    assert domainxml.memory(edited) == 2 * units.GiB
    assert domainxml.vcpus(edited) == 2
    assert "<currentMemory" in edited


FIXED = {
    "NUMA cells": ("<cpu><numa><cell id='0' cpus='0-1'/></numa></cpu>", "NUMA", "numa"),
    "slots": ("<maxMemory slots='4' unit='GiB'>8</maxMemory>", "slots", None),
    "memory device": ("<devices><memory model='dimm'/></devices>", "devices", None),
    "hard limit": ("<memtune><hard_limit>9</hard_limit></memtune>", "limit", None),
    "topology": (
        "<cpu><topology sockets='1' cores='2' threads='1'/></cpu>",
        None,
        "topology is of 2",
    ),
    "single CPUs": ("<vcpus><vcpu id='0'/></vcpus>", None, "vcpus"),
    "pinning": ("<cputune><vcpupin vcpu='0' cpuset='1'/></cputune>", None, "cputune"),
}


@pytest.mark.parametrize(
    ("written", "memory", "vcpus"), FIXED.values(), ids=FIXED.keys()
)
def test_with_size_refused(written: str, memory: str | None, vcpus: str | None) -> None:
    text = LIVE.replace("<os>", written + "<os>", 1)
    if memory:
        with pytest.raises(errors.DomainNotUnderstood, match=memory):
            domainxml.with_size(text, memory=128 * units.MiB)
    if vcpus:
        with pytest.raises(errors.DomainNotUnderstood, match=vcpus):
            domainxml.with_size(text, vcpus=4)
    same = domainxml.with_size(text, memory=64 * units.MiB, vcpus=2)
    assert same == domainxml.with_size(text)


def test_with_size_topology_that_fits() -> None:
    cpu = "<cpu><topology sockets='2' cores='2' threads='1'/></cpu>"
    text = LIVE.replace("<os>", cpu + "<os>", 1)
    assert domainxml.vcpus(domainxml.with_size(text, vcpus=4)) == 4


def test_with_size_nothing() -> None:
    with pytest.raises(errors.DomainNotUnderstood):
        domainxml.with_size(LIVE, memory=0)
    with pytest.raises(errors.DomainNotUnderstood):
        domainxml.with_size(LIVE, vcpus=0)


# Firmware, emulator, console


def test_with_nvram() -> None:
    edited = domainxml.with_nvram(LIVE, "/other&vars")
    assert changes(LIVE, edited) == (
        ['<nvram template="/fw/vars.fd">/nv/vars.fd</nvram>'],
        ['<nvram template="/fw/vars.fd">/other&amp;vars</nvram>'],
    )


def test_with_nvram_written_as_a_source() -> None:
    old = '<nvram template="/fw/vars.fd">/nv/vars.fd</nvram>'
    text = LIVE.replace(old, '<nvram type="file"><source file="/a"/></nvram>')
    assert domainxml.firmware(text) == domainxml.Firmware("/fw/code.fd", "/a")
    edited = domainxml.with_nvram(text, "/b")
    assert "<nvram>/b</nvram>" in edited


def test_with_nvram_added() -> None:
    old = '<nvram template="/fw/vars.fd">/nv/vars.fd</nvram>'
    edited = domainxml.with_nvram(LIVE.replace(old, ""), "/b")
    assert domainxml.firmware(edited) == domainxml.Firmware("/fw/code.fd", "/b")


@pytest.mark.parametrize("attribute", ['type="rom"', 'type="pflash" stateless="yes"'])
def test_with_nvram_without_variables(attribute: str) -> None:
    text = LIVE.replace('type="pflash"', attribute)
    with pytest.raises(errors.DomainNotUnderstood, match="no variables"):
        domainxml.with_nvram(text, "/b")


def test_with_emulator() -> None:
    gone = domainxml.with_emulator(LIVE, None)
    assert domainxml.emulator(gone) is None
    assert domainxml.emulator(domainxml.with_emulator(gone, "/usr/bin/kvm")) == (
        "/usr/bin/kvm"
    )


def test_with_console_log() -> None:
    edited = domainxml.with_console_log(LIVE, "/b.log")
    assert domainxml.console_log(edited) == "/b.log"
    assert "/log/console.log" not in edited
    assert domainxml.console_log(domainxml.with_console_log(LIVE, None)) is None
    with pytest.raises(errors.DomainNotUnderstood, match="no serial port"):
        domainxml.with_console_log("<domain/>", "/b.log")


# Interfaces


def test_with_interfaces_keeps_what_the_guest_sees() -> None:
    port = Interface("52:54:00:aa:BB:01", "br-int", InterfaceKind.OVS, ID, "tap1")
    edited = domainxml.with_interfaces(LIVE, [port])
    (found,) = domainxml.interfaces(edited)
    assert (found.bridge, found.kind, found.interface_id) == ("br-int", "ovs", ID)
    assert (found.device, found.mtu) == ("tap1", None)
    gone, _ = changes(LIVE, edited)
    assert set(gone) == {
        '<interface type="network">',
        '<source network="default" portid="00000000" bridge="virbr0"/>',
        '<target dev="vnet0"/>',
        '<mtu size="1400"/>',
    }


@pytest.mark.parametrize(
    ("mac", "reason"),
    [("52:54:00:aa:bb:09", "0 interfaces"), ("52:54:00:aa:bb:02", "of type user")],
)
def test_with_interfaces_refused(mac: str, reason: str) -> None:
    with pytest.raises(errors.DomainNotUnderstood, match=reason):
        domainxml.with_interfaces(LIVE, [Interface(mac, "br0")])


# Runtime


def test_without_runtime() -> None:
    gone, come = changes(LIVE, domainxml.without_runtime(LIVE))
    assert come == [
        '<domain type="kvm">',
        '<source file="/top" startupPolicy="optional"/>',
        '<source network="default"/>',
        '<console type="pty">',
        '<target type="virtio" name="org.x"/>',
        '<graphics type="vnc" port="-1" autoport="yes" listen="127.0.0.1"/>',
        '<cid auto="yes"/>',
    ]
    for kept in ("ua-config", "address", "/srv/own", "apparmor", "/log/", "mtu"):
        assert not any(kept in line for line in gone if "<cid" not in line), kept
    assert sum("<alias" in line for line in gone) == 4


def test_without_runtime_inactive_keeps_chains() -> None:
    inactive = LIVE.replace(' id="7"', "", 1)
    before, after = (
        domainxml.disks(text)
        for text in (inactive, domainxml.without_runtime(inactive))
    )
    assert before == after
    assert before[0].terminated


def test_without_runtime_live_leaves_chains_open() -> None:
    disk = domainxml.disks(domainxml.without_runtime(LIVE))[0]
    assert not disk.terminated
    assert len(disk.chain) == 1


def test_without_runtime_twice() -> None:
    once = domainxml.without_runtime(LIVE)
    assert domainxml.without_runtime(once) == once


def test_without_runtime_keeps_static_labels() -> None:
    text = (
        '<domain><seclabel type="static" model="dac"><label>a</label></seclabel>'
        '<seclabel type="dynamic" model="selinux"><baselabel>b</baselabel>'
        "<label>c</label></seclabel></domain>"
    )
    left = etree.fromstring(domainxml.without_runtime(text))
    assert left.xpath("string()") == "ab"


# Nothing given, nothing changed


def test_edits_without_work_change_nothing() -> None:
    assert domainxml.with_disks(LIVE, {}) == LIVE
    assert domainxml.with_size(LIVE) == LIVE
    assert domainxml.with_interfaces(LIVE, []) == LIVE
