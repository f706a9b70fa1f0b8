# SPDX-License-Identifier: Apache-2.0
"""The XML of a new domain."""

from __future__ import annotations

from virtmigrate import errors, units, xml
from virtmigrate.domainxml import layers, metadata
from virtmigrate.domainxml.model import (
    Cpu,
    Disk,
    DiskDevice,
    Domain,
    Firmware,
    Interface,
    InterfaceKind,
)
from virtmigrate.xml import Element

AGENT_CHANNEL = "org.qemu.guest_agent.0"

_PC = ("x86_64", "i686")


def build(domain: Domain) -> str:
    """Return the XML that defines a domain.

    Every disk names its format and its whole chain, so that libvirt has
    nothing to probe.

    Raises:
        DomainNotUnderstood: a raw layer has a backing layer, or a disk no
            layer.
        XmlRefused: a value has characters that XML cannot carry.
    """
    root = xml.element("domain", attributes={"type": domain.virt_type})
    _identity(root, domain)
    _size(root, domain)
    _machine(root, domain)
    _behaviour(root)
    _devices(root, domain)
    if domain.metadata:
        metadata.write(root, domain.metadata)
    xml.tidy(root)
    return xml.write(root) + "\n"


def cpu_xml(cpu: Cpu) -> str:
    """Return a CPU's element, as virConnectCompareCPU() and its like take it."""
    return xml.write(_cpu(cpu))


def plug(interface: Element, wanted: Interface) -> None:
    """Give an interface element the ends that lie on the host.

    What was there of them must be gone; what the guest sees is not touched.
    """
    network = wanted.kind == InterfaceKind.NETWORK
    interface.set("type", "network" if network else "bridge")
    source = xml.add(interface, "source")
    xml.set_attribute(source, "network" if network else "bridge", wanted.bridge)
    if wanted.kind == InterfaceKind.OVS:
        port = xml.add(interface, "virtualport", type="openvswitch")
        if wanted.interface_id:
            xml.add(port, "parameters", interfaceid=wanted.interface_id)
    if wanted.device:
        xml.add(interface, "target", dev=wanted.device)
    if wanted.mtu:
        xml.add(interface, "mtu", size=str(wanted.mtu))


# Private


def _identity(root: Element, domain: Domain) -> None:
    xml.add(root, "name", domain.name)
    xml.add(root, "uuid", domain.uuid)
    xml.add(root, "genid")
    if domain.title:
        xml.add(root, "title", domain.title)
    if domain.description:
        xml.add(root, "description", domain.description)


def _size(root: Element, domain: Domain) -> None:
    memory = str(units.round_up(domain.memory, units.KiB) // units.KiB)
    xml.add(root, "memory", memory, unit="KiB")
    xml.add(root, "currentMemory", memory, unit="KiB")
    xml.add(root, "vcpu", str(domain.vcpus), placement="static")
    if domain.cpu:
        root.append(_cpu(domain.cpu))


def _cpu(cpu: Cpu) -> Element:
    attributes = {"mode": cpu.mode, "match": cpu.match, "check": cpu.check}
    element = xml.element("cpu", attributes=attributes)
    if cpu.model:
        xml.add(element, "model", cpu.model)
    if cpu.topology:
        xml.add(
            element,
            "topology",
            sockets=str(cpu.topology.sockets),
            dies=str(cpu.topology.dies),
            cores=str(cpu.topology.cores),
            threads=str(cpu.topology.threads),
        )
    for policy, name in cpu.features:
        xml.add(element, "feature", policy=policy, name=name)
    return element


def _machine(root: Element, domain: Domain) -> None:
    os = xml.add(root, "os")
    xml.add(os, "type", "hvm", arch=domain.arch, machine=domain.machine)
    features = xml.add(root, "features")
    pc = domain.arch in _PC
    if pc or domain.firmware:
        xml.add(features, "acpi")
    if pc:
        xml.add(features, "apic")
    if domain.firmware:
        _firmware(os, features, domain.firmware)


def _firmware(os: Element, features: Element, firmware: Firmware) -> None:
    kind = "pflash" if firmware.pflash else "rom"
    secure = "yes" if firmware.secure else None
    xml.add(os, "loader", firmware.loader, readonly="yes", secure=secure, type=kind)
    if firmware.nvram or firmware.nvram_template:
        xml.add(os, "nvram", firmware.nvram, template=firmware.nvram_template)
    if firmware.secure:
        xml.add(features, "smm", state="on")


def _behaviour(root: Element) -> None:
    clock = xml.add(root, "clock", offset="utc")
    xml.add(clock, "timer", name="rtc", tickpolicy="catchup")
    xml.add(clock, "timer", name="pit", tickpolicy="delay")
    xml.add(root, "on_poweroff", "destroy")
    xml.add(root, "on_reboot", "restart")
    xml.add(root, "on_crash", "destroy")


def _devices(root: Element, domain: Domain) -> None:
    devices = xml.add(root, "devices")
    for disk in domain.disks:
        _disk(devices, disk)
    if any(disk.bus == "scsi" for disk in domain.disks):
        xml.add(devices, "controller", type="scsi", index="0", model="virtio-scsi")
    for interface in domain.interfaces:
        _interface(devices, interface)
    _console(devices, domain)
    channel = xml.add(devices, "channel", type="unix")
    xml.add(channel, "target", type="virtio", name=AGENT_CHANNEL)
    rng = xml.add(devices, "rng", model="virtio")
    xml.add(rng, "backend", "/dev/urandom", model="random")
    xml.add(devices, "memballoon", model="virtio")


def _disk(devices: Element, disk: Disk) -> None:
    if not disk.chain and disk.device != DiskDevice.CDROM:
        reason = "a disk must have at least one layer"
        raise errors.DomainNotUnderstood(domain="with " + disk.target, reason=reason)
    element = xml.add(devices, "disk", device=str(disk.device))
    writable = not disk.readonly and disk.device == DiskDevice.DISK
    discard = disk.discard if writable else None
    xml.add(element, "driver", name="qemu", cache=disk.cache, discard=discard)
    xml.add(element, "target", dev=disk.target, bus=disk.bus)
    layers.write(element, disk.chain)
    if disk.readonly or disk.device == DiskDevice.CDROM:
        xml.add(element, "readonly")
    if disk.serial:
        xml.add(element, "serial", disk.serial)
    if disk.boot_order:
        xml.add(element, "boot", order=str(disk.boot_order))


def _interface(devices: Element, interface: Interface) -> None:
    element = xml.add(devices, "interface")
    xml.add(element, "mac", address=interface.mac)
    plug(element, interface)
    xml.add(element, "model", type=interface.model)


def _console(devices: Element, domain: Domain) -> None:
    serial = xml.add(devices, "serial", type="pty")
    if domain.console_log:
        xml.add(serial, "log", file=domain.console_log, append="on")
    target = xml.add(serial, "target", port="0")
    if domain.arch in _PC:
        target.set("type", "isa-serial")
    console = xml.add(devices, "console", type="pty")
    xml.add(console, "target", type="serial", port="0")
