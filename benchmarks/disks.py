# SPDX-License-Identifier: Apache-2.0
"""Disks to move, the same in every run."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import blake3

from benchmarks import errors
from sandbox import process
from virtmigrate.units import MiB


@dataclass(frozen=True)
class Disk:
    """One file on the source, and what it is called at the peer."""

    path: Path
    size: int

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def is_sparse(self) -> bool:
        return self.path.stat().st_blocks * 512 < self.size


def noise(seed: object, length: int) -> bytes:
    """Return bytes that look random: BLAKE3 gives more than a disk takes."""
    return blake3.blake3(str(seed).encode()).digest(length=length)


def write(path: Path, size: int, runs: Iterable[tuple[int, int]], seed: str) -> Disk:
    """Make a disk of holes, with noise in the runs (offset, length)."""
    with path.open("wb") as file:
        file.truncate(size)
        for offset, length in runs:
            _fill(path, file.fileno(), offset, length, seed)
    return Disk(path, size)


def dense(path: Path, size: int, seed: str = "dense") -> Disk:
    """Make a disk full of noise."""
    return write(path, size, [(0, size)], seed)


def places(size: int, count: int, length: int, seed: str) -> list[tuple[int, int]]:
    """Choose runs that begin at multiples of their length and don't touch twice."""
    chosen = random.Random(seed).sample(range(size // length), count)
    return [(number * length, length) for number in sorted(chosen)]


def spread(size: int, count: int, length: int, seed: str) -> list[tuple[int, int]]:
    """Choose runs, one in each equal part of the disk, at whole MiB."""
    part, rng = size // count, random.Random(seed)
    room = max(1, (part - length) // MiB)
    return [(n * part + rng.randrange(room) * MiB, length) for n in range(count)]


def change(
    path: Path, runs: Iterable[tuple[int, int]], seed: str
) -> list[tuple[int, bytes]]:
    """Write noise into the runs, and return what was there."""
    with path.open("r+b", buffering=0) as file:
        before = []
        for offset, length in runs:
            file.seek(offset)
            before.append((offset, file.read(length)))
            file.seek(offset)
            file.write(noise(f"{seed} {offset}", length))
    return before


def put_back(path: Path, before: Iterable[tuple[int, bytes]]) -> None:
    """Write what change() returned."""
    with path.open("r+b", buffering=0) as file:
        for offset, data in before:
            file.seek(offset)
            file.write(data)


def layer(path: Path, base: Disk, size: int) -> Disk:
    """Make a qcow2 layer over a base, with size bytes written in it."""
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b"]
    process.run([*create, base.path, path])
    data = path.with_suffix(".data")
    dense(data, size, "layer")
    try:
        write = f"write -q -s {data} 0 {size}"
        process.run(["qemu-io", "-f", "qcow2", "-c", write, path])
    finally:
        data.unlink()
    return Disk(path, path.stat().st_size)


def compare(source: Path, copy: Path) -> None:
    """Raise BenchmarkError unless two files are equal, as cmp says."""
    if _is_hole(source) and _is_hole(copy):
        # cmp would read terabytes of zeros.
        if source.stat().st_size != copy.stat().st_size:
            raise errors.BenchmarkError(f"{copy} is not as long as {source}")
        return
    done = subprocess.run(["cmp", source, copy], capture_output=True, text=True)
    if done.returncode:
        raise errors.BenchmarkError(f"a copy differs: {done.stdout}{done.stderr}")


def _is_hole(path: Path) -> bool:
    """Tell whether a file holds no data at all."""
    with path.open("rb") as file:
        try:
            os.lseek(file.fileno(), 0, os.SEEK_DATA)
        except OSError as e:
            return e.errno == errno.ENXIO
    return False


def _fill(path: Path, fd: int, offset: int, length: int, seed: str) -> None:
    with open(fd, "r+b", buffering=0, closefd=False) as file:
        for start, data in _pieces(offset, length, seed):
            file.seek(start)
            if file.write(data) != len(data):
                raise errors.BenchmarkError(f"there is no room for {path}")


def _pieces(offset: int, length: int, seed: str) -> Iterator[tuple[int, bytes]]:
    for start in range(offset, offset + length, MiB):
        size = min(MiB, offset + length - start)
        yield start, noise(f"{seed} {start}", size)
