# SPDX-License-Identifier: Apache-2.0
"""Directories and volumes as libvirt's XML describes them."""

from dataclasses import dataclass

from virtmigrate import xml


@dataclass(frozen=True)
class Ownership:
    """Who may do what with volumes and directories; None is libvirt's default."""

    uid: int | None = None
    gid: int | None = None
    mode: str = "0600"
    label: str | None = None

    @property
    def directory_mode(self) -> str:
        """The volumes' mode and the x bits: QEMU's user passes through, no more."""
        return f"0{int(self.mode, 8) | 0o111:o}"


@dataclass(frozen=True)
class Volume:
    """A volume that is to be made."""

    name: str
    size: int
    fmt: str
    allocation: int
    """Bytes that it takes at once."""


def directory(name: str, path: str, ownership: Ownership) -> str:
    """Return a dir pool at path."""
    root = xml.element("pool", attributes={"type": "dir"})
    xml.add(root, "name", name)
    target = xml.add(root, "target")
    xml.add(target, "path", path)
    _permit(target, ownership, ownership.directory_mode)
    return xml.write(root)


def logical(name: str, group: str) -> xml.Element:
    """Return a pool of the volumes of a volume group."""
    root = xml.element("pool", attributes={"type": "logical"})
    xml.add(root, "name", name)
    source = xml.add(root, "source")
    xml.add(source, "name", group)
    xml.add(source, "format", type="lvm2")
    xml.add(xml.add(root, "target"), "path", f"/dev/{group}")
    return root


def write(
    volume: Volume, ownership: Ownership, backing: xml.Element | None = None
) -> str:
    """Return a volume over what `backing` says."""
    root = xml.element("volume")
    xml.add(root, "name", volume.name)
    xml.add(root, "capacity", str(volume.size), unit="B")
    xml.add(root, "allocation", str(volume.allocation), unit="B")
    target = xml.add(root, "target")
    xml.add(target, "format", type=volume.fmt)
    if volume.fmt == "qcow2":
        xml.add(target, "compat", "1.1")
    _permit(target, ownership, ownership.mode)
    if backing is not None:
        root.append(backing)
    return xml.write(root)


# Private


def _permit(target: xml.Element, ownership: Ownership, mode: str) -> None:
    permissions = xml.add(target, "permissions")
    xml.add(permissions, "mode", mode)
    for tag, value in (("owner", ownership.uid), ("group", ownership.gid)):
        if value is not None:
            xml.add(permissions, tag, str(value))
    if ownership.label:
        xml.add(permissions, "label", ownership.label)
