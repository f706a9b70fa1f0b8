# SPDX-License-Identifier: Apache-2.0
"""What libvirt adds to a running domain's XML, taken out again."""

from __future__ import annotations

import re

from virtmigrate import xml
from virtmigrate.domainxml import chardevs, tree
from virtmigrate.xml import Element

# Names that libvirt gives to the host's end of an interface.
_GIVEN_DEVICE = re.compile(r"(vnet|vif|macvtap|macvlan)\d+")

_CHARDEVS = ("serial", "console", "channel", "parallel")


def without_runtime(text: str) -> str:
    """Return the XML without what belongs to one run of the domain.

    Out go the run's id, aliases that libvirt gave (not the users' own, "ua-"),
    security labels that it chose, interface devices that it named, terminals,
    ports and sockets. Addresses stay: the guest sees them. Of a running
    domain's XML (it has an id) the chains behind the top layers go too:
    libvirt probed them; with_disks() gives the true ones.
    """
    root = tree.parse(text)
    if root.get("id") is not None:
        xml.set_attribute(root, "id", None)
        _drop(root, "devices/disk/backingStore")
    _drop_aliases(root)
    _drop_labels(root)
    _drop_devices(root)
    for source in root.iterfind("devices/disk//source[@index]"):
        xml.set_attribute(source, "index", None)
    for kind in _CHARDEVS:
        for chardev in root.findall(f"devices/{kind}"):
            _clean_chardev(chardev)
    for graphics in root.findall("devices/graphics"):
        _clean_graphics(graphics)
    for cid in root.findall("devices/vsock/cid[@auto='yes']"):
        xml.set_attribute(cid, "address", None)
    return xml.write(root)


# Private


def _drop(root: Element, path: str) -> None:
    for found in root.findall(path):
        xml.remove(found)


def _drop_aliases(root: Element) -> None:
    for alias in root.findall("devices//alias"):
        if not alias.get("name", "").startswith("ua-"):
            xml.remove(alias)


def _drop_labels(root: Element) -> None:
    for label in root.findall("seclabel"):
        if label.get("type", "dynamic") != "dynamic":
            continue
        _drop(label, "label")
        _drop(label, "imagelabel")
        if len(label) == 0:
            xml.remove(label)


def _drop_devices(root: Element) -> None:
    for interface in root.findall("devices/interface"):
        target = interface.find("target")
        if target is not None and _GIVEN_DEVICE.fullmatch(target.get("dev", "")):
            xml.remove(target)
        source = interface.find("source[@network]")
        if source is not None:
            xml.set_attribute(source, "portid", None)
            xml.set_attribute(source, "bridge", None)


def _clean_chardev(chardev: Element) -> None:
    xml.set_attribute(chardev, "tty", None)
    target = chardev.find("target")
    if target is not None:
        xml.set_attribute(target, "state", None)
    source = chardev.find("source")
    if source is not None and (
        chardev.get("type") == "pty" or chardevs.is_given_socket(source)
    ):
        xml.remove(source)


def _clean_graphics(graphics: Element) -> None:
    if graphics.get("autoport") == "yes":
        graphics.set("port", "-1")
        xml.set_attribute(graphics, "tlsPort", None)
