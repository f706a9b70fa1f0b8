# SPDX-License-Identifier: Apache-2.0
"""Domain XML: what a cold migration cannot carry is found and named."""

from __future__ import annotations

import pytest

from virtmigrate import domainxml, errors

QEMU = "xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'"


def domain(devices: str = "", top: str = "", os: str = "", kind: str = "kvm") -> str:
    return (
        f"<domain type='{kind}' {QEMU}><name>n</name>{top}"
        f"<os><type arch='x86_64' machine='pc'>hvm</type>{os}</os>"
        f"<devices>{devices}</devices></domain>"
    )


def disk(inner: str, attributes: str = "type='file' device='disk'") -> str:
    return f"<disk {attributes}>{inner}<target dev='vda' bus='virtio'/></disk>"


def interface(inner: str = "", attributes: str = "type='bridge'") -> str:
    mac = "<mac address='52:54:00:00:00:01'/><source bridge='br0'/>"
    return f"<interface {attributes}>{mac}{inner}</interface>"


FILE = "<driver type='raw'/><source file='/a'/>"
LAYER = "<backingStore type='{}'><format type='{}'/>{}</backingStore>"

DEVICES = {
    "hostdev": ("<hostdev type='pci'/>", "host device of type pci"),
    "mdev": ("<hostdev type='mdev'/>", "host device of type mdev"),
    "TPM": ("<tpm model='tpm-crb'><backend type='emulator'/></tpm>", "TPM"),
    "filesystem": ("<filesystem type='mount'/>", "shared file system"),
    "shmem": ("<shmem name='x'/>", "shared memory"),
    "nvdimm": ("<memory model='nvdimm'/>", "memory device of type nvdimm"),
    "lease": ("<lease/>", "lock lease"),
    "unknown": ("<quantum/>", "unknown device quantum: not known to be safe"),
    "namespaced": ("<q:disk/>", "unknown device q:disk"),
    "disk by volume": (disk("<source/>", "type='volume'"), "source of type volume"),
    "NVMe": (disk("<source/>", "type='nvme'"), "disk vda: a source of type nvme"),
    "vhost-user disk": (disk("<source/>", "type='vhostuser'"), "type vhostuser"),
    "directory": (disk("<source/>", "type='dir'"), "source of type dir"),
    "NBD": (disk("<source protocol='nbd'/>", "type='network'"), "network protocol nbd"),
    "NBD below": (
        disk(FILE + LAYER.format("network", "raw", "<source protocol='https'/>")),
        "network protocol https",
    ),
    "volume below": (
        disk(FILE + LAYER.format("volume", "raw", "<source/>")),
        "source of type volume",
    ),
    "VMDK below": (disk(FILE + LAYER.format("file", "vmdk", "")), "format vmdk"),
    "LUKS": (disk("<driver type='luks'/><source file='/a'/>"), "format luks"),
    "encryption": (disk("<encryption format='luks'/>" + FILE), "it is encrypted"),
    "encrypted source": (
        disk("<driver type='raw'/><source file='/a'><encryption/></source>"),
        "it is encrypted",
    ),
    "slices": (
        disk("<source file='/a'><slices><slice/></slices></source>"),
        "slice of a larger file",
    ),
    "data file": (
        disk("<source file='/a'><dataStore type='file'/></source>"),
        "external file",
    ),
    "data file below": (
        disk(FILE + LAYER.format("file", "qcow2", "<source><dataStore/></source>")),
        "external file",
    ),
    "reservations": (
        disk("<source dev='/a'><reservations/></source>", "type='block'"),
        "persistent reservations",
    ),
    "RBD snapshot": (
        disk("<source protocol='rbd'><snapshot name='s'/></source>", "type='network'"),
        "snapshot inside an image",
    ),
    "opened elsewhere": (disk("<source file='/a' fdgroup='x'/>"), "fdgroup"),
    "unknown source part": (disk("<source file='/a'><x/></source>"), "element x"),
    "RDMA": (
        disk(
            "<source protocol='rbd'><host name='a' transport='rdma'/></source>",
            "type='network'",
        ),
        "transport rdma",
    ),
    "mirror": (disk(FILE + "<mirror type='file'/>"), "a block job is running"),
    "transient": (disk(FILE + "<transient/>"), "it is transient"),
    "shareable": (disk(FILE + "<shareable/>"), "shared with other instances"),
    "unknown disk part": (disk(FILE + "<x/>"), "disk vda: element x"),
    "floppy": (disk(FILE, "type='file' device='floppy'"), "device of type floppy"),
    "LUN": (disk(FILE, "type='block' device='lun'"), "device of type lun"),
    "hostdev interface": (interface("", "type='hostdev'"), "type hostdev is bound"),
    "macvtap": (interface("", "type='direct'"), "interface 52:54:00:00:00:01: type"),
    "user network": (interface("", "type='user'"), "type user"),
    "vDPA": (interface("", "type='vdpa'"), "type vdpa"),
    "vhost-user": (interface("", "type='vhostuser'"), "type vhostuser"),
    "filter": (interface("<filterref filter='f'/>"), "network filter f"),
    "script": (interface("<script path='/s'/>"), "script /s"),
    "ROM": (interface("<rom file='/r'/>"), "ROM file /r"),
    "tap": (interface("<backend tap='/t'/>"), "tap device /t"),
    "teaming": (interface("<teaming type='persistent'/>"), "teamed"),
    "VEPA": (interface("<virtualport type='802.1Qbg'/>"), "802.1Qbg"),
    "unknown interface part": (interface("<x/>"), "element x"),
    "TCP serial": (
        "<serial type='tcp'><source host='h'/><target port='0'/></serial>",
        "serial 0: type tcp leads to h",
    ),
    "UDP console": ("<console type='udp'/>", "console: type udp"),
    "file serial": ("<serial type='file'><source path='/f'/></serial>", "leads to /f"),
    "host device serial": (
        "<serial type='dev'><source path='/dev/ttyS0'/></serial>",
        "leads to /dev/ttyS0",
    ),
    "pipe": ("<parallel type='pipe'/>", "parallel: type pipe"),
    "socket of its own": (
        "<channel type='unix'><source mode='bind' path='/s'/><target name='c'/>"
        "</channel>",
        "channel c: socket /s",
    ),
    "connecting socket": (
        "<channel type='unix'><source mode='connect'/></channel>",
        "connects to a socket",
    ),
    "second log": (
        "<serial type='pty'/><serial type='pty'><log file='/l'/></serial>",
        "not /l",
    ),
    "redirection": ("<redirdev bus='usb' type='tcp'/>", "redirdev: type tcp"),
    "smartcard": ("<smartcard mode='host'/>", "smartcard: mode host"),
    "smartcard by TCP": (
        "<smartcard mode='passthrough' type='tcp'/>",
        "smartcard: type tcp",
    ),
    "listen address": (
        "<graphics type='vnc' listen='192.0.2.1'/>",
        "listens on 192.0.2.1",
    ),
    "listen element": (
        "<graphics type='vnc'><listen type='address' address='192.0.2.2'/></graphics>",
        "listens on 192.0.2.2",
    ),
    "listen network": (
        "<graphics type='vnc'><listen type='network' network='x'/></graphics>",
        "network or socket",
    ),
    "VNC socket": ("<graphics type='vnc' socket='/s'/>", "socket /s"),
    "GPU": ("<graphics type='spice'><gl enable='yes'/></graphics>", "GPU"),
    "SDL": ("<graphics type='sdl'/>", "graphics sdl"),
    "vhost-user GPU": ("<video><driver name='vhostuser'/></video>", "vhost-user"),
    "sound": ("<audio id='1' type='alsa'/>", "audio alsa"),
    "evdev": ("<input type='evdev'/>", "input evdev"),
    "vsock": ("<vsock><cid auto='no' address='3'/></vsock>", "fixed CID 3"),
    "EGD": ("<rng><backend model='egd' type='udp'/></rng>", "random numbers"),
    "hwrng": ("<rng><backend model='random'>/dev/hwrng</backend></rng>", "/dev/hwrng"),
}

