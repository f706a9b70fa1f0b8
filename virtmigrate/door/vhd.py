# SPDX-License-Identifier: Apache-2.0
"""What a VHD image may say of itself: a dynamic one, whose footer stands first, too.

A fixed one is a raw disk with a footer behind it: nothing at its start tells it.
"""

import struct
from typing import BinaryIO

from virtmigrate.door.excerpt import at
from virtmigrate.door.terms import Refusal

_FOOTER = struct.Struct(">8sIIQI4sI4sQQII")
_DYNAMIC = struct.Struct(">8sQQIIII16sII512s192s")
_KIND = 3
"""Dynamic; 2 is fixed, 4 differs from a parent."""


def virtual_size(image: BinaryIO, length: int) -> int:
    """Return the size that a guest sees, in bytes: the current one, not the geometry's.

    Arguments:
        length: of the file, in bytes.

    Raises Refusal.
    """
    footer = _FOOTER.unpack(at(image, 0, _FOOTER.size))
    cookie, _, _, place, *_, size, _, kind = footer
    if cookie != b"conectix":
        raise Refusal("is no dynamic VHD")
    if kind != _KIND:
        raise Refusal(f"is a VHD of type {kind}; only dynamic ones (3) come in")
    header = _DYNAMIC.unpack(at(image, place, _DYNAMIC.size))
    _check(header, size, length)
    return int(size)


# Private


def _check(header: tuple[bytes | int, ...], size: int, length: int) -> None:
    cookie, _, table, _, entries, block, _, parent, _, _, name, locators = header
    if cookie != b"cxsparse":
        raise Refusal("has no header of a dynamic VHD where it says so")
    if any((_bytes(parent), _bytes(name), _bytes(locators))):
        raise Refusal("has a parent")
    blocks, each, place = _number(entries), _number(block), _number(table)
    if each < 512 or each & (each - 1) or blocks * each < size:
        raise Refusal(f"has {blocks} blocks of {each} bytes for {size} bytes")
    if place + blocks * 4 > length:
        raise Refusal("ends before its block table does: it is cut short")


def _bytes(value: bytes | int) -> bytes:
    return value.strip(b"\0") if isinstance(value, bytes) else b"?"


def _number(value: bytes | int) -> int:
    return value if isinstance(value, int) else -1
