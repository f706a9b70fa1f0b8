# SPDX-License-Identifier: Apache-2.0
"""What forbids clones of an instance, found before anything is touched."""

from collections.abc import Iterator

from virtmigrate import domainxml, model, node, xml
from virtmigrate.backends import base
from virtmigrate.domainxml import InterfaceKind
from virtmigrate.model import Role


def of_disks(here: node.Node, found: model.Instance) -> Iterator[str]:
    """Say which disks cannot be cloned by copy-on-write, and why."""
    for ref in found.disks:
        if ref.role is Role.NVRAM:
            yield "its firmware keeps variables (UEFI): those are not cloned yet"
        elif ref.transient:
            yield (
                f"disk {ref.target}: it is transient, and what its guest writes is "
                "thrown away: make it permanent (`virtmigrate instance transient`)"
            )
        elif ref.role is not Role.CONFIG:
            yield from _of_backend(ref.target, here.backend(ref.backend))


def of_domain(found: model.Instance, text: str) -> Iterator[str]:
    """Say what of the domain is not its own, so that a clone cannot have it.

    Arguments:
        text: the XML that it runs with, or would.
    """
    yield from domainxml.obstacles(text)
    known = {ref.target for ref in found.disks}
    for disk in domainxml.disks(text):
        if disk.chain and disk.target not in known:
            source = disk.chain[0].source
            yield f"disk {disk.target}: {source} is no volume of this instance"
    for each in domainxml.interfaces(text):
        if each.kind is InterfaceKind.OVS:
            yield (
                f"interface {each.mac}: libvirt moves a running guest's port between "
                "Linux bridges only, not onto Open vSwitch"
            )
    for interface in xml.parse(text).findall("devices/interface"):
        if interface.find("vlan") is not None:
            mac = xml.attribute_at(interface, "mac", "address")
            yield f"interface {mac}: its VLAN has no counterpart in isolation"


# Private


def _of_backend(target: str, backend: base.Backend) -> Iterator[str]:
    if not backend.capabilities.overlays:
        yield (
            f"disk {target}: backend {backend.name} has no layers, and its own "
            "snapshots are not cloned yet"
        )
    if backend.capabilities.shared:
        yield (
            f"disk {target}: other hosts see backend {backend.name}, and what clones "
            "stand on is known to one host only"
        )
