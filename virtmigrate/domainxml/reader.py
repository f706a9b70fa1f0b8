# SPDX-License-Identifier: Apache-2.0
"""What a domain's XML says: no more, and nothing filled in."""

from __future__ import annotations

from virtmigrate import units, xml
from virtmigrate.domainxml import builder, layers, metadata, tree
from virtmigrate.domainxml.model import (
    Cpu,
    Firmware,
    FoundDisk,
    FoundDomain,
    Interface,
    InterfaceKind,
    Topology,
)
from virtmigrate.xml import Element

# libvirt's virScaleInteger(): letters are binary unless they end in "B".
_SCALE = {
    "b": 1,
    "bytes": 1,
    **{
        name: base**power
        for power, letter in enumerate("kmgtpe", 1)
        for name, base in ((letter, 1024), (letter + "ib", 1024), (letter + "b", 1000))
    },
}


def read(text: str) -> FoundDomain:
    """Return all that a domain's XML says.

    Raises:
        XmlRefused: it is not safe or not well-formed.
        DomainNotUnderstood: something that every domain has is missing.
    """
    root = tree.parse(text)
    return FoundDomain(
        uuid=_required_text(root, "uuid"),
        name=_required_text(root, "name"),
        memory=memory_of(root),
        vcpus=vcpus_of(root),
        virt_type=_required_attribute(root, ".", "type"),
        machine=_required_attribute(root, "os/type", "machine"),
        arch=_required_attribute(root, "os/type", "arch"),
        emulator=xml.text_at(root, "devices/emulator"),
        cpu=cpu_of(root),
        firmware=_firmware(root),
        disks=_disks(root),
        interfaces=_interfaces(root),
        console_log=_console_log(root),
        metadata=metadata.read(root),
    )


def uuid(text: str) -> str:
    """Return the domain's UUID as written."""
    return _required_text(tree.parse(text), "uuid")


def name(text: str) -> str:
    """Return the domain's name."""
    return _required_text(tree.parse(text), "name")


def memory(text: str) -> int:
    """Return the memory that the domain starts with, in bytes."""
    return memory_of(tree.parse(text))


def vcpus(text: str) -> int:
    """Return the most virtual CPUs that the domain may have."""
    return vcpus_of(tree.parse(text))


def virt_type(text: str) -> str:
    """Return "kvm", "qemu", or what else the domain runs on."""
    return _required_attribute(tree.parse(text), ".", "type")


def machine(text: str) -> str:
    """Return the machine type."""
    return _required_attribute(tree.parse(text), "os/type", "machine")


def arch(text: str) -> str:
    """Return the architecture."""
    return _required_attribute(tree.parse(text), "os/type", "arch")


def emulator(text: str) -> str | None:
    """Return the path of QEMU, None when the XML leaves it to libvirt."""
    return xml.text_at(tree.parse(text), "devices/emulator")


def cpu(text: str) -> Cpu | None:
    """Return the virtual CPU, None when the XML leaves it to libvirt."""
    return cpu_of(tree.parse(text))


def cpu_needed(text: str) -> Cpu | None:
    """Return the CPU that a host must be able to provide.

    Returns:
        None when the domain takes what it finds at start: no CPU is named,
        or the mode is host-model, host-passthrough or maximum.
    """
    found = cpu_of(tree.parse(text))
    return found if found and found.mode == "custom" and found.model else None


def firmware(text: str) -> Firmware | None:
    """Return the firmware files, None when the machine's own BIOS is used."""
    return _firmware(tree.parse(text))


def disks(text: str) -> tuple[FoundDisk, ...]:
    """Return all disks with their chains as written.

    libvirt writes what it probed into the XML of a running domain: ask for
    the inactive one.
    """
    return _disks(tree.parse(text))


def interfaces(text: str) -> tuple[Interface, ...]:
    """Return the interfaces on bridges and networks; others are left out."""
    return _interfaces(tree.parse(text))


def console_log(text: str) -> str | None:
    """Return the file that the first serial port is logged to."""
    return _console_log(tree.parse(text))


def agent_state(text: str) -> str | None:
    """Return "connected" or "disconnected" of a running guest's agent.

    None: there is no channel for one.
    """
    path = f"devices/channel/target[@name='{builder.AGENT_CHANNEL}']"
    return xml.attribute_at(tree.parse(text), path, "state")


# Private


def _required_text(root: Element, path: str) -> str:
    return xml.text(tree.required(root, path)).strip()


