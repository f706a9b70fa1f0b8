# SPDX-License-Identifier: Apache-2.0
"""The XML of a clone: its own where it says who it is, its source's else."""

import dataclasses

import pytest

from virtmigrate import domainxml, model, xml
from virtmigrate.clone import configuration, making, rules
from virtmigrate.clone.terms import New
from virtmigrate.domainxml import Interface, InterfaceKind, Layer, SourceType
from virtmigrate.formats import DiskFormat

SOURCE = "11111111-1111-1111-1111-111111111111"
CLONE = "22222222-2222-2222-2222-222222222222"
MAC, NEW = "52:54:00:00:00:0a", "52:54:00:00:00:0b"
NETWORK = "apart"

TEXT = f"""<domain type='kvm' id='3'>
  <name>source</name>
  <uuid>{SOURCE}</uuid>
  <genid>33333333-3333-3333-3333-333333333333</genid>
  <metadata>
    <nova:instance xmlns:nova='http://openstack.org/xmlns/libvirt/nova/1.1'>
      <nova:name>source</nova:name>
    </nova:instance>
  </metadata>
  <memory unit='KiB'>65536</memory>
  <vcpu>2</vcpu>
  <sysinfo type='smbios'>
    <system>
      <entry name='manufacturer'>somebody</entry>
      <entry name='serial'>{SOURCE.upper()}</entry>
      <entry name='uuid'>{SOURCE}</entry>
    </system>
  </sysinfo>
  <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none'/>
      <source file='/source/layer' index='1'/>
      <backingStore type='file'><format type='raw'/><source file='/source/base'/>
        <backingStore/></backingStore>
      <target dev='vda' bus='virtio'/>
      <serial>abc</serial>
      <address type='pci' domain='0' bus='4' slot='0' function='0'/>
    </disk>
    <interface type='bridge'>
      <mac address='{MAC.upper()}'/>
      <source bridge='br7'/>
      <target dev='vnet3'/>
      <model type='virtio'/>
      <mtu size='9000'/>
      <address type='pci' domain='0' bus='1' slot='0' function='0'/>
    </interface>
    <serial type='pty'>
      <source path='/dev/pts/3'/>
      <log file='/logs/source.log' append='on'/>
      <target port='0'/>
    </serial>
    <channel type='unix'>
      <source mode='bind' path='/run/libvirt/qemu/channel/3-source/agent'/>
      <target type='virtio' name='org.qemu.guest_agent.0' state='connected'/>
    </channel>
    <graphics type='vnc' port='5901' autoport='yes' passwd='secret'/>
    <vsock model='virtio'><cid auto='yes' address='7'/></vsock>
  </devices>
</domain>
"""


def layer(path: str, fmt: DiskFormat) -> Layer:
    return Layer(SourceType.FILE, path, fmt)


TWIN = configuration.Twin(
    source=SOURCE,
    uuid=CLONE,
    name="clone",
    chains={
        "vda": (
            layer("/clone/layer", DiskFormat.QCOW2),
            layer("/source/base", DiskFormat.RAW),
        )
    },
    macs={MAC: NEW},
    devices={MAC: "tap7"},
    console_log="/logs/clone.log",
    metadata={"owner": "nova"},
)


def test_nothing_of_the_source_is_left() -> None:
    text = configuration.as_twin(TEXT, TWIN, NETWORK)
    lowered = text.lower()
    for left in (
        SOURCE,
        MAC,
        "33333333",
        ">source<",
        "/source/layer",
        "source.log",
        "br7",
        "vnet3",
        "channel/3-source",
        "/dev/pts",
        "secret",
        "5901",
        "nova:name",
        "address='7'",
        'address="7"',
    ):
        assert left not in lowered, left
    found = domainxml.read(text)
    assert (found.uuid, found.name) == (CLONE, "clone")
    assert found.metadata == {"owner": "nova"}
    assert found.console_log == "/logs/clone.log"
    root = xml.parse(text)
    entries = {each.get("name"): each.text for each in root.findall("sysinfo//entry")}
    assert entries == {"manufacturer": "somebody", "serial": CLONE, "uuid": CLONE}
    # One that its guest was told of is there, for libvirt to draw another.
    assert [xml.text(each) for each in root.findall("genid")] == [""]


def test_the_machine_is_the_same() -> None:
    text = configuration.as_twin(TEXT, TWIN, NETWORK)
    found = domainxml.read(text)
    assert (found.memory, found.vcpus, found.machine) == (64 << 20, 2, "pc-q35-7.2")
    before, after = xml.parse(TEXT), xml.parse(text)
    for path in ("devices/disk/address", "devices/interface/address"):
        assert dict(after.find(path).attrib) == dict(before.find(path).attrib)  # type: ignore[union-attr]
    (disk,) = found.disks
    assert disk.serial == "abc"
    assert [each.source for each in disk.layers()] == ["/clone/layer", "/source/base"]
    assert disk.terminated


