# SPDX-License-Identifier: Apache-2.0
"""Transient disks in a domain's own configuration: read-only.

What the guest of a transient disk writes goes to a layer, and that stands only in the
XML that it was started with. Whoever starts the domain past us starts it with its own
configuration, which names the disk itself: so that says there that it is read-only.
The metadata says which disks that was done to, and nobody above libvirt sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from virtmigrate import xml
from virtmigrate.domainxml import metadata, tree
from virtmigrate.xml import Element

_KEY = "transient"

_WRITABLE = ("ide", "sata")
"""Buses on which QEMU has no read-only disks."""


def with_transient(text: str, targets: Iterable[str]) -> str:
    """Return a domain's XML whose metadata says that these disks are transient."""
    values = dict(metadata.metadata_of(text) or {})
    wanted = ",".join(sorted(targets))
    if values.pop(_KEY, "") == wanted:
        return text
    return metadata.with_metadata(text, values | ({_KEY: wanted} if wanted else {}))


def guarded(text: str) -> str:
    """Return a configuration whose transient disks cannot be written to."""
    return _changed(text, _guard)


def unguarded(text: str) -> str:
    """Return a configuration as it was before guarded()."""
    return _changed(text, _unguard)


# Private


def _changed(text: str, change: Callable[[Element], None]) -> str:
    if _KEY not in text:
        return text
    root = tree.parse(text)
    targets = (metadata.read(root) or {}).get(_KEY)
    if not targets:
        return text
    for disk in root.findall("devices/disk"):
        if xml.attribute_at(disk, "target", "dev") in targets.split(","):
            change(disk)
    return xml.write(root)


def _guard(disk: Element) -> None:
    bus = xml.attribute_at(disk, "target", "bus")
    if disk.find("readonly") is None and bus not in _WRITABLE:
        xml.add(disk, "readonly")


def _unguard(disk: Element) -> None:
    for each in disk.findall("readonly"):
        xml.remove(each)
