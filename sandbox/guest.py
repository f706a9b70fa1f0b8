# SPDX-License-Identifier: Apache-2.0
"""The sandbox's guest: its disk image, its counter on disk, its beats.

Once a second the guest appends a record to each of its disks, and then says so
on the serial console (guest-init.sh). What it wrote can be checked from outside:
record N lies in sector N - 1 of its area, whatever happened to the disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sandbox import imagebuild, process

SECTOR = 512
CHUNK = 1024 * 1024
PLAIN_START = 1024 * 1024  # of the area, on a disk without partitions
LINE = 64  # bytes; a record is one line, repeated
MAGIC = b"VMBEAT1"
RECORD = re.compile(rb"(VMBEAT1 (\d{10}) (\d{6})) ([0-9a-f]{37})\n")
BEAT = re.compile(r"^BEAT (\d+) ([0-9a-f]{37})((?: \w+=\w+)*)\s*$", re.MULTILINE)
BOOT = re.compile(r"^BOOT (\d+)\s*$", re.MULTILINE)
DISK = re.compile(r"^DISK (\w+) (\d+)\s*$", re.MULTILINE)
CACHE = Path(__file__).parent.parent / ".cache/guest"


@dataclasses.dataclass(frozen=True)
class GuestImage:
    """A raw disk image that boots by itself."""

    path: Path

    @property
    def size(self) -> int:
        """The virtual size, in bytes."""
        return self.path.stat().st_size

    def copy(self, target: Path) -> None:
        """Copy it, with its holes, to a new file."""
        process.run(["cp", "--sparse=always", self.path, target])


@dataclasses.dataclass(frozen=True)
class CounterLog:
    """What a guest's records on one disk say."""

    first: int  # counter of the first valid record, 0 when there is none
    last: int  # counter of the last valid record, 0 when there is none
    boots: int  # how often the guest was booted with this disk
    problems: list[str]  # lost, doubled, torn, or out of order records


@dataclasses.dataclass(frozen=True)
class Beat:
    """One line of the serial console: what was on disk when it was printed."""

    number: int  # the counter on the first disk
    checksum: str
    disks: dict[str, int]  # the counter on each further disk, by its name


def image(cache: Path = CACHE) -> GuestImage:
    """Return the guest's image, built when its inputs changed."""
    return GuestImage(imagebuild.build(cache))


def beats(console: Path) -> list[Beat]:
    """Return the beats in a log of the serial console."""
    return [
        Beat(int(number), checksum, further_disks(rest))
        for number, checksum, rest in BEAT.findall(read_console(console))
    ]


def boots(console: Path) -> list[int]:
    """Return with which number the guest went on at each boot."""
    return [int(number) for number in BOOT.findall(read_console(console))]


def disks(console: Path) -> dict[str, int]:
    """Return the sizes in bytes of the guest's disks, as it last saw them."""
    return {name: int(size) for name, size in DISK.findall(read_console(console))}


def verify(disk: Path | BinaryIO, start: int | None = None) -> CounterLog:
    """Check the guest's records on a raw disk.

    Arguments:
      disk: a path, or a file open for reading and seeking.
      start: where the records begin; None finds partition 2, or 1 MiB.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(disk, Path):
            disk = stack.enter_context(disk.open("rb"))
        begin, end = area(disk)
        return check(sectors(disk, start if start is not None else begin, end))


# Private


def read_console(path: Path) -> str:
    return path.read_text(errors="replace").replace("\r", "")


def further_disks(text: str) -> dict[str, int]:
    pairs = (word.split("=") for word in text.split())
    return {name: int(number) for name, number in pairs if number.isdigit()}


def area(disk: BinaryIO) -> tuple[int, int | None]:
    """Return where records begin and end (None: with the disk)."""
    disk.seek(0)
    table = disk.read(SECTOR)
    if table[510:512] == b"\x55\xaa":
        first, count = struct.unpack("<II", table[470:478])
        if count:
            return first * SECTOR, (first + count) * SECTOR
    return PLAIN_START, None


def sectors(disk: BinaryIO, start: int, end: int | None) -> Iterator[tuple[int, bytes]]:
    """Yield number and content of the sectors of an area that are not zero."""
    disk.seek(start)
    position = start
    while end is None or position < end:
        size = CHUNK if end is None else min(CHUNK, end - position)
        chunk = disk.read(size)
        if not chunk:
            return
        if chunk.count(0) != len(chunk):
            yield from parts(chunk, (position - start) // SECTOR)
        position += len(chunk)


def parts(chunk: bytes, number: int) -> Iterator[tuple[int, bytes]]:
    for offset in range(0, len(chunk), SECTOR):
        content = chunk[offset : offset + SECTOR]
        if content.count(0) != len(content):
            yield number + offset // SECTOR, content


def parse(content: bytes) -> tuple[int, int] | None:
    """Return counter and boot of a whole record, or None."""
    match = RECORD.fullmatch(content[:LINE])
    if match is None or content != content[:LINE] * (SECTOR // LINE):
        return None
    if hashlib.sha256(match[1]).hexdigest()[:37].encode() != match[4]:
        return None
    return int(match[2]), int(match[3])


class Checker:
    """Takes records in the order of their sectors and notes what is wrong."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.counters: list[int] = []
        self._seen: set[int] = set()
        self._boot = 0
        self._boots = 0
        self._next = 0  # the sector after the last one that held something

    def add(self, sector: int, content: bytes) -> None:
        """Take the content of the next sector that is not zero."""
        for missing in range(self._next, sector):
            self.problems.append(f"lost: record {missing + 1}")
        self._next = sector + 1
        record = parse(content)
        if record is None:
            self.problems.append(f"torn: record {sector + 1}")
            return
        self._check_counter(sector, record[0])
        self._check_boot(*record)

    def result(self) -> CounterLog:
        """Return what was found."""
        counters = self.counters or [0]
        return CounterLog(counters[0], counters[-1], self._boots, self.problems)

    def _check_counter(self, sector: int, counter: int) -> None:
        if counter in self._seen:
            self.problems.append(f"doubled: record {counter} in place {sector + 1}")
        elif counter != sector + 1:
            self.problems.append(f"out of order: {counter} in place {sector + 1}")
        self._seen.add(counter)
        self.counters.append(counter)

    def _check_boot(self, counter: int, boot: int) -> None:
        if boot not in (self._boot, self._boot + 1):
            self.problems.append(
                f"out of order: boot {boot} after {self._boot} at record {counter}"
            )
        self._boot = boot
        self._boots = max(self._boots, boot)


def check(found: Iterator[tuple[int, bytes]]) -> CounterLog:
    checker = Checker()
    for sector, content in found:
        checker.add(sector, content)
    return checker.result()