def test_apart() -> None:
    """It is plugged into the isolated network, by the end that it keeps."""
    text = configuration.as_twin(TEXT, TWIN, NETWORK)
    (found,) = domainxml.interfaces(text)
    assert found == Interface(
        mac=NEW, bridge=NETWORK, kind=InterfaceKind.NETWORK, device="tap7", mtu=9000
    )
    assert link(text) == "down"


def test_plugged() -> None:
    text = configuration.as_twin(TEXT, TWIN, NETWORK)
    end = Interface(mac=NEW, bridge="br8", mtu=9000)
    plugged = configuration.plugged(text, [end])
    assert domainxml.interfaces(plugged) == (end,)
    assert link(plugged) == "up"
    element = configuration.device(text, NEW, end)
    assert element.count("<interface") == 1
    assert 'state="up"' in element
    assert "br8" in element
    held = configuration.device(text, NEW)
    assert 'state="down"' in held
    assert NETWORK in held
    with pytest.raises(LookupError):
        configuration.device(text, MAC)


def link(text: str) -> str | None:
    return xml.attribute_at(xml.parse(text), "devices/interface/link", "state")


# Where it is plugged in


def test_macs_are_drawn() -> None:
    source = Interface(mac=MAC.upper(), bridge="br7", device="tap3", mtu=9000)
    twins = [making.twin(New(CLONE, "clone"), "0" * 16, (source,)) for _ in range(50)]
    ends = [twin.interfaces[0] for twin in twins]
    # Of 50 out of 2^24 two are the same once in 10,000 times; of all, never.
    assert len({end.mac for end in ends}) > 1
    assert {end.mac[:9] for end in ends} == {"52:54:00:"}
    assert {dataclasses.replace(end, mac="") for end in ends} == {
        Interface(mac="", bridge="br7", mtu=9000)
    }
    assert all(twin.macs == {MAC: twin.interfaces[0].mac} for twin in twins)


def test_macs_are_given() -> None:
    """What its guest sees of the MTU stays, unless it is given, too."""
    source = Interface(mac=MAC, bridge="br7", mtu=9000)
    wanted = Interface(mac=NEW.upper(), bridge="br8", device="tap8")
    twin = making.twin(New(CLONE, "clone", (wanted,)), "0" * 16, (source,))
    assert twin.macs == {MAC: NEW}
    (end,) = twin.interfaces
    assert (end.mac, end.bridge, end.device, end.mtu) == (NEW, "br8", "tap8", 9000)


# What is refused


FORBIDDEN = {
    "TPM": ("</devices>", "<tpm model='tpm-crb'/></devices>"),
    "host device": ("</devices>", "<hostdev type='pci'/></devices>"),
    "shared with other": ("<serial>abc", "<shareable/><serial>abc"),
    "transient": ("<serial>abc", "<transient/><serial>abc"),
    "no volume of this instance": ("dev='vda'", "dev='vdx'"),
    "VLAN has no": ("<mtu size", "<vlan><tag id='4'/></vlan><mtu size"),
    "not onto Open vSwitch": (
        "<mtu size",
        "<virtualport type='openvswitch'/><mtu size",
    ),
    "network filter": ("<mtu size", "<filterref filter='clean'/><mtu size"),
    "leads to": (
        "</devices>",
        "<serial type='tcp'><source host='a'/></serial></devices>",
    ),
    "shared memory": ("</devices>", "<shmem name='a'/></devices>"),
}
"""By what is said of it: a part of the XML, and what stands there instead."""


def record() -> model.Instance:
    disk = model.DiskRef(
        target="vda", volume="v", backend="local", role=model.Role.ROOT
    )
    return model.Instance(
        uuid=SOURCE,
        name="source",
        owner="nova",
        host="here",
        state=model.InstanceState.HERE,
        operation="0" * 16,
        memory=64 << 20,
        vcpus=2,
        disks=(disk,),
    )


def test_allowed() -> None:
    assert list(rules.of_domain(record(), TEXT)) == []


@pytest.mark.parametrize("said", FORBIDDEN)
def test_forbidden(said: str) -> None:
    old, new = FORBIDDEN[said]
    assert TEXT.count(old) == 1
    (found,) = rules.of_domain(record(), TEXT.replace(old, new))
    assert said in found
