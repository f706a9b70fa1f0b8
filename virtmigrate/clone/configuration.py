# SPDX-License-Identifier: Apache-2.0
"""The XML of a clone, made of that of its source.

What the guest sees of its machine stays: addresses, models, CPU, memory, targets of
disks. What says who it is, and what lies at the host's end, becomes the clone's.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from virtmigrate import domainxml, xml
from virtmigrate.domainxml import Interface, InterfaceKind, Layer

_INTERFACES = "devices/interface"


@dataclass(frozen=True)
class Twin:
    """Who a clone is, and what it stands on."""

    source: str
    """UUID of the source."""
    uuid: str
    name: str
    chains: Mapping[str, Sequence[Layer]]
    """By target, of all disks."""
    macs: Mapping[str, str]
    """By the source's, in lower case."""
    devices: Mapping[str, str | None]
    """The host's ends, by the source's MACs: those of running guests keep theirs."""
    console_log: str
    metadata: Mapping[str, str]


def as_twin(text: str, twin: Twin, network: str) -> str:
    """Return the XML of a clone that is plugged into an isolated network.

    Arguments:
        text: its source's, of the domain or of the head of a memory image.

    Raises DomainNotUnderstood where an interface or disk has no counterpart.
    """
    text = domainxml.with_disks(domainxml.without_runtime(text), twin.chains)
    if domainxml.console_log(text) is not None:
        text = domainxml.with_console_log(text, twin.console_log)
    text = domainxml.with_interfaces(text, _apart(text, twin, network))
    root = xml.parse(text)
    _rename(root, twin)
    _replug(root, twin.macs)
    _forget(root)
    return domainxml.with_metadata(xml.write(root), twin.metadata)


def plugged(text: str, interfaces: Sequence[Interface]) -> str:
    """Return the XML of a clone whose interfaces lead where they are to."""
    text = domainxml.with_interfaces(text, interfaces)
    root = xml.parse(text)
    for interface in root.findall(_INTERFACES):
        _set_link(interface, is_up=True)
    return xml.write(root)


def device(text: str, mac: str, interface: Interface | None = None) -> str:
    """Return the element of one interface with its link down; with another end, up.

    Arguments:
        text: of the running domain.
        interface: what it is plugged into; None: as it is.
    """
    if interface is not None:
        text = domainxml.with_interfaces(text, [interface])
    for found in xml.parse(text).findall(_INTERFACES):
        if (xml.attribute_at(found, "mac", "address") or "").lower() == mac:
            _set_link(found, is_up=interface is not None)
            return xml.write(copy.deepcopy(found))
    raise LookupError(mac)


# Private


def _apart(text: str, twin: Twin, network: str) -> list[Interface]:
    return [
        Interface(
            mac=each.mac,
            bridge=network,
            kind=InterfaceKind.NETWORK,
            device=twin.devices.get(each.mac),
            mtu=each.mtu,
        )
        for each in domainxml.interfaces(text)
    ]


def _rename(root: xml.Element, twin: Twin) -> None:
    for tag, value in (("name", twin.name), ("uuid", twin.uuid)):
        found = root.find(tag)
        if found is not None:
            xml.set_text(found, value)
    for genid in root.findall("genid"):
        # Empty: libvirt draws one.
        xml.set_text(genid, "")
    for entry in root.findall("sysinfo//entry"):
        if xml.text(entry).strip().lower() == twin.source:
            xml.set_text(entry, twin.uuid)


def _replug(root: xml.Element, macs: Mapping[str, str]) -> None:
    for interface in root.findall(_INTERFACES):
        mac = interface.find("mac")
        if mac is not None:
            mac.set("address", macs[mac.get("address", "").lower()])
        _set_link(interface, is_up=False)


def _forget(root: xml.Element) -> None:
    """Take out what others noted of the source, and its passwords."""
    for found in root.findall("metadata"):
        xml.remove(found)
    for graphics in root.findall("devices/graphics"):
        for name in ("passwd", "passwdValidTo"):
            xml.set_attribute(graphics, name, None)


def _set_link(interface: xml.Element, *, is_up: bool) -> None:
    for old in interface.findall("link"):
        xml.remove(old)
    xml.add(interface, "link", state="up" if is_up else "down")
