# SPDX-License-Identifier: Apache-2.0
"""Reading a place of an image: all of it, or a refusal."""

from typing import BinaryIO

from virtmigrate.door.terms import Refusal

_FURTHEST = (1 << 63) - 1
"""The last offset that a file of Linux can have."""


def at(image: BinaryIO, offset: int, count: int) -> bytes:
    """Return count bytes from an offset. Raises Refusal where the file is shorter."""
    if offset > _FURTHEST - count:
        raise Refusal("ends before its header does: it is cut short")
    image.seek(offset)
    data = image.read(count)
    if len(data) < count:
        raise Refusal("ends before its header does: it is cut short")
    return data
