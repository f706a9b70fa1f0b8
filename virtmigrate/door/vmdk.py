# SPDX-License-Identifier: Apache-2.0
"""What a VMDK image may say of itself.

One file that begins with its header: monolithicSparse and streamOptimized. oslo.utils
reads the descriptor as far as the header says that it goes. QEMU reads on, takes a
parent from it, and takes the descriptor's extents when the header has no capacity.
"""

import os
import struct
from typing import BinaryIO

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
_TABLES = 64 << 20
"""Bytes of grain directory that QEMU may be made to read; 16 TiB need as many."""


def virtual_size(image: BinaryIO, length: int) -> int:
    """Return the size that a guest sees, in bytes.

    Arguments:
        length: of the file, in bytes.

    Raises Refusal.
    """
    header = _header(at(image, 0, _HEADER.size))
    _check_parent(image, header[6] * _SECTOR, length)
    if header[9] == _AT_END:
        # The footer takes the header's place, in all that it says.
        footer = _header(at(image, max(length - _FOOTER, 0) + _SECTOR, _HEADER.size))
        if footer[3:8] != header[3:8]:
            raise Refusal("has a footer that says something else than its header")
        header = footer
    _check_tables(header, length)
    return header[3] * _SECTOR


# Private


def _header(data: bytes) -> tuple[int, ...]:
    magic, *fields = _HEADER.unpack(data)
    if magic != b"KDMV":
        raise Refusal("is no single file of VMDK: it would name others")
    if not fields[2]:
        raise Refusal("has no capacity in its header: its descriptor would name files")
    return (0, *fields)


def _check_parent(image: BinaryIO, said: int, length: int) -> None:
    count = min(max(said, _READ_BY_QEMU), _LONGEST, max(length - _DESCRIPTOR, 0))
    text = at(image, _DESCRIPTOR, count).lower()
    if b"parentfilenamehint" in text:
        raise Refusal("names a parent")
    _, found, parent = text.partition(b"parentcid=")
    if found and not parent.startswith(_NO_PARENT):
        raise Refusal("has a parent")


def _check_tables(header: tuple[int, ...], length: int) -> None:
    _, _, _, capacity, grain, _, _, entries, _, directory, _ = header
    if not 0 < grain <= 1 << 21 or not 0 < entries <= 512:
        raise Refusal(f"has grains of {grain} sectors, {entries} in a table")
    size = -(-capacity // (grain * entries)) * 4
    if size > _TABLES or directory * _SECTOR + size > length + os.sysconf(
        "SC_PAGESIZE"
    ):
        raise Refusal(f"claims a grain directory of {size} bytes that is not there")
