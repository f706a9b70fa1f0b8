# SPDX-License-Identifier: Apache-2.0
"""What of a domain cannot be carried to another host.

What is not known to be safe is an obstacle: lists here name what may pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lxml import etree

from virtmigrate import xml
from virtmigrate.domainxml import chardevs, diskparts, tree
from virtmigrate.xml import Element

Check = Callable[[Element], Iterator[str]]

_TOP_LEVEL = frozenset(
    [
        "name",
        "uuid",
        "genid",
        "title",
        "description",
        "metadata",
        "memory",
        "maxMemory",
        "currentMemory",
        "memoryBacking",
        "memtune",
        "numatune",
        "blkiotune",
        "vcpu",
        "vcpus",
        "iothreads",
        "iothreadids",
        "defaultiothread",
        "cputune",
        "cpu",
        "os",
        "features",
        "clock",
        "on_poweroff",
        "on_reboot",
        "on_crash",
        "on_lockfailure",
        "pm",
        "seclabel",
        "sysinfo",
        "devices",
        "resource",
        "launchSecurity",
    ]
)

_INTERFACE_PARTS = frozenset(
    [
        "mac",
        "source",
        "virtualport",
        "target",
        "model",
        "driver",
        "backend",
        "boot",
        "mtu",
        "link",
        "bandwidth",
        "coalesce",
        "vlan",
        "tune",
        "rom",
        "acpi",
        "alias",
        "address",
        "guest",
        "port",
        "filterref",
        "script",
        "teaming",
    ]
)

_HARMLESS = frozenset(
    [
        "emulator",
        "controller",
        "sound",
        "hub",
        "watchdog",
        "memballoon",
        "panic",
        "iommu",
        "redirfilter",
    ]
)

# What an interface may name that lies on the host: tag, attribute, noun.
_INTERFACE_FILES = (
    ("filterref", "filter", "network filter"),
    ("script", "path", "script"),
    ("backend", "tap", "tap device"),
    ("backend", "vhost", "vhost device"),
    ("rom", "file", "ROM file"),
)

# Tag: (what the device is, why it cannot be carried).
_NEVER = {
    "hostdev": ("host device", "it is a device of this host"),
    "mdev": ("mediated device", "it is a device of this host"),
    "tpm": ("TPM", "its state is not carried"),
    "filesystem": ("shared file system", "it is a directory of this host"),
    "shmem": ("shared memory", "it is shared with processes of this host"),
    "memory": ("memory device", "memory devices are not carried"),
    "lease": ("lock lease", "it is held in a lock space of this host"),
}


def obstacles(text: str) -> tuple[str, ...]:
    """Return a sentence for each thing that a cold migration cannot carry.

    Raises:
        XmlRefused: the XML is not safe or not well-formed.
        DomainNotUnderstood: it is no domain.
    """
    root = tree.parse(text)
    found = [*_domain(root), *_os(root), *_placement(root)]
    for devices in root.findall("devices"):
        for device in xml.children(devices):
            found.extend(_device(device))
    return tuple(dict.fromkeys(found))


# Private: the domain itself


def _domain(root: Element) -> Iterator[str]:
    if root.get("type") not in ("kvm", "qemu"):
        yield f"domain type {root.get('type')}: only kvm and qemu are supported"
    for child in xml.children(root):
        if xml.tag_of(child) not in _TOP_LEVEL:
            yield f"element {_tag(child)} of the domain: not known to be safe"
    if root.find("launchSecurity") is not None:
        kind = xml.attribute_at(root, "launchSecurity", "type")
        yield f"launch security {kind}: the guest's memory is bound to this host"
    for entry in root.findall("sysinfo//entry[@file]"):
        yield f"sysinfo entry {entry.get('name')}: a file of this host is not carried"
    for label in root.findall("seclabel[@type='static']"):
        yield f"security label {label.get('model')}: a fixed label is of this host only"


def _os(root: Element) -> Iterator[str]:
    if xml.text_at(root, "os/type") != "hvm":
        yield f"OS type {xml.text_at(root, 'os/type')}: only hvm is supported"
    for path in ("kernel", "initrd", "dtb", "shim", "acpi/table", "varstore"):
        for found in root.findall("os/" + path):
            name = xml.text(found).strip() or found.get("path", "")
            yield f"boot file {path} {name}: a file of this host is not carried"
    yield from _nvram(root)
    if root.get("bootloader") or root.find("bootloader") is not None:
        yield "bootloader: a program of this host is not carried"


def _nvram(root: Element) -> Iterator[str]:
    if xml.attribute_at(root, "os", "firmware") and root.find("os/loader") is None:
        yield "firmware: the XML leaves its files to libvirt's choice at start"
    for nvram in root.findall("os/nvram"):
        if nvram.get("type", "file") != "file":
            yield f"NVRAM of type {nvram.get('type')}: only a file is carried"
    for element in (*root.findall("os/nvram"), *root.findall("os/loader")):
        fmt = element.get("format", "raw")
        if fmt != "raw":
            yield f"{xml.tag_of(element)} in format {fmt}: only raw is carried"


def _placement(root: Element) -> Iterator[str]:
    """Tell what ties the domain to the CPUs, memory and devices of this host."""
    if root.find("memoryBacking/hugepages") is not None:
        yield "huge pages: another host is not known to have them"
    if xml.attribute_at(root, "memoryBacking/source", "type") == "file":
        yield "memory backed by files of this host"
    if xml.attribute_at(root, "vcpu", "cpuset"):
        yield "virtual CPUs pinned to CPUs of this host"
    if root.find("cputune//*[@cpuset]") is not None:
        yield "virtual CPUs or threads pinned to CPUs of this host"
    for tune in ("cachetune", "memorytune"):
        if root.find(f"cputune/{tune}") is not None:
            yield f"{tune}: allocations of this host's CPU cache or memory bandwidth"
    if root.find("numatune//*[@nodeset]") is not None:
        yield "memory bound to NUMA nodes of this host"
    for device in root.findall("blkiotune/device"):
        yield f"I/O limits of the device {xml.text_at(device, 'path')} of this host"
    yield from _resource(root)


def _resource(root: Element) -> Iterator[str]:
    partition = xml.text_at(root, "resource/partition")
    if partition not in (None, "/machine"):
        yield f"resource partition {partition}: a cgroup of this host"
    if root.find("resource/fibrechannel") is not None:
        yield "a Fibre Channel identifier of this host"


# Private: devices


def _device(device: Element) -> Iterator[str]:
    tag = xml.tag_of(device)
    if tag in _HARMLESS:
        return
    if tag in _NEVER:
        kind = device.get("type") or device.get("model")
        yield f"{_NEVER[tag][0]}{' of type ' + kind if kind else ''}: {_NEVER[tag][1]}"
    elif tag in _CHECKS:
        yield from _CHECKS[tag](device)
    else:
        yield f"unknown device {_tag(device)}: not known to be safe"


def _interface(device: Element) -> Iterator[str]:
    name = f"interface {xml.attribute_at(device, 'mac', 'address')}"
    if device.get("type") not in ("bridge", "network"):
        yield f"{name}: type {device.get('type')} is bound to this host"
        return
    for child in xml.children(device):
        if xml.tag_of(child) not in _INTERFACE_PARTS:
            yield f"{name}: element {_tag(child)} is not known to be safe"
    port = device.find("virtualport")
    if port is not None and port.get("type", "openvswitch") != "openvswitch":
        yield f"{name}: virtual port of type {port.get('type')} is not supported"
    yield from _interface_files(name, device)


def _interface_files(name: str, device: Element) -> Iterator[str]:
    for tag, attribute, what in _INTERFACE_FILES:
        for found in device.findall(f"{tag}[@{attribute}]"):
            yield f"{name}: {what} {found.get(attribute)} of this host"
    if device.find("teaming") is not None:
        yield f"{name}: it is teamed with a host device"


def _graphics(device: Element) -> Iterator[str]:
    name = f"graphics {device.get('type')}"
    if device.get("type") not in ("vnc", "spice"):
        yield f"{name}: needs a display or a program of this host"
    if device.find("gl") is not None and device.find("gl[@enable='no']") is None:
        yield f"{name}: rendering on a GPU of this host"
    if device.get("socket"):
        yield f"{name}: socket {device.get('socket')} of this host"
    listens = device.findall("listen")
    addresses = {each.get("address") for each in listens} | {device.get("listen")}
    for address in sorted(filter(None, addresses)):
        if address not in ("0.0.0.0", "127.0.0.1", "::", "::1", "localhost"):
            yield f"{name}: it listens on {address}, an address of this host"
    for listen in listens:
        if listen.get("type") == "network" or listen.get("socket"):
            yield f"{name}: it listens on a network or socket of this host"


def _video(device: Element) -> Iterator[str]:
    if xml.attribute_at(device, "driver", "name") == "vhostuser":
        yield "video: a vhost-user process of this host"
    if device.find("model/acceleration[@rendernode]") is not None:
        yield "video: a GPU of this host"


def _audio(device: Element) -> Iterator[str]:
    if device.get("type") not in ("none", "spice"):
        yield f"audio {device.get('type')}: a sound system of this host"


def _input(device: Element) -> Iterator[str]:
    if device.get("type") not in ("tablet", "mouse", "keyboard"):
        yield f"input {device.get('type')}: an input device of this host"


def _vsock(device: Element) -> Iterator[str]:
    if device.find("cid[@auto='yes']") is None:
        cid = xml.attribute_at(device, "cid", "address")
        yield f"vsock with the fixed CID {cid}: it may be taken on another host"


def _rng(device: Element) -> Iterator[str]:
    backend = device.find("backend")
    model = None if backend is None else backend.get("model")
    path = xml.text_at(device, "backend") or "/dev/urandom"
    if model == "builtin":
        return
    if model != "random" or path not in ("/dev/random", "/dev/urandom"):
        yield f"random numbers from {model} {path} of this host"


def _tag(element: Element) -> str:
    """Return a tag as it is written, with its prefix."""
    name = etree.QName(element).localname
    return f"{element.prefix}:{name}" if element.prefix else name


# Private: who looks at which device


_CHECKS: dict[str, Check] = {
    "disk": diskparts.obstacles,
    "interface": _interface,
    "serial": chardevs.obstacles,
    "parallel": chardevs.obstacles,
    "console": chardevs.obstacles,
    "channel": chardevs.obstacles,
    "redirdev": chardevs.obstacles,
    "smartcard": chardevs.obstacles,
    "graphics": _graphics,
    "video": _video,
    "audio": _audio,
    "input": _input,
    "vsock": _vsock,
    "rng": _rng,
}