def _required_attribute(root: Element, path: str, attribute: str) -> str:
    value = xml.attribute_at(root, path, attribute)
    if not value:
        raise tree.not_understood(root, f"{path} has no attribute {attribute}")
    return value


def memory_of(root: Element) -> int:
    element = tree.required(root, "memory")
    unit = element.get("unit", "KiB")
    if unit.lower() not in _SCALE:
        raise tree.not_understood(root, f"memory is given in {unit!r}")
    count = tree.integer(root, xml.text(element).strip(), "memory")
    return units.round_up(count * _SCALE[unit.lower()], units.KiB)


def vcpus_of(root: Element) -> int:
    if root.find("vcpu") is None:
        return 1
    return tree.integer(root, _required_text(root, "vcpu"), "vcpu")


def cpu_of(root: Element) -> Cpu | None:
    element = root.find("cpu")
    if element is None:
        return None
    model = xml.text_at(element, "model") or None
    features = tuple(
        (each.get("policy", "require"), each.get("name", ""))
        for each in element.findall("feature")
    )
    # An element with a model and no mode is libvirt's oldest form of custom.
    return Cpu(
        mode=element.get("mode", "custom"),
        model=model,
        features=features,
        match=element.get("match"),
        check=element.get("check"),
        topology=_topology(root, element),
    )


def _topology(root: Element, element: Element) -> Topology | None:
    found = element.find("topology")
    if found is None:
        return None
    count = {
        part: tree.integer(root, found.get(part, "1"), part)
        for part in ("sockets", "dies", "cores", "threads")
    }
    return Topology(**count)


def _firmware(root: Element) -> Firmware | None:
    loader = root.find("os/loader")
    if loader is None or not xml.text(loader).strip():
        return None
    return Firmware(
        loader=xml.text(loader).strip(),
        nvram=_nvram(root),
        nvram_template=xml.attribute_at(root, "os/nvram", "template"),
        secure=loader.get("secure") == "yes",
        pflash=loader.get("type") == "pflash",
    )


def _nvram(root: Element) -> str | None:
    source = xml.attribute_at(root, "os/nvram/source", "file")
    return source or xml.text_at(root, "os/nvram") or None


def _disks(root: Element) -> tuple[FoundDisk, ...]:
    return tuple(_disk(root, each) for each in root.findall("devices/disk"))


def _disk(root: Element, element: Element) -> FoundDisk:
    chain, terminated, problems = layers.read(element)
    order = xml.attribute_at(element, "boot", "order")
    return FoundDisk(
        target=_required_attribute(element, "target", "dev"),
        bus=xml.attribute_at(element, "target", "bus"),
        device=element.get("device", "disk"),
        readonly=element.find("readonly") is not None,
        chain=chain,
        terminated=terminated,
        boot_order=tree.integer(root, order, "a boot order") if order else None,
        serial=xml.text_at(element, "serial"),
        cache=xml.attribute_at(element, "driver", "cache"),
        discard=xml.attribute_at(element, "driver", "discard"),
        problems=problems,
    )


def _interfaces(root: Element) -> tuple[Interface, ...]:
    found = (_interface(root, each) for each in root.findall("devices/interface"))
    return tuple(each for each in found if each)


def _interface(root: Element, element: Element) -> Interface | None:
    kind = _kind(element)
    if kind is None:
        return None
    attribute = "network" if kind is InterfaceKind.NETWORK else "bridge"
    mtu = xml.attribute_at(element, "mtu", "size")
    port = "virtualport/parameters"
    return Interface(
        mac=_required_attribute(element, "mac", "address").lower(),
        bridge=_required_attribute(element, "source", attribute),
        kind=kind,
        interface_id=xml.attribute_at(element, port, "interfaceid"),
        device=xml.attribute_at(element, "target", "dev"),
        model=xml.attribute_at(element, "model", "type") or "",
        mtu=tree.integer(root, mtu, "an MTU") if mtu else None,
    )


def _kind(element: Element) -> InterfaceKind | None:
    if element.get("type") == "network":
        return InterfaceKind.NETWORK
    if element.get("type") != "bridge":
        return None
    ovs = xml.attribute_at(element, "virtualport", "type") == "openvswitch"
    return InterfaceKind.OVS if ovs else InterfaceKind.BRIDGE


def _console_log(root: Element) -> str | None:
    serial = root.find("devices/serial")
    return None if serial is None else xml.attribute_at(serial, "log", "file")
