# SPDX-License-Identifier: Apache-2.0
"""Backing chains in a disk's XML: written in full, read as they stand."""

from __future__ import annotations

from collections.abc import Sequence

from virtmigrate import errors, xml
from virtmigrate.domainxml.model import Auth, FoundLayer, Layer, SourceType
from virtmigrate.formats import DiskFormat
from virtmigrate.xml import Element

_ATTRIBUTE = {
    SourceType.FILE: "file",
    SourceType.BLOCK: "dev",
    SourceType.NETWORK: "name",
}


# Writing


def write(disk: Element, chain: Sequence[Layer]) -> None:
    """Give a disk element a chain in place of the one that it has.

    An empty chain empties the drive. What stands in the driver element beside
    the format stays.

    Raises:
        DomainNotUnderstood: a raw layer has a backing layer.
    """
    _check(disk, chain)
    for tag in ("source", "backingStore", "auth"):
        for old in disk.findall(tag):
            xml.remove(old)
    driver = _driver(disk)
    top = chain[0] if chain else None
    driver.set("type", top.fmt.value if top else DiskFormat.RAW.value)
    disk.set("type", top.type.value if top else SourceType.FILE.value)
    if top:
        source = _source(top)
        xml.insert_after(driver, source)
        xml.insert_after(source, _backing(chain[1:]))


def _check(disk: Element, chain: Sequence[Layer]) -> None:
    for layer in chain[:-1]:
        if layer.fmt is DiskFormat.RAW:
            target = xml.attribute_at(disk, "target", "dev")
            reason = f"{layer.source} is raw and cannot have a backing layer"
            raise errors.DomainNotUnderstood(domain=f"with {target}", reason=reason)


def _driver(disk: Element) -> Element:
    driver = disk.find("driver")
    if driver is None:
        driver = xml.element("driver")
        disk.insert(0, driver)
    driver.set("name", "qemu")
    return driver


def _source(layer: Layer) -> Element:
    source = xml.element("source")
    if layer.type is SourceType.NETWORK:
        source.set("protocol", "rbd")
    xml.set_attribute(source, _ATTRIBUTE[layer.type], layer.source)
    if layer.room:
        slices = xml.add(source, "slices")
        xml.add(slices, "slice", type="storage", offset="0", size=str(layer.room))
    for host in layer.hosts:
        name, port = _split_host(host)
        xml.add(source, "host", name=name, port=port)
    if layer.auth:
        auth = xml.add(source, "auth", username=layer.auth.user)
        xml.add(auth, "secret", type="ceph", uuid=layer.auth.secret)
    return source


def _backing(chain: Sequence[Layer]) -> Element:
    """Return the backingStore elements, nested; the innermost ends the chain."""
    outer = xml.element("backingStore")
    inner = outer
    for layer in chain:
        inner.set("type", layer.type.value)
        xml.add(inner, "format", type=layer.fmt.value)
        inner.append(_source(layer))
        inner = xml.add(inner, "backingStore")
    return outer


# Reading


def read(disk: Element) -> tuple[tuple[FoundLayer, ...], bool, tuple[str, ...]]:
    """Return a disk's layers, whether the chain has an explicit end, and problems."""
    reader = _Reader(disk)
    reader.run()
    return tuple(reader.layers), reader.terminated, tuple(reader.problems)


class _Reader:
    """Walks a chain from the top; one use, one thread."""

    def __init__(self, disk: Element) -> None:
        self.layers: list[FoundLayer] = []
        self.terminated = False
        self.problems: list[str] = []
        self._disk = disk
        self._name = "disk " + (xml.attribute_at(disk, "target", "dev") or "?")

    def run(self) -> None:
        node: Element | None = self._disk
        while node is not None:
            layer = self._layer(node)
            if layer is None:
                return
            self.layers.append(layer)
            self.terminated = layer.fmt is DiskFormat.RAW
            node = self._next(node, layer)
        if self.layers and not self.terminated:
            last = self.layers[-1].source
            self._problem(f"the XML does not say whether {last} has a backing layer")

    def _next(self, node: Element, layer: FoundLayer) -> Element | None:
        behind = self._only(node, "backingStore")
        if behind is None:
            return None
        if behind.get("type") is None:
            # libvirt ends the chain here whatever is inside.
            self.terminated = len(behind) == 0
            if len(behind):
                self._problem(f"the backing layer of {layer.source} has no type")
            return None
        if layer.fmt is DiskFormat.RAW:
            self._problem(f"{layer.source} is raw and has a backing layer")
        self.terminated = False
        return behind

    def _layer(self, node: Element) -> FoundLayer | None:
        source = self._only(node, "source")
        kind = node.get("type", SourceType.FILE.value)
        if kind not in [each.value for each in SourceType]:
            self._problem(f"a source of type {kind} is not understood")
            return None
        type_ = SourceType(kind)
        path = None if source is None else source.get(_ATTRIBUTE[type_])
        if source is None or not path:
            self._missing(node)
            return None
        if type_ is not SourceType.NETWORK:
            return FoundLayer(type_, path, self._format(node, path))
        return self._network_layer(node, source, path)

    def _missing(self, node: Element) -> None:
        empty = node is self._disk and node.get("device") in ("cdrom", "floppy")
        self.terminated = empty
        if not empty:
            self._problem("a layer has no source")

    def _network_layer(self, node: Element, source: Element, path: str) -> FoundLayer:
        protocol = source.get("protocol")
        if protocol != "rbd":
            self._problem(f"the network protocol {protocol} is not understood")
        hosts = tuple(_join_host(host) for host in source.findall("host"))
        auth = _auth(source) or (_auth(node) if node is self._disk else None)
        fmt = self._format(node, path)
        return FoundLayer(SourceType.NETWORK, path, fmt, hosts, auth)

    def _format(self, node: Element, path: str) -> DiskFormat | None:
        tag = "driver" if node is self._disk else "format"
        element = self._only(node, tag)
        value = None if element is None else element.get("type")
        if value is None:
            self._problem(f"the XML does not name the format of {path}")
            return None
        if value not in [each.value for each in DiskFormat]:
            self._problem(f"{path} has the format {value}, which is not supported")
            return None
        return DiskFormat(value)

    def _only(self, node: Element, tag: str) -> Element | None:
        found = node.findall(tag)
        if len(found) > 1:
            self._problem(f"it has {len(found)} elements {tag} where one may be")
        return found[0] if found else None

    def _problem(self, text: str) -> None:
        self.problems.append(f"{self._name}: {text}")


def _auth(node: Element) -> Auth | None:
    user = xml.attribute_at(node, "auth", "username")
    secret = xml.attribute_at(node, "auth/secret", "uuid")
    return Auth(user, secret) if user and secret else None


# Hosts


def _split_host(host: str) -> tuple[str, str | None]:
    """Take "name", "name:port", "[::1]:port" or "::1" apart."""
    if host.startswith("["):
        name, _, port = host[1:].partition("]")
        return name, port.removeprefix(":") or None
    if host.count(":") != 1:
        return host, None
    name, _, port = host.partition(":")
    return name, port or None


def _join_host(host: Element) -> str:
    name, port = host.get("name", ""), host.get("port")
    if port is None:
        return name
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"
