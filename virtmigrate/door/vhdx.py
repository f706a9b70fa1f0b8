# SPDX-License-Identifier: Apache-2.0
"""What a VHDX image may say of itself: [MS-VHDX] has the format."""

import struct
import uuid
from collections.abc import Iterator
from typing import BinaryIO, TypeVar

from virtmigrate.door.excerpt import at
from virtmigrate.door.terms import Refusal

_REGIONS = 192 << 10
_TABLE = 64 << 10
_ENTRY = 32
_MOST = 2047
_METADATA = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")
_BLOCKS = uuid.UUID("2dc27766-f623-4200-9d64-115e9bfd4a08")
_PARAMETERS = uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
_SIZE = uuid.UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
_KNOWN = {
    _PARAMETERS,
    _SIZE,
    uuid.UUID("beca12ab-b2e6-4523-93ef-c309e000c746"),  # page 83 data
    uuid.UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f"),  # logical sector size
    uuid.UUID("cda348c7-445d-4471-9cc9-e9885251c556"),  # physical sector size
}
_HAS_PARENT = 1 << 1

_T = TypeVar("_T")


def virtual_size(image: BinaryIO, length: int) -> int:
    """Return the size that a guest sees, in bytes.

    Arguments:
        length: of the file, in bytes.

    Raises Refusal.
    """
    regions = _regions(image)
    if set(regions) != {_METADATA, _BLOCKS}:
        raise Refusal("has other regions than those of blocks and metadata")
    for place, size in regions.values():
        if place + size > length:
            raise Refusal("ends before its regions do: it is cut short")
    items = _items(image, regions[_METADATA][0])
    if not {_PARAMETERS, _SIZE} <= set(items) <= _KNOWN:
        raise Refusal("has metadata that is not known here, or lacks its size")
    block, flags = struct.unpack("<II", at(image, items[_PARAMETERS], 8))
    if flags & ~1:
        raise Refusal("has a parent" if flags & _HAS_PARENT else "has unknown flags")
    (size,) = struct.unpack("<Q", at(image, items[_SIZE], 8))
    _check_blocks(size, block, regions[_BLOCKS][1])
    return int(size)


# Private


def _regions(image: BinaryIO) -> dict[uuid.UUID, tuple[int, int]]:
    table = at(image, _REGIONS, _TABLE)
    magic, _, count = struct.unpack("<4sII", table[:12])
    if magic != b"regi":
        raise Refusal("has no table of regions")
    return _unique(
        (key, struct.unpack("<QI", rest[:12])) for key, rest in _rows(table, 16, count)
    )


def _items(image: BinaryIO, place: int) -> dict[uuid.UUID, int]:
    table = at(image, place, _TABLE)
    magic, _, count = struct.unpack("<8sHH", table[:12])
    if magic != b"metadata":
        raise Refusal("has no table of metadata")
    return _unique(
        (key, place + struct.unpack("<I", rest[:4])[0])
        for key, rest in _rows(table, 32, count)
    )


def _rows(table: bytes, start: int, count: int) -> Iterator[tuple[uuid.UUID, bytes]]:
    if count > min(_MOST, (len(table) - start) // _ENTRY):
        raise Refusal(f"has a table of {count} entries")
    for offset in range(start, start + count * _ENTRY, _ENTRY):
        row = table[offset : offset + _ENTRY]
        yield uuid.UUID(bytes_le=row[:16]), row[16:]


def _unique(rows: Iterator[tuple[uuid.UUID, _T]]) -> dict[uuid.UUID, _T]:
    found: dict[uuid.UUID, _T] = {}
    for key, value in rows:
        if key in found:
            raise Refusal(f"has two entries of {key}")
        found[key] = value
    return found


def _check_blocks(size: int, block: int, table: int) -> None:
    if not 1 << 20 <= block <= 256 << 20 or block & (block - 1):
        raise Refusal(f"has blocks of {block} bytes")
    if size // block * 8 > table:
        raise Refusal(f"has a table of {table} bytes for {size} bytes")