TOP = {
    "SEV": ("<launchSecurity type='sev'/>", "launch security sev"),
    "command line": ("<q:commandline/>", "q:commandline"),
    "overrides": ("<q:override/>", "q:override"),
    "unknown": ("<quantum/>", "element quantum of the domain"),
    "huge pages": ("<memoryBacking><hugepages/></memoryBacking>", "huge pages"),
    "file memory": (
        "<memoryBacking><source type='file'/></memoryBacking>",
        "memory backed by files",
    ),
    "pinned": ("<vcpu cpuset='1-2'>2</vcpu>", "pinned"),
    "pinned thread": (
        "<cputune><emulatorpin cpuset='1'/></cputune>",
        "threads pinned",
    ),
    "cache": ("<cputune><cachetune vcpus='0'/></cputune>", "cachetune"),
    "NUMA": ("<numatune><memory nodeset='0'/></numatune>", "NUMA nodes"),
    "I/O limits": (
        "<blkiotune><device><path>/dev/sda</path></device></blkiotune>",
        "/dev/sda",
    ),
    "partition": ("<resource><partition>/x</partition></resource>", "partition /x"),
    "fibre channel": ("<resource><fibrechannel/></resource>", "Fibre Channel"),
    "sysinfo": ("<sysinfo type='fwcfg'><entry name='e' file='/f'/></sysinfo>", "e"),
    "static label": ("<seclabel type='static' model='dac'/>", "security label dac"),
    "bootloader": ("<bootloader>/b</bootloader>", "bootloader"),
}

