# SPDX-License-Identifier: Apache-2.0
"""What a VDI image may say of itself: block/vdi.c of QEMU has the format."""

import struct
from typing import BinaryIO

from virtmigrate.door.excerpt import at
from virtmigrate.door.terms import Refusal
from virtmigrate.units import MiB

_HEADER = struct.Struct("<64sIIIII256sIIIIIIIQIIII16s16s16s16s")
_SIGNATURE = 0xBEDA107F
_VERSION = 0x00010001
_DYNAMIC, _STATIC = 1, 2
_NONE = bytes(16)


def virtual_size(image: BinaryIO, length: int) -> int:
    """Return the size that a guest sees, in bytes.

    Arguments:
        length: of the file, in bytes.

    Raises Refusal.
    """
    fields = _HEADER.unpack(at(image, 0, _HEADER.size))
    _, signature, version, _, kind, _, _, table, *_ = fields
    size, block, _, blocks, _, _, _, link, parent = fields[14:]
    if signature != _SIGNATURE or version != _VERSION:
        raise Refusal(f"is no VDI of version 1.1, but {version:#x}")
    if kind not in (_DYNAMIC, _STATIC) or link != _NONE or parent != _NONE:
        raise Refusal("has a parent")
    if block != MiB or blocks != -(-size // MiB):
        raise Refusal(f"has {blocks} blocks of {block} bytes for {size} bytes")
    if table + blocks * 4 > length:
        raise Refusal("ends before its block map does: it is cut short")
    return int(size)
