# SPDX-License-Identifier: Apache-2.0
"""Images for the door: valid ones by qemu-img, hostile ones by what is changed."""

import struct
import subprocess
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from virtmigrate.units import KiB, MiB

SECONDS = 60
SIZE = 768 * KiB
"""Bytes of the disk in a valid image."""

SUBFORMATS = {
    "qcow2": ["qcow2"],
    "qcow2-v2": ["qcow2", "-o", "compat=0.10"],
    "qcow2-zlib": ["qcow2", "-c"],
    "qcow2-zstd": ["qcow2", "-c", "-o", "compression_type=zstd"],
    "qcow2-lazy": ["qcow2", "-o", "lazy_refcounts=on,cluster_size=512"],
    "vmdk": ["vmdk"],
    "vmdk-stream": ["vmdk", "-o", "subformat=streamOptimized"],
    "vdi": ["vdi"],
    "vdi-static": ["vdi", "-o", "static=on"],
    "vhd": ["vpc", "-o", "force_size=on"],
    "vhdx": ["vhdx"],
}
"""What qemu-img is told, by a name that begins with the declared format."""


def declared(name: str) -> str:
    return name.partition("-")[0]


def content() -> bytes:
    """Return a disk with data, zeros, data that repeats, and an end that is data."""
    third = SIZE // 3
    text = b"".join(b"line %d of a disk\n" % number for number in range(20000))
    return text[:third] + bytes(third) + text[: third - 512] + b"\xee" * 512


def qemu_img(*args: object) -> None:
    subprocess.run(
        ["qemu-img", *map(str, args)], check=True, timeout=SECONDS, capture_output=True
    )


def make(directory: Path) -> dict[str, Path]:
    """Make a valid image of each kind."""
    raw = directory / "raw"
    raw.write_bytes(content())
    made = {"raw": raw}
    for name, options in SUBFORMATS.items():
        made[name] = directory / name
        qemu_img("convert", "-f", "raw", "-O", *options, raw, made[name])
    made["vmdk-footer"] = directory / "vmdk-footer"
    made["vmdk-footer"].write_bytes(with_footer(made["vmdk-stream"].read_bytes()))
    made["iso"] = directory / "iso"
    made["iso"].write_bytes(iso())
    return made


def with_footer(data: bytes) -> bytes:
    """Return a streamOptimized VMDK as VMware writes it: a footer has the tables."""
    marker = struct.pack("<QII", 1, 0, 3).ljust(512, b"\0")
    return at(56, "<Q", (1 << 64) - 1)(data) + marker + data[:512] + bytes(512)


