# SPDX-License-Identifier: Apache-2.0
"""What a VMDK image may say of itself.

One file that begins with its header: monolithicSparse and streamOptimized. Without a
capacity in the header QEMU takes the extents from the descriptor; and it takes a parent
from that, however long the header says that it is.
"""

import struct
from typing import BinaryIO, NamedTuple

from virtmigrate.door.excerpt import at
from virtmigrate.door.terms import Refusal

_HEADER = struct.Struct("<4sIIQQQQIQQQ")
_SECTOR = 512
_DESCRIPTOR = 512
"""Offset of the descriptor."""
_READ_BY_QEMU = 20 * _SECTOR
"""Bytes of it in which QEMU looks for a parent, however long it is said to be."""
_LONGEST = 1 << 20
_FOOTER = 3 * _SECTOR
"""Bytes at the end: a marker, the footer, a marker."""
_AT_END = (1 << 64) - 1
_NO_PARENT = b"ffffffff"
_LARGEST_GRAIN = 1 << 21
_ENTRIES = 512
_DIRECTORY = 64 << 20
"""Bytes that QEMU may be made to read; 64 KiB to a grain, they suffice for 512 TiB."""


class _Header(NamedTuple):
    magic: bytes
    version: int
    flags: int
    capacity: int
    """This and the next three in sectors."""
    grain: int
    descriptor: int
    descriptor_length: int
    entries: int
    """Grains in a table."""
    backup_directory: int
    """This and the next two in sectors."""
    directory: int
    overhead: int


def virtual_size(image: BinaryIO, length: int) -> int:
    """Return the size that a guest sees, in bytes.

    Arguments:
        length: of the file, in bytes.

    Raises Refusal.
    """
    header = _header(at(image, 0, _HEADER.size))
    _check_parent(image, header.descriptor_length * _SECTOR, length)
    if header.directory == _AT_END:
        # The footer takes the header's place, in all that it says.
        footer = _header(at(image, max(length - _FOOTER, 0) + _SECTOR, _HEADER.size))
        if footer[:8] != header[:8]:
            raise Refusal("has a footer that says something else than its header")
        header = footer
    _check_directory(header, length)
    return header.capacity * _SECTOR


# Private


def _header(data: bytes) -> _Header:
    header = _Header(*_HEADER.unpack(data))
    if header.magic != b"KDMV":
        raise Refusal("is no single file of VMDK: it would name others")
    if not header.capacity:
        raise Refusal("has no capacity in its header: its descriptor would name files")
    return header


def _check_parent(image: BinaryIO, said: int, length: int) -> None:
    count = min(max(said, _READ_BY_QEMU), _LONGEST, max(length - _DESCRIPTOR, 0))
    text = at(image, _DESCRIPTOR, count).lower()
    if b"parentfilenamehint" in text:
        raise Refusal("names a parent")
    _, found, parent = text.partition(b"parentcid=")
    if found and not parent.startswith(_NO_PARENT):
        raise Refusal("has a parent")


def _check_directory(header: _Header, length: int) -> None:
    if not 0 < header.grain <= _LARGEST_GRAIN or not 0 < header.entries <= _ENTRIES:
        raise Refusal(
            f"has {header.entries} grains of {header.grain} sectors in a table"
        )
    size = -(-header.capacity // (header.grain * header.entries)) * 4
    if size > _DIRECTORY:
        raise Refusal(f"claims a grain directory of {size} bytes")
    if header.directory * _SECTOR + size > length:
        raise Refusal("ends before its grain directory does: it is cut short")
