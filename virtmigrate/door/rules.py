# SPDX-License-Identifier: Apache-2.0
"""The look itself: whether a file is what was declared, and safe to use.

oslo.utils tells the formats that a file could be taken for, and checks what it knows of
each; our own checks of the declared one come on top. Everything that is neither known
nor needed is refused. Only the process of __main__ runs this on what strangers wrote.
"""

import os
import struct
from collections.abc import Callable, Iterator
from typing import IO, BinaryIO, cast

from oslo_utils.imageutils import format_inspector

from virtmigrate.door import qcow2, vdi, vhd, vhdx, vmdk
from virtmigrate.door.terms import Found, Limits, Refusal
from virtmigrate.units import MiB, format_bytes

KINDS: dict[str, Callable[[BinaryIO, int], int]] = {
    "qcow2": qcow2.virtual_size,
    "vmdk": vmdk.virtual_size,
    "vdi": vdi.virtual_size,
    "vhd": vhd.virtual_size,
    "vhdx": vhdx.virtual_size,
}
"""The formats with a header, and what reads theirs."""

ALLOWED = {
    "raw": {"raw", "gpt", "iso"},
    "iso": {"iso", "gpt"},
    **{kind: {kind} for kind in KINDS},
}
"""What the bytes may look like, for each declared format.

gpt is any table of partitions: a disk has one, and a bootable ISO may.
"""


def examine(image: BinaryIO, declared: str, limits: Limits) -> Found:
    """Return what an image is. Raises Refusal."""
    if declared not in limits.formats or declared not in ALLOWED:
        raise Refusal(f"images of format {declared} are not taken")
    length = os.fstat(image.fileno()).st_size
    _check_size("file", length, limits)
    _check_looks(image, declared)
    if declared not in KINDS:
        return Found(declared, length)
    size = KINDS[declared](image, length)
    _check_size("disk", size, limits)
    if size % _SECTOR:
        # Some drivers of QEMU round down, others up.
        raise Refusal(f"its disk has {size} bytes, which are no whole sectors")
    return Found(declared, size)


# Private

_SECTOR = 512
_FINE = 4096
"""Bytes that are handed on at a time: oslo.utils loses what spans too much at once."""
_FINE_PART = 16 * MiB
"""Bytes at the start that are read so; no header lies behind them."""
_COARSE = MiB
_UNKNOWN_TO_OSLO = {
    b"COWD": "vmdk (COWD)",
    b"WithoutFreeSpace": "parallels",
    b"WithouFreSpacExt": "parallels",
    b"Bochs Virtual HD Image": "bochs",
}


def _check_size(what: str, size: int, limits: Limits) -> None:
    if size <= 0:
        raise Refusal(f"its {what} has no bytes")
    if size > limits.max_size:
        raise Refusal(
            f"its {what} has {format_bytes(size)}, more than image_max_size_gib "
            f"({format_bytes(limits.max_size)})"
        )


def _check_looks(image: BinaryIO, declared: str) -> None:
    """Compare what the bytes look like with what was declared."""
    found = _inspectors(image)
    names = {each.NAME for each in found} | _magic(image)
    if not names <= ALLOWED[declared]:
        seen = " and ".join(sorted(names - {"raw"} or names))
        raise Refusal(f"was declared as {declared} and looks like {seen}")
    if declared == "iso" and "iso" not in names:
        raise Refusal("was declared as iso and is none")
    if declared in KINDS:
        _check_safety(found[0])


def _inspectors(image: BinaryIO) -> list[format_inspector.FileInspector]:
    wrapper = format_inspector.InspectWrapper(cast(IO[bytes], _chunks(image)))
    for _ in wrapper:
        if wrapper.formats is not None:
            break
    return list(wrapper.formats or [])


def _chunks(image: BinaryIO) -> Iterator[bytes]:
    image.seek(0)
    while chunk := image.read(_FINE if image.tell() < _FINE_PART else _COARSE):
        yield chunk


def _magic(image: BinaryIO) -> set[str]:
    image.seek(0)
    head = image.read(64)
    return {name for magic, name in _UNKNOWN_TO_OSLO.items() if head.startswith(magic)}


def _check_safety(inspector: format_inspector.FileInspector) -> None:
    try:
        inspector.safety_check()
    except format_inspector.SafetyCheckFailed as e:
        reasons = "; ".join(str(each) for each in e.failures.values())
        raise Refusal(f"{inspector.NAME}: {reasons}") from e
    except (format_inspector.ImageFormatError, struct.error) as e:
        raise Refusal(f"{inspector.NAME}: {e}") from e
