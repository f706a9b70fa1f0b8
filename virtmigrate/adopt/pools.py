# SPDX-License-Identifier: Apache-2.0
"""The host's pools over the directories of adopted files."""

import contextlib
from collections.abc import Iterator

import blake3
import libvirt
from lxml import etree

from virtmigrate import xml
from virtmigrate.host import Host

FILES = ("dir", "fs", "netfs")
"""Types of pools whose volumes are the files of one directory."""


class Pools:
    """Finds and makes pools by their directory. Safe to share between threads."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def over(self, directory: str) -> str | None:
        """Return the name of an active pool over a directory."""
        flags = libvirt.VIR_CONNECT_LIST_STORAGE_POOLS_ACTIVE
        return next(self._at(directory, flags), None)

    def asleep(self, directory: str) -> str | None:
        """Return the name of somebody's inactive pool over it; none may be added."""
        flags = libvirt.VIR_CONNECT_LIST_STORAGE_POOLS_INACTIVE
        names = (each for each in self._at(directory, flags) if each != name(directory))
        return next(names, None) if self.over(directory) is None else None

    def make(self, directory: str) -> str:
        """Define a pool over a directory that is there, start it, return its name.

        Nothing is built, so the directory keeps its owner and mode.
        """
        called = name(directory)
        with self._host.session(f"making pool {called}", pool=called) as session:
            pool = _find(session.conn, called)
            pool = pool or session.conn.storagePoolDefineXML(_xml(directory), 0)
            if not pool.isActive():
                pool.create(0)
            pool.setAutostart(1)
        return called

    def remove(self, directory: str) -> None:
        """Forget a pool that `make` made; the directory stays."""
        called = name(directory)
        with self._host.session(f"removing pool {called}", pool=called) as session:
            pool = _find(session.conn, called)
            if pool is not None:
                with contextlib.suppress(libvirt.libvirtError):
                    pool.destroy()
                pool.undefine()

    # Private

    def _at(self, directory: str, flags: int) -> Iterator[str]:
        with self._host.session("listing pools") as session:
            pools = session.conn.listAllStoragePools(flags)
            described = {pool.name(): pool.XMLDesc(0) for pool in pools}
        for called, text in sorted(described.items()):
            root = xml.parse(text)
            path = root.findtext("target/path") or ""
            if root.get("type") in FILES and path.rstrip("/") == directory:
                yield called


def name(directory: str) -> str:
    """Return the name of our pool over a directory."""
    return f"virtmigrate-adopted-{blake3.blake3(directory.encode()).hexdigest()[:8]}"


# Private


def _find(conn: "libvirt.virConnect", called: str) -> "libvirt.virStoragePool | None":
    pools = conn.listAllStoragePools(0)
    return next((pool for pool in pools if pool.name() == called), None)


def _xml(directory: str) -> str:
    root = etree.Element("pool", type="dir")
    etree.SubElement(root, "name").text = name(directory)
    etree.SubElement(etree.SubElement(root, "target"), "path").text = directory
    return etree.tostring(root, encoding="unicode")
