# SPDX-License-Identifier: Apache-2.0
"""The header of a qcow2 file: what it may not say, and what it is made to say.

The one exception to "never probe": a domain's XML cannot say that there is no file
for the data, so QEMU takes the header's word. That look refuses, and decides nothing
else: the chain and the size come from records, whatever the header says of them. What
a new layer says of the one below is written for people and their tools.

The layout is that of docs/interop/qcow2.txt in QEMU.
"""

import struct
from collections.abc import Iterator

from virtmigrate.units import KiB, round_up

HEADER = 104
"""Bytes of a file that are looked at: a header of version 3 without extensions."""

CLUSTER = 64 * KiB
"""Bytes of a cluster, as qemu-img makes them: a header ends within the first."""

_MAGIC = b"QFI\xfb"
_VERSION_2 = b"\0\0\0\2"
"""It has no features: where they would be lies anything."""
_DATA_FILE = 1 << 2
"""The incompatible feature by which the data lies in another file."""
_VERSION_3 = b"\0\0\0\3"
_LENGTH = 100
"""Where the length of the header itself stands."""
_BACKING_FORMAT = 0xE2792ACA
_MAPPED = CLUSTER * (CLUSTER // 8)
"""Bytes of a disk whose places one table holds."""
_COUNT_ORDER = 4
"""Reference counts of two bytes."""
_COUNTED = CLUSTER // 2
"""Clusters whose counts one cluster holds."""
_SPARE = 16
_LONGEST = 1023
"""Bytes of a backing file's name."""


def size(head: bytes) -> int:
    """Return the virtual size that a header says."""
    return int.from_bytes(head[24:32], "big")


def objection(head: bytes) -> str | None:
    """Return why a file that begins so is not taken in as qcow2; None if it may be."""
    if len(head) < HEADER or not head.startswith(_MAGIC):
        return "is no qcow2"
    features = int.from_bytes(head[72:80], "big")
    if head[4:8] != _VERSION_2 and features & _DATA_FILE:
        return "names a file for its data"
    return None


def with_backing(head: bytes, path: str, fmt: str) -> bytes:
    """Return the first cluster of a new layer, with what it stands on.

    Arguments:
        head: the first cluster of a qcow2 file that stands on nothing, and that no
            guest has written to.

    Raises ValueError for any other, and for a path that is too long.
    """
    fresh = head.startswith(_MAGIC + _VERSION_3) and not any(head[8:20])
    if not fresh or len(head) != CLUSTER:
        raise ValueError("it is no new qcow2 file")
    return _restated(head, path, fmt)


def restated(head: bytes, path: str, fmt: str) -> bytes:
    """Return the first cluster of a layer, with what it stands on now.

    Nothing else of it changes: what is behind it is not looked at.

    Arguments:
        head: the first cluster of a qcow2 file that nobody has open.

    Raises ValueError for a file of another version, or of other clusters than
    qemu-img makes, and for a path that is too long.
    """
    is_ours = head.startswith(_MAGIC + _VERSION_3) and len(head) == CLUSTER
    if not is_ours or 1 << int.from_bytes(head[20:24], "big") != CLUSTER:
        raise ValueError(f"it is no qcow2 file of version 3 with clusters of {CLUSTER}")
    return _restated(head, path, fmt)


def blank(size: int) -> bytes:
    """Return the first clusters of a file of this virtual size that holds nothing.

    It stands on nothing by its own word, and on what the XML says.
    """
    entries = -(-size // _MAPPED)
    tables = max(1, -(-8 * entries // CLUSTER))
    fields = struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        _MAGIC,
        3,
        *(0, 0),  # of a backing file
        CLUSTER.bit_length() - 1,
        size,
        0,  # encryption
        *(entries, 3 * CLUSTER),  # the table of tables
        *(CLUSTER, 1),  # the table of reference counts
        *(0, 0),  # snapshots
        *(0, 0, 0),  # features
        _COUNT_ORDER,
        HEADER,
    )
    counts = struct.pack(">H", 1) * (3 + tables)
    parts = (fields, struct.pack(">Q", 2 * CLUSTER), counts, b"")
    found = b"".join(each.ljust(CLUSTER, b"\0") for each in parts)
    return found.ljust((3 + tables) * CLUSTER, b"\0")


def longest(size: int) -> int:
    """Return the bytes of a file that has all of a virtual size written to it."""
    data = -(-size // CLUSTER)
    tables = -(-size // _MAPPED)
    used = data + tables + len(blank(size)) // CLUSTER
    # Counts of clusters that are counted, and a few that are given up for others.
    return CLUSTER * (used + -(-used // _COUNTED) + _SPARE)


# Private


def _restated(head: bytes, path: str, fmt: str) -> bytes:
    start = int.from_bytes(head[_LENGTH : _LENGTH + 4], "big")
    kept = b"".join(
        head[at:end] for kind, at, end in _extensions(head) if kind != _BACKING_FORMAT
    )
    listed = _extension(_BACKING_FORMAT, fmt.encode()) + kept + _extension(0, b"")
    name, end = path.encode(), start + len(listed)
    if len(name) > _LONGEST or end + len(name) > CLUSTER:
        raise ValueError(f"{path} is too long for the header of a layer")
    where = end.to_bytes(8, "big") + len(name).to_bytes(4, "big")
    written = head[:8] + where + head[20:start] + listed + name
    return written.ljust(CLUSTER, b"\0")


def _extensions(head: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield the kind of each extension, where it begins, and where it ends."""
    at = int.from_bytes(head[_LENGTH : _LENGTH + 4], "big")
    while any(head[at : at + 4]):
        length = int.from_bytes(head[at + 4 : at + 8], "big")
        end = at + 8 + round_up(length, 8)
        if end + 8 > len(head):
            raise ValueError("its header has no end")
        yield int.from_bytes(head[at : at + 4], "big"), at, end
        at = end


def _extension(kind: int, data: bytes) -> bytes:
    padded = data.ljust(round_up(len(data), 8), b"\0")
    return kind.to_bytes(4, "big") + len(data).to_bytes(4, "big") + padded
