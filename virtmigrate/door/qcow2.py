# SPDX-License-Identifier: Apache-2.0
"""What a qcow2 image may say of itself.

Beside what oslo.utils looks at: everything in the header that names, claims or hides
something. docs/interop/qcow2.rst of QEMU is the format.
"""

import struct
from dataclasses import dataclass
from typing import BinaryIO

from virtmigrate.door.excerpt import at
from virtmigrate.door.terms import Refusal

_FIXED = struct.Struct(">4sIQIIQIIQQIIQ")
_MORE = struct.Struct(">QQQII")
_VERSION_2_LENGTH = _FIXED.size
_VERSION_3_LENGTH = _FIXED.size + _MORE.size
_LONGEST = 1024
"""Bytes of a header of version 3; today's writers need 112."""
_COMPRESSION = 1 << 3
_ENTRY = 8
"""Bytes of an entry of the L1 and of the refcount table."""
_REFCOUNT_TABLE = 8 << 20
"""Bytes that QEMU reads of one."""

_DIRTY, _CORRUPT, _DATA_FILE = 1 << 0, 1 << 1, 1 << 2
_LAZY_REFCOUNTS = 1 << 0

_END = 0
_FEATURE_NAMES = 0x6803F857
_REFUSED_EXTENSIONS = {
    0xE2792ACA: "names a format of a backing file",
    0x44415441: "names a file for its data",
    0x0537BE77: "is encrypted",
    0x23852875: "has bitmaps",
}


@dataclass(frozen=True)
class _Header:
    version: int
    backing_offset: int
    backing_length: int
    cluster_bits: int
    size: int
    encryption: int
    l1_entries: int
    l1_offset: int
    refcount_offset: int
    refcount_clusters: int
    snapshots: int
    incompatible: int
    compatible: int
    autoclear: int
    refcount_order: int
    length: int

    @property
    def cluster(self) -> int:
        return 1 << self.cluster_bits


def virtual_size(image: BinaryIO, length: int) -> int:
    """Return the size that a guest sees, in bytes.

    Arguments:
        length: of the file, in bytes.

    Raises Refusal.
    """
    header = _read(image)
    _check_references(header)
    _check_features(image, header)
    _check_shape(header)
    _check_tables(header, length)
    _check_extensions(image, header)
    return header.size


# Private


def _read(image: BinaryIO) -> _Header:
    fixed = _FIXED.unpack(at(image, 0, _FIXED.size))
    version = fixed[1]
    if fixed[0] != b"QFI\xfb" or version not in (2, 3):
        raise Refusal(f"is no qcow2 of version 2 or 3, but {version}")
    more = (0, 0, 0, 4, _VERSION_2_LENGTH)
    if version == 3:
        more = _MORE.unpack(at(image, _FIXED.size, _MORE.size))
    # The offset of snapshots, the last of the fixed fields, means nothing without any.
    return _Header(*(version, *fixed[2:12], *more))


def _check_references(header: _Header) -> None:
    if header.backing_offset or header.backing_length:
        raise Refusal("names a backing file")
    if header.incompatible & _DATA_FILE:
        raise Refusal("names a file for its data")
    if header.encryption:
        raise Refusal("is encrypted")
    if header.snapshots:
        raise Refusal(
            f"has {header.snapshots} snapshots inside, which nobody would see"
        )


def _check_features(image: BinaryIO, header: _Header) -> None:
    if header.incompatible & (_DIRTY | _CORRUPT):
        raise Refusal("says that it was not closed well: repair it before it is sent")
    if unknown := header.incompatible & ~_COMPRESSION:
        raise Refusal(f"needs features that are not known here ({unknown:#x})")
    if unknown := header.compatible & ~_LAZY_REFCOUNTS:
        raise Refusal(f"has features that are not known here ({unknown:#x})")
    if header.autoclear:
        raise Refusal(f"has features that a writer clears ({header.autoclear:#x})")
    if header.incompatible & _COMPRESSION:
        _check_compression(image, header)


def _check_compression(image: BinaryIO, header: _Header) -> None:
    # The next byte after the fixed header: 0 is zlib, 1 is zstd.
    kind = at(image, _VERSION_3_LENGTH, 1)[0]
    if header.length <= _VERSION_3_LENGTH or kind != 1:
        raise Refusal(f"has a compression that is not known here ({kind})")


def _check_shape(header: _Header) -> None:
    if not 9 <= header.cluster_bits <= 21:
        raise Refusal(f"has clusters of 2^{header.cluster_bits} bytes")
    if header.refcount_order > 6:
        raise Refusal(f"has reference counts of 2^{header.refcount_order} bits")
    expected = _VERSION_2_LENGTH, _VERSION_3_LENGTH
    least = expected[header.version - 2]
    if header.length < least or header.length > _LONGEST or header.length % 8:
        raise Refusal(f"has a header of {header.length} bytes")


def _check_tables(header: _Header, length: int) -> None:
    per_table = header.cluster * (header.cluster // _ENTRY)
    needed = -(-header.size // per_table)
    # A writer that lets the table grow takes half as much again.
    allowed = max(2 * needed, header.cluster // _ENTRY)
    if not needed <= header.l1_entries <= allowed:
        raise Refusal(
            f"has an L1 table of {header.l1_entries} entries where {needed} are needed"
        )
    counts = header.refcount_clusters * header.cluster
    if not 0 < counts <= max(_REFCOUNT_TABLE, header.cluster):
        raise Refusal(f"has a refcount table of {counts} bytes")
    for name, offset, size in (
        ("L1 table", header.l1_offset, header.l1_entries * _ENTRY),
        ("refcount table", header.refcount_offset, counts),
    ):
        if offset % header.cluster or (size and not offset):
            raise Refusal(f"says that its {name} lies at {offset}")
        if offset + size > length:
            raise Refusal(f"ends before its {name} does: it is cut short")


def _check_extensions(image: BinaryIO, header: _Header) -> None:
    position = header.length
    while position + 8 <= header.cluster:
        kind, size = struct.unpack(">II", at(image, position, 8))
        if kind == _END:
            return
        if kind in _REFUSED_EXTENSIONS:
            raise Refusal(_REFUSED_EXTENSIONS[kind])
        if kind != _FEATURE_NAMES:
            raise Refusal(f"has a header extension that is not known here ({kind:#x})")
        position += 8 + size + -size % 8
    raise Refusal("has header extensions without an end")
