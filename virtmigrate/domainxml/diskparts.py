# SPDX-License-Identifier: Apache-2.0
"""The parts of a disk's XML: which of them can be carried to another host."""

from __future__ import annotations

from collections.abc import Iterator

from virtmigrate import xml
from virtmigrate.xml import Element

_PARTS = frozenset(
    [
        "driver",
        "source",
        "backingStore",
        "auth",
        "target",
        "boot",
        "readonly",
        "serial",
        "wwn",
        "vendor",
        "product",
        "iotune",
        "alias",
        "address",
        "acpi",
        "geometry",
        "blockio",
    ]
)

_REFUSED_PARTS = {
    "mirror": "a block job is running on it",
    "transient": "it is transient: what the guest writes is thrown away",
    "shareable": "it is shared with other instances",
    "encryption": "it is encrypted, and the key is this host's",
    "backenddomain": "another domain serves it",
    "throttlefilters": "throttle groups are not carried",
}

_SOURCE_PARTS = frozenset(("host", "auth", "seclabel"))

_REFUSED_SOURCE_PARTS = {
    "encryption": "it is encrypted, and the key is this host's",
    "slices": "it is a slice of a larger file or device",
    "dataStore": "its data are in an external file",
    "reservations": "it uses persistent reservations of this host",
    "snapshot": "it is a snapshot inside an image",
    "config": "it has a Ceph configuration file of this host",
}

_FORMATS = ("raw", "qcow2")


def obstacles(disk: Element) -> Iterator[str]:
    """Say what of a disk cannot be carried."""
    label = f"disk {xml.attribute_at(disk, 'target', 'dev')}"
    device = disk.get("device", "disk")
    if device not in ("disk", "cdrom"):
        yield f"{label}: a device of type {device} is not carried"
    for child in xml.children(disk):
        yield from _part(label, xml.tag_of(child), _PARTS, _REFUSED_PARTS)
    yield from _format(label, disk.find("driver"))
    for layer in (disk, *disk.iterfind(".//backingStore[@type]")):
        yield from _layer(label, layer)


# Private


def _part(
    label: str, tag: str, known: frozenset[str], refused: dict[str, str]
) -> Iterator[str]:
    if tag in refused:
        yield f"{label}: {refused[tag]}"
    elif tag not in known:
        yield f"{label}: element {tag} is not known to be safe"


def _layer(label: str, layer: Element) -> Iterator[str]:
    kind = layer.get("type", "file")
    if kind not in ("file", "block", "network"):
        yield f"{label}: a source of type {kind} is not carried"
    for format_ in layer.findall("format"):
        yield from _format(label, format_)
    for source in layer.findall("source"):
        yield from _source(label, source)
        protocol = source.get("protocol")
        if kind == "network" and protocol != "rbd":
            yield f"{label}: a source by network protocol {protocol} is not carried"


def _source(label: str, source: Element) -> Iterator[str]:
    for child in xml.children(source):
        yield from _part(label, xml.tag_of(child), _SOURCE_PARTS, _REFUSED_SOURCE_PARTS)
    if source.get("fdgroup"):
        yield f"{label}: it is opened by another process (fdgroup)"
    for host in source.findall("host"):
        if host.get("transport", "tcp") != "tcp" or host.get("socket"):
            yield f"{label}: a source by transport {host.get('transport')}"


def _format(label: str, element: Element | None) -> Iterator[str]:
    value = None if element is None else element.get("type")
    if value is not None and value not in _FORMATS:
        yield f"{label}: a layer of format {value} is not carried"