OS = {
    "kernel": ("<kernel>/k</kernel>", "boot file kernel /k"),
    "initrd": ("<initrd>/i</initrd>", "boot file initrd /i"),
    "device tree": ("<dtb>/d</dtb>", "boot file dtb /d"),
    "ACPI table": ("<acpi><table type='slic'>/t</table></acpi>", "acpi/table /t"),
    "NVRAM by network": ("<nvram type='network'/>", "NVRAM of type network"),
    "NVRAM in qcow2": ("<nvram format='qcow2'>/n</nvram>", "nvram in format qcow2"),
    "loader in qcow2": ("<loader format='qcow2'>/l</loader>", "loader in format qcow2"),
}

HARMLESS = {
    "empty drive": disk("<driver name='qemu'/>", "type='file' device='cdrom'"),
    "network": interface("", "type='network'"),
    "OVS": interface("<virtualport type='openvswitch'/><target dev='tap0'/>"),
    "given socket": (
        "<channel type='unix'><source mode='bind' "
        "path='/run/libvirt/qemu/channel/1-n/org.x'/></channel>"
    ),
    "SPICE": "<channel type='spicevmc'/><redirdev bus='usb' type='spicevmc'/>",
    "VNC": "<graphics type='vnc' port='-1' autoport='yes' listen='0.0.0.0'/>",
    "vsock": "<vsock><cid auto='yes'/></vsock>",
    "rng": "<rng><backend model='builtin'/></rng><rng><backend model='random'/></rng>",
    "console log": (
        "<serial type='pty'><log file='/l'/></serial>"
        "<console type='pty'><log file='/l'/><target type='serial'/></console>"
    ),
    "usual": (
        "<emulator>/q</emulator><controller type='usb'/><input type='tablet'/>"
        "<sound model='ich9'/><audio id='1' type='none'/><hub type='usb'/>"
        "<video><model type='virtio'/></video><watchdog model='itco'/>"
        "<memballoon model='virtio'/><panic model='isa'/><iommu model='intel'/>"
    ),
    "whole disk": disk(
        FILE + "<auth username='u'/><iotune/><serial>s</serial><wwn>1</wwn><boot/>"
        "<vendor>v</vendor><product>p</product><blockio/><geometry/><readonly/>"
    ),
    "comment": "<!-- quantum -->",
}


@pytest.mark.parametrize(("device", "word"), DEVICES.values(), ids=DEVICES.keys())
def test_device(device: str, word: str) -> None:
    assert any(word in each for each in domainxml.obstacles(domain(device)))


@pytest.mark.parametrize(("top", "word"), TOP.values(), ids=TOP.keys())
def test_domain(top: str, word: str) -> None:
    assert any(word in each for each in domainxml.obstacles(domain(top=top)))


@pytest.mark.parametrize(("os", "word"), OS.values(), ids=OS.keys())
def test_os(os: str, word: str) -> None:
    assert any(word in each for each in domainxml.obstacles(domain(os=os)))


def test_firmware_left_to_libvirt() -> None:
    text = domain().replace("<os>", "<os firmware='efi'>")
    assert any("firmware" in each for each in domainxml.obstacles(text))


@pytest.mark.parametrize("kind", ["xen", "hvf", "lxc"])
def test_other_hypervisors(kind: str) -> None:
    assert any(kind in each for each in domainxml.obstacles(domain(kind=kind)))


def test_other_os() -> None:
    text = domain().replace("hvm", "exe")
    assert any("OS type exe" in each for each in domainxml.obstacles(text))


@pytest.mark.parametrize("device", HARMLESS.values(), ids=HARMLESS.keys())
def test_harmless(device: str) -> None:
    assert domainxml.obstacles(domain(device)) == ()


def test_all_are_told_and_each_once() -> None:
    text = domain("<tpm/><quantum/><quantum/>" + disk(FILE + "<mirror/>"))
    assert len(domainxml.obstacles(text)) == 3


def test_second_devices_element_is_seen() -> None:
    text = domain().replace("</domain>", "<devices><tpm/></devices></domain>")
    assert any("TPM" in each for each in domainxml.obstacles(text))


def test_no_domain() -> None:
    with pytest.raises(errors.DomainNotUnderstood):
        domainxml.obstacles("<network/>")
