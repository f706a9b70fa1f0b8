# SPDX-License-Identifier: Apache-2.0
"""Changes to the XML of any domain; all else stays as it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from virtmigrate import units, xml
from virtmigrate.domainxml import builder, layers, reader, tree
from virtmigrate.domainxml.model import Interface, Layer
from virtmigrate.xml import Element


def with_disks(text: str, chains: Mapping[str, Sequence[Layer]]) -> str:
    """Return the XML with other chains on the named disks.

    Source, format and the whole chain are replaced; an empty chain empties a
    CD drive.

    Raises:
        DomainNotUnderstood: it has no such disk, or two, or a raw layer has a
            backing layer.
    """
    root = tree.parse(text)
    for target, chain in chains.items():
        disk = tree.disk(root, target)
        layers.write(disk, chain)
        xml.tidy(disk)
    return xml.write(root)


def with_size(text: str, memory: int | None = None, vcpus: int | None = None) -> str:
    """Return the XML with another memory, in bytes, and count of virtual CPUs.

    Raises:
        DomainNotUnderstood: the domain divides its memory or its CPUs up in a
            way that leaves open how the new ones are to be divided.
    """
    root = tree.parse(text)
    if memory is not None:
        _set_memory(root, units.round_up(memory, units.KiB))
    if vcpus is not None:
        _set_vcpus(root, vcpus)
    return xml.write(root)


def with_nvram(text: str, path: str) -> str:
    """Return the XML with another file for the firmware's variables.

    Raises:
        DomainNotUnderstood: its firmware has no variables.
    """
    root = tree.parse(text)
    loader = tree.required(root, "os/loader")
    if loader.get("type") != "pflash" or loader.get("stateless") == "yes":
        raise tree.not_understood(root, "its firmware has no variables")
    nvram = root.find("os/nvram")
    if nvram is None:
        nvram = xml.element("nvram")
        xml.insert_after(loader, nvram)
    xml.set_attribute(nvram, "type", None)
    xml.set_text(nvram, path)
    return xml.write(root)


def with_interfaces(text: str, interfaces: Iterable[Interface]) -> str:
    """Return the XML with the host's ends of these interfaces replaced.

    They are found by MAC. Model, addresses and all else that the guest sees
    stay; no interface is added.

    Raises:
        DomainNotUnderstood: it has no such interface, or two, or one that is
            not on a bridge or network.
    """
    root = tree.parse(text)
    for wanted in interfaces:
        interface = _interface(root, wanted.mac)
        for tag in ("source", "virtualport", "target", "mtu"):
            for old in interface.findall(tag):
                xml.remove(old)
        builder.plug(interface, wanted)
        xml.tidy(interface)
    return xml.write(root)


def with_emulator(text: str, path: str | None) -> str:
    """Return the XML with another QEMU; with None the host's own choice."""
    root = tree.parse(text)
    devices = tree.required(root, "devices")
    emulator = devices.find("emulator")
    if path is None:
        if emulator is not None:
            xml.remove(emulator)
        return xml.write(root)
    if emulator is None:
        emulator = xml.element("emulator")
        devices.insert(0, emulator)
    xml.set_text(emulator, path)
    return xml.write(root)


def with_console_log(text: str, path: str | None) -> str:
    """Return the XML with another file that the first serial port is logged to.

    The console that stands for the same port is logged to no file of its own.

    Raises:
        DomainNotUnderstood: it has no serial port.
    """
    root = tree.parse(text)
    for twin in root.findall("devices/console/target[@type='serial']/../log"):
        xml.remove(twin)
    serial = root.find("devices/serial")
    if serial is None:
        raise tree.not_understood(root, "it has no serial port")
    for old in serial.findall("log"):
        xml.remove(old)
    if path is not None:
        xml.add(serial, "log", file=path, append="on")
    xml.tidy(serial)
    return xml.write(root)


# Private


def _set_memory(root: Element, size: int) -> None:
    if size <= 0:
        raise tree.not_understood(root, f"it cannot have {size} bytes of memory")
    if size == reader.memory_of(root):
        return
    for path, what in (
        ("cpu/numa", "its memory is divided into NUMA cells"),
        ("maxMemory", "it has slots for memory devices"),
        ("devices/memory", "it has memory devices"),
        ("memtune/hard_limit", "its memory has a hard limit"),
    ):
        if root.find(path) is not None:
            raise tree.not_understood(root, what + ", so its memory cannot be changed")
    element = tree.required(root, "memory")
    current = root.find("currentMemory")
    if current is None:
        current = xml.element("currentMemory")
        xml.insert_after(element, current)
    for each in (element, current):
        each.set("unit", "KiB")
        xml.set_text(each, str(size // units.KiB))


def _set_vcpus(root: Element, count: int) -> None:
    if count <= 0:
        raise tree.not_understood(root, f"it cannot have {count} CPUs")
    if count == reader.vcpus_of(root):
        return
    _check_vcpus(root, count)
    element = root.find("vcpu")
    if element is None:
        element = xml.element("vcpu")
        xml.insert_after(tree.required(root, "memory"), element)
    xml.set_attribute(element, "current", None)
    xml.set_text(element, str(count))


def _check_vcpus(root: Element, count: int) -> None:
    """Refuse where something else in the domain counts or names its CPUs."""
    topology = reader.cpu_of(root)
    if topology and topology.topology and topology.topology.total != count:
        fixed = topology.topology.total
        reason = f"its CPU topology is of {fixed}, so it cannot have {count} CPUs"
        raise tree.not_understood(root, reason)
    for path in ("vcpus", "cpu/numa", "cputune//*[@vcpu]", "cputune//*[@vcpus]"):
        if root.find(path) is not None:
            reason = f"{path} names single CPUs, so their number cannot be changed"
            raise tree.not_understood(root, reason)


def _interface(root: Element, mac: str) -> Element:
    found = [
        each
        for each in root.findall("devices/interface")
        if (xml.attribute_at(each, "mac", "address") or "").lower() == mac.lower()
    ]
    if len(found) != 1:
        reason = f"{len(found)} interfaces {mac} where one must be"
        raise tree.not_understood(root, reason)
    if found[0].get("type") not in ("bridge", "network"):
        kind = found[0].get("type")
        raise tree.not_understood(root, f"interface {mac} is of type {kind}")
    return found[0]
