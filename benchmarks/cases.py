# SPDX-License-Identifier: Apache-2.0
"""The cases: which disks, moved by which tools."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import disks
from benchmarks.disks import Disk
from benchmarks.own import Moving, Virtmigrate
from benchmarks.place import Place
from benchmarks.tools import Nbdcopy, Rsync, Scp, Tool, VirshPipe, VirshUpload, Work
from virtmigrate.units import GiB, KiB, MiB, TiB


@dataclass(frozen=True)
class Case:
    """Tools that do the same work in turns."""

    tools: Sequence[Tool]
    work: Work
    amount: int = 0
    """Bytes that have to cross the wire at the least; 0 where no figure says so."""
    again: Callable[[], None] = field(default=lambda: None)
    """Makes the peer's side what it was, after each transfer."""


Maker = Callable[["Bench"], "contextlib.AbstractContextManager[Case]"]


@dataclass(frozen=True)
class Bench:
    """Where, and how large: the disks' sizes are divided by `shrink`."""

    place: Place
    shrink: int = 1

    def sized(self, size: int) -> int:
        """Return a size in this run, in whole MiB."""
        return max(MiB, size // self.shrink // MiB * MiB)

    def file(self, name: str) -> Path:
        return self.place.source.file(name)

    @contextlib.contextmanager
    def fresh(
        self, tools: Sequence[Tool], *made: Disk, amount: int = 0
    ) -> Iterator[Case]:
        """A case whose disks are new to the peer; source and copies go afterwards."""
        work = Work(made, self.place.target)
        try:
            yield Case(tools, work, amount, lambda: remove_copies(work))
        finally:
            remove_copies(work)
            for disk in made:
                disk.path.unlink()


def remove_copies(work: Work) -> None:
    for name in [disk.name for disk in work.disks] + list(work.also):
        work.target.file(name).unlink(missing_ok=True)


def peers() -> list[Tool]:
    return [Nbdcopy(), Scp(), Rsync(), VirshPipe(), VirshUpload()]


# The cases of which the others' figures are known


@contextlib.contextmanager
def dense(bench: Bench) -> Iterator[Case]:
    """1 GiB of noise, not verified."""
    disk = disks.dense(bench.file("dense"), bench.sized(GiB))
    with bench.fresh([Virtmigrate(), *peers()], disk, amount=disk.size) as case:
        yield case


@contextlib.contextmanager
def dense_verified(bench: Bench) -> Iterator[Case]:
    """The same, verified by us; nbdcopy verifies nothing."""
    disk = disks.dense(bench.file("dense"), bench.sized(GiB))
    tools = [Moving(), Nbdcopy()]
    with bench.fresh(tools, disk, amount=disk.size) as case:
        yield case


@contextlib.contextmanager
def sparse(bench: Bench) -> Iterator[Case]:
    """8 GiB with 512 MiB in 64 places, not verified.

    Not by virsh-pipe, which carries all 8 GiB, as scp does, in 40 s.
    """
    size, length = bench.sized(8 * GiB), bench.sized(8 * MiB)
    runs = disks.spread(size, 64, length, "sparse")
    disk = disks.write(bench.file("sparse"), size, runs, "sparse")
    tools = [Virtmigrate(), Nbdcopy(), Scp(), Rsync(), VirshUpload()]
    with bench.fresh(tools, disk, amount=64 * length) as case:
        yield case


@contextlib.contextmanager
def back(bench: Bench, count: int, length: int) -> Iterator[Case]:
    """4 GiB of noise, of which the peer has all but the runs that changed."""
    disk = disks.dense(bench.file("return"), bench.sized(4 * GiB))
    work = Work((disk,), bench.place.target, is_fresh=False)
    copy = work.target.file(disk.name)
    try:
        shutil.copyfile(disk.path, copy)
        runs = disks.places(disk.size, count // bench.shrink or 1, length, "changed")
        before = disks.change(disk.path, runs, "changed")
        tools = [Moving(), Rsync(), Rsync(inplace=True)]
        amount = len(runs) * length
        yield Case(tools, work, amount, lambda: disks.put_back(copy, before))
    finally:
        copy.unlink(missing_ok=True)
        disk.path.unlink()


@contextlib.contextmanager
def overlay(bench: Bench) -> Iterator[Case]:
    """A qcow2 layer of 100 MiB over a base of 1 GiB that the peer has."""
    base = disks.dense(bench.file("base"), bench.sized(GiB), "base")
    layer = disks.layer(bench.file("layer"), base, bench.sized(100 * MiB))
    copy = bench.place.target.file(base.name)
    shutil.copyfile(base.path, copy)
    work = Work((layer,), bench.place.target, base=base)
    tools = [Moving(), Nbdcopy(), Scp(), Rsync(), VirshUpload()]
    try:
        yield Case(tools, work, layer.size, lambda: remove_copies(work))
    finally:
        remove_copies(work)
        for path in (copy, base.path, layer.path):
            path.unlink()


@contextlib.contextmanager
def many(bench: Bench) -> Iterator[Case]:
    """8 disks of 128 MiB, beside one disk of the same total."""
    size = bench.sized(128 * MiB)
    made = [disks.dense(bench.file(f"many-{n}"), size, f"{n}") for n in range(8)]
    one = disks.dense(bench.file("one"), 8 * size, "one")
    work = Work(tuple(made), bench.place.target, also=(one.name,))
    tools = [Virtmigrate(), Virtmigrate(name="virtmigrate-one-disk", instead=one)]
    try:
        yield Case([*tools, *peers()], work, 8 * size, lambda: remove_copies(work))
    finally:
        remove_copies(work)
        for disk in (*made, one):
            disk.path.unlink()


# Memory, for any size of disk, and when the peer's disk is slow


@contextlib.contextmanager
def memory(bench: Bench, size: int, data: int) -> Iterator[Case]:
    """A disk of some size with data in 16 places, or none."""
    size, length = bench.sized(size), bench.sized(data) // 16
    runs = disks.spread(size, 16, length, "memory") if data else []
    disk = disks.write(bench.file("memory"), size, runs, "memory")
    with bench.fresh([Virtmigrate()], disk) as case:
        yield case


@contextlib.contextmanager
def slow_disk(bench: Bench) -> Iterator[Case]:
    """256 MiB of noise to a disk that takes it more slowly than the network."""
    disk = disks.dense(bench.file("slow"), bench.sized(256 * MiB), "slow")
    work = Work((disk,), bench.place.slow)
    try:
        with bench.place.slow_disk():
            tools = [Virtmigrate(), VirshUpload()]
            yield Case(tools, work, again=lambda: remove_copies(work))
    finally:
        disk.path.unlink()


CASES: dict[str, Maker] = {
    "dense": dense,
    "dense-verified": dense_verified,
    "sparse": sparse,
    "return": lambda bench: back(bench, 41, MiB),
    "return-4KiB": lambda bench: back(bench, 41 * MiB // (4 * KiB), 4 * KiB),
    "overlay": overlay,
    "many": many,
    "memory-256MiB": lambda bench: memory(bench, 256 * MiB, 256 * MiB),
    "memory-8GiB": lambda bench: memory(bench, 8 * GiB, 512 * MiB),
    "memory-2TiB": lambda bench: memory(bench, 2 * TiB, 0),
    "memory-slow-disk": slow_disk,
}
