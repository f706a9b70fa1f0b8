# SPDX-License-Identifier: Apache-2.0
"""What the header of a qcow2 file may not say, before its data is believed.

The one exception to "never probe": a domain's XML cannot say that there is no file
for the data, so QEMU takes the header's word. This look refuses, and decides nothing
else: the chain and the size come from records, whatever the header says of them.
"""

HEADER = 104
"""Bytes of a file that are looked at: a header of version 3 without extensions."""

_MAGIC = b"QFI\xfb"
_VERSION_2 = b"\0\0\0\2"
"""It has no features: where they would be lies anything."""
_DATA_FILE = 1 << 2
"""The incompatible feature by which the data lies in another file."""


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