def iso(length: int = 64 * KiB) -> bytes:
    """Return the beginning of a file system of a CD."""
    volume = bytearray(2 * KiB)
    volume[:7] = b"\x01CD001\x01"
    struct.pack_into("<L", volume, 80, length // 2048)
    struct.pack_into("<H", volume, 128, 2048)
    return (bytes(32 * KiB) + volume).ljust(length, b"\0")


def partitioned() -> bytes:
    """Return a disk that begins with a table of one partition."""
    table = struct.pack("<B3sB3sII", 0x80, bytes(3), 0x83, bytes(3), 2048, 4096)
    return bytes(446) + table + bytes(48) + b"\x55\xaa" + bytes(MiB)


# Hostile ones


@dataclass(frozen=True)
class Hostile:
    """One image that is refused."""

    name: str
    base: str
    """The valid image that it is made of."""
    change: Callable[[bytes], bytes]
    reason: str
    """Part of the reason that is given."""
    declared: str | None = None
    """Default: the base's format."""

    @property
    def format(self) -> str:
        return self.declared or declared(self.base)


def at(offset: int, fmt: str, *values: int | bytes) -> Callable[[bytes], bytes]:
    """Return what writes values to an offset; behind the end, too."""

    def change(data: bytes) -> bytes:
        changed = bytearray(data)
        new = struct.pack(fmt, *values)
        changed.extend(bytes(max(offset + len(new) - len(changed), 0)))
        changed[offset : offset + len(new)] = new
        return bytes(changed)

    return change


def all_of(*changes: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        for each in changes:
            data = each(data)
        return data

    return change


def short(length: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:length]


def instead(new: bytes) -> Callable[[bytes], bytes]:
    return lambda _: new


def same(data: bytes) -> bytes:
    return data


def replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    """Return what puts something of the same length in the place of something."""

    def change(data: bytes) -> bytes:
        assert old in data and len(old) >= len(new)
        return data.replace(old, new.ljust(len(old), b" "))

    return change


def backing(name: bytes) -> Callable[[bytes], bytes]:
    return all_of(at(8, ">QI", 512, len(name)), at(512, f"{len(name)}s", name))


def extension(kind: int, data: bytes = b"") -> Callable[[bytes], bytes]:
    """Return what puts one extension behind a header of version 3 (112 bytes)."""
    padded = data + bytes(-len(data) % 8)
    return at(112, f">II{len(padded)}sQ", kind, len(data), padded, 0)


EXABYTE = 1 << 60
JSON = b'json:{"driver":"raw","file":{"driver":"file","filename":"/etc/passwd"}}'
INCOMPATIBLE, COMPATIBLE, AUTOCLEAR = 72, 80, 88

QCOW2 = [
    Hostile("backing file", "qcow2", backing(b"/etc/passwd"), "backing file"),
    Hostile("backing file, version 2", "qcow2-v2", backing(b"/etc/passwd"), "backing"),
    Hostile("JSON backing name", "qcow2", backing(JSON), "backing file"),
    Hostile("backing by length", "qcow2", at(16, ">I", 9), "backing file"),
    Hostile("data file", "qcow2", at(INCOMPATIBLE, ">Q", 4), "data"),
    Hostile(
        "data file's name",
        "qcow2",
        extension(0x44415441, b"/etc/passwd"),
        "names a file for its data",
    ),
    Hostile("unknown feature", "qcow2", at(INCOMPATIBLE, ">Q", 32), "features"),
    Hostile("last feature", "qcow2", at(INCOMPATIBLE, ">Q", 1 << 63), "features"),
    Hostile("extended L2", "qcow2", at(INCOMPATIBLE, ">Q", 16), "features"),
    Hostile("dirty", "qcow2", at(INCOMPATIBLE, ">Q", 1), "not closed well"),
    Hostile("corrupt", "qcow2", at(INCOMPATIBLE, ">Q", 2), "not closed well"),
    Hostile("compatible", "qcow2", at(COMPATIBLE, ">Q", 2), "features"),
    Hostile("autoclear", "qcow2", at(AUTOCLEAR, ">Q", 2), "a writer clears"),
    Hostile("AES", "qcow2", at(32, ">I", 1), "is encrypted"),
    Hostile("LUKS", "qcow2", at(32, ">I", 2), "is encrypted"),
    Hostile("LUKS's header", "qcow2", extension(0x0537BE77, bytes(16)), "encrypted"),
    Hostile("snapshots", "qcow2", at(60, ">I", 3), "3 snapshots"),
    Hostile("version 1", "qcow2", at(4, ">I", 1), "version"),
    Hostile("version 4", "qcow2", at(4, ">I", 4), "version"),
    Hostile("exabytes", "qcow2", at(24, ">Q", EXABYTE), "L1 table of"),
    Hostile(
        "exabytes with their L1 table",
        "qcow2",
        at(20, ">IQII", 21, EXABYTE, 0, 1 << 21),
        "L1 table",
    ),
    Hostile("a terabyte too much", "qcow2", at(24, ">Q", 3 << 40), "L1 table of"),
    Hostile("half a sector", "qcow2", at(24, ">Q", MiB - 1), "no whole sectors"),
    Hostile("no size", "qcow2", at(24, ">Q", 0), "no bytes"),
    Hostile("L1 bomb", "qcow2", at(36, ">I", 4 * MiB), "L1 table of 4194304"),
    Hostile("L1 too small", "qcow2", at(36, ">I", 0), "L1 table of 0"),
    Hostile("L1 elsewhere", "qcow2", at(40, ">Q", 1 << 40), "L1 table"),
    Hostile("L1 crooked", "qcow2", at(40, ">Q", 0x30001), "L1 table lies"),
    Hostile("refcount bomb", "qcow2", at(56, ">I", 1 << 31), "refcount table of"),
    Hostile("no refcounts", "qcow2", at(56, ">I", 0), "refcount table of"),
    Hostile("refcounts elsewhere", "qcow2", at(48, ">Q", 1 << 50), "refcount table"),
    Hostile("clusters too big", "qcow2", at(20, ">I", 60), "2^60"),
    Hostile("clusters too small", "qcow2", at(20, ">I", 3), "2^3"),
    Hostile("refcounts too wide", "qcow2", at(96, ">I", 7), "2^7"),
    Hostile("header too short", "qcow2", at(100, ">I", 8), "header of 8"),
    Hostile("header too long", "qcow2", at(100, ">I", 1 << 31), "header of"),
    Hostile("header crooked", "qcow2", at(100, ">I", 105), "header of 105"),
    Hostile("unknown extension", "qcow2", extension(0x12345678), "0x12345678"),
    Hostile("endless extension", "qcow2", at(112, ">II", 0x6803F857, 1 << 31), "end"),
    Hostile("backing's format", "qcow2", extension(0xE2792ACA, b"raw"), "backing"),
    Hostile("bitmaps", "qcow2", extension(0x23852875, bytes(24)), "bitmaps"),
    Hostile(
        "unknown compression",
        "qcow2",
        all_of(at(INCOMPATIBLE, ">Q", 8), at(104, "B", 7)),
        "compression",
    ),
    *(
        Hostile(f"cut to {length}", "qcow2", short(length), reason)
        for length, reason in [
            (0, "no bytes"),
            (4, "looks like raw"),
            (100, "looks like raw"),
            (512, "cut short"),
            (64 * KiB, "cut short"),
        ]
    ),
]


def descriptor(data: bytes) -> bytes:
    """Return the descriptor in a VMDK image."""
    return data[512 : 512 + 20 * 512].partition(b"\0")[0]


def said(line: bytes) -> Callable[[bytes], bytes]:
    """Return what adds a line to a VMDK's descriptor."""

    def change(data: bytes) -> bytes:
        text = descriptor(data) + line + b"\n"
        return at(512, f"{20 * 512}s", text)(data)

    return change


def in_footer(offset: int, value: int) -> Callable[[bytes], bytes]:
    return lambda data: at(len(data) - 1024 + offset, "<Q", value)(data)


FLAT = b"""# Disk DescriptorFile
version=1
CID=12345678
parentCID=ffffffff
createType="monolithicFlat"
RW 8 FLAT "/etc/passwd" 0
"""
TWO_TYPES = b"""# Disk DescriptorFile
parentCID=ffffffff
createtype="monolithicSparse"
createType="monolithicFlat"
RW 8 FLAT "passwd" 0
"""
HINT = b'parentFileNameHint="/etc/passwd"'

VMDK = [
    Hostile("flat", "vmdk", instead(FLAT.ljust(4096, b"\n")), "Unsupported subformat"),
    Hostile(
        "flat in a sparse one",
        "vmdk",
        replaced(b'"monolithicSparse"', b'"monolithicFlat"'),
        "Unsupported subformat",
    ),
    Hostile("foreign extents", "vmdk", said(b'RW 8 FLAT "/etc/passwd" 0'), "extent"),
    Hostile("no capacity", "vmdk", at(12, "<Q", 0), "no capacity"),
    Hostile(
        "two types, and an extent beside it",
        "vmdk",
        all_of(at(12, "<Q", 0), at(512, f"{20 * 512}s", TWO_TYPES)),
        "no capacity",
    ),
    Hostile("parent", "vmdk", said(HINT), "names a parent"),
    Hostile(
        "parent behind the descriptor",
        "vmdk",
        # It is said to end before the name does; QEMU reads on.
        all_of(said(b"\n" * 500 + HINT), at(36, "<Q", 1)),
        "names a parent",
    ),
    Hostile(
        "parent's id",
        "vmdk",
        replaced(b"parentCID=ffffffff", b"parentCID=12345678"),
        "has a parent",
    ),
    Hostile("exabytes", "vmdk", at(12, "<Q", EXABYTE // 512), "grain directory"),
    Hostile("grains", "vmdk", at(20, "<Q", 0), "grains of 0"),
    Hostile("tables", "vmdk", at(44, "<I", 0), "0 grains"),
    Hostile("no extents", "vmdk", replaced(b"RW ", b"#W "), "No extents"),
    Hostile("unknown line", "vmdk", said(b"surprise /etc/passwd"), "Invalid VMDK"),
    Hostile("footer's size", "vmdk-footer", in_footer(12, EXABYTE), "something else"),
    Hostile("footer's table", "vmdk-footer", in_footer(56, 1 << 40), "directory"),
    Hostile("footer's footer", "vmdk-footer", in_footer(56, (1 << 64) - 1), "footer"),
    Hostile("COWD", "vmdk", at(0, "4s", b"COWD"), "looks like"),
    Hostile("cut", "vmdk", short(2048), "incomplete"),
    Hostile("cut tables", "vmdk", short(11000), "grain directory"),
]

NAMELESS = uuid.UUID(int=7).bytes_le
VDI = [
    Hostile("differs from a parent", "vdi", at(0x4C, "<I", 4), "has a parent"),
    Hostile("link", "vdi", at(0x1A8, "16s", NAMELESS), "has a parent"),
    Hostile("parent", "vdi", at(0x1B8, "16s", NAMELESS), "has a parent"),
    Hostile("exabytes", "vdi", at(0x170, "<Q", EXABYTE), "blocks"),
    Hostile(
        "map bomb", "vdi", at(0x170, "<QIII", 1 << 40, MiB, 0, 1 << 20), "block map"
    ),
    Hostile("version", "vdi", at(0x44, "<I", 7), "version"),
    Hostile("cut", "vdi", short(512), "cut short"),
]

VHD = [
    Hostile("differs from a parent", "vhd", at(60, ">I", 4), "type 4"),
    Hostile("fixed", "vhd", at(60, ">I", 2), "type 2"),
    Hostile("parent's id", "vhd", at(512 + 40, "16s", NAMELESS), "has a parent"),
    Hostile("parent's name", "vhd", at(512 + 64, ">16s", b"\0/\0e\0t\0c"), "parent"),
    Hostile("parent's place", "vhd", at(512 + 576, ">4s", b"W2ku"), "has a parent"),
    Hostile("exabytes", "vhd", at(48, ">Q", EXABYTE), "blocks of"),
    Hostile("table bomb", "vhd", at(512 + 28, ">I", 0xFFFFFFFF), "block table"),
    Hostile("header elsewhere", "vhd", at(16, ">Q", (1 << 64) - 1), "cut short"),
    Hostile("no header", "vhd", at(512, "8s", bytes(8)), "no header"),
    Hostile("cut", "vhd", short(700), "cut short"),
]

_PARAMETERS = uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b").bytes_le
_SIZE = uuid.UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8").bytes_le
_PAGE_83 = uuid.UUID("beca12ab-b2e6-4523-93ef-c309e000c746").bytes_le
_LOCATOR = uuid.UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c").bytes_le
_METADATA = 192 * KiB + 16
"""Offset of the first row of the table of regions."""


def item(key: bytes, shift: int, fmt: str, value: int) -> Callable[[bytes], bytes]:
    """Return what changes a value of a VHDX's metadata."""

    def change(data: bytes) -> bytes:
        row = data.index(key, MiB)
        table = data.rindex(b"metadata", 0, row)
        (offset,) = struct.unpack_from("<I", data, row + 16)
        return at(table + offset + shift, fmt, value)(data)

    return change


VHDX = [
    Hostile("parent", "vhdx", item(_PARAMETERS, 4, "<I", 2), "has a parent"),
    Hostile("unknown flags", "vhdx", item(_PARAMETERS, 4, "<I", 8), "unknown flags"),
    Hostile("parent's place", "vhdx", replaced(_PAGE_83, _LOCATOR), "not known"),
    Hostile("exabytes", "vhdx", item(_SIZE, 0, "<Q", EXABYTE), "has a table of"),
    Hostile("blocks", "vhdx", item(_PARAMETERS, 0, "<I", 3), "blocks of 3"),
    Hostile("two sizes", "vhdx", replaced(_PAGE_83, _SIZE), "two entries"),
    Hostile("regions", "vhdx", at(192 * KiB + 8, "<I", 1 << 30), "entries"),
    Hostile("elsewhere", "vhdx", at(_METADATA + 16, "<Q", 1 << 62), "cut short"),
    Hostile("cut", "vhdx", short(MiB), "vhdx"),
]

LUKS = b"LUKS\xba\xbe\x00"
OTHERS = [
    Hostile("qcow2 as raw", "qcow2", same, "looks like qcow2", "raw"),
    Hostile("qcow2 as iso", "qcow2", same, "looks like qcow2", "iso"),
    Hostile("vmdk as raw", "vmdk", same, "looks like vmdk", "raw"),
    Hostile("descriptor as raw", "raw", instead(FLAT * 8), "looks like vmdk", "raw"),
    Hostile("vdi as raw", "vdi", same, "looks like vdi", "raw"),
    Hostile("vhd as raw", "vhd", same, "looks like vhd", "raw"),
    Hostile("vhdx as raw", "vhdx", same, "looks like vhdx", "raw"),
    Hostile("raw as qcow2", "raw", same, "looks like raw", "qcow2"),
    Hostile("raw as iso", "raw", same, "looks like raw", "iso"),
    Hostile("qcow2 as vmdk", "qcow2", same, "looks like qcow2", "vmdk"),
    Hostile("LUKS 1", "raw", at(0, "8s", LUKS + b"\1"), "looks like luks"),
    Hostile("LUKS 2", "raw", at(0, "8s", LUKS + b"\2"), "looks like luks"),
    Hostile("QED", "raw", at(0, "4s", b"QED\0"), "looks like qed"),
    Hostile("parallels", "raw", at(0, "16s", b"WithoutFreeSpace"), "parallels"),
    Hostile("bochs", "raw", at(0, "22s", b"Bochs Virtual HD Image"), "bochs"),
    Hostile(
        "qcow2 and iso", "qcow2", at(32769, "5s", b"CD001"), "looks like iso and qcow2"
    ),
    Hostile("qcow2 and vdi", "qcow2", at(64, "<I", 0xBEDA107F), "qcow2 and vdi"),
    Hostile("iso and vdi", "iso", at(64, "<I", 0xBEDA107F), "iso and vdi"),
    Hostile("qcow2 and disk", "qcow2", at(510, "2s", b"\x55\xaa"), "gpt and qcow2"),
    Hostile("iso and qcow2", "iso", at(0, "4s", b"QFI\xfb"), "iso and qcow2"),
]

HOSTILE = [*QCOW2, *VMDK, *VDI, *VHD, *VHDX, *OTHERS]
