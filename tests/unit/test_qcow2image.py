# SPDX-License-Identifier: Apache-2.0
"""Standalone qcow2 images, written from front to end, judged by QEMU's tools."""

import json
import os
import random
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from virtmigrate import qcow2image
from virtmigrate.units import GiB, KiB, MiB

Extents = Sequence[tuple[int, int]]
"""Where data begins, and how long it is."""


def raw(path: Path, size: int, extents: Extents) -> None:
    numbers = random.Random(size)
    with path.open("wb") as file:
        file.truncate(size)
        for start, length in extents:
            file.seek(start)
            file.write(numbers.randbytes(length))


def write(source: Path, path: Path, size: int, most: int = MiB) -> qcow2image.Layout:
    with source.open("rb") as file, path.open("wb") as made:

        def skip(start: int) -> int:
            try:
                return os.lseek(file.fileno(), start, os.SEEK_DATA)
            except OSError:
                return size

        layout = qcow2image.Layout(size, skip)
        for table in layout.tables():
            made.write(table)
        for start, end in layout.spans(most):
            data = os.pread(file.fileno(), end - start, start)
            made.write(data.ljust(end - start, b"\0"))
        assert made.tell() == layout.length
    return layout


def judge(source: Path, path: Path) -> None:
    """Raise unless QEMU finds it sound, standalone, and equal."""
    check = ["qemu-img", "check", "-f", "qcow2", "--output", "json", str(path)]
    done = subprocess.run(check, check=True, capture_output=True, timeout=60)
    assert json.loads(done.stdout)["check-errors"] == 0
    compare = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2"]
    subprocess.run([*compare, str(source), str(path)], check=True, timeout=60)
    info = ["qemu-img", "info", "-f", "qcow2", "--output", "json", str(path)]
    said = subprocess.run(info, check=True, capture_output=True, timeout=60)
    found = json.loads(said.stdout)
    assert "backing-filename" not in found and not found["dirty-flag"]
    assert not found["format-specific"]["data"]["corrupt"]


CASES: dict[str, tuple[int, Extents]] = {
    "empty": (MiB, []),
    "one sector": (512, [(0, 512)]),
    "whole": (20 * MiB, [(0, 20 * MiB)]),
    "end within a cluster": (MiB + 512, [(MiB, 512)]),
    "both ends of many tables": (
        10 * GiB + 512,
        [(0, 100), (5 * GiB - 1, 2), (10 * GiB, 512)],
    ),
    "far apart": (700 * GiB, [(n * 7 * GiB, 70_000) for n in range(99)]),
}


@pytest.mark.parametrize("case", CASES)
def test_equal_and_sound(tmp_path: Path, case: str) -> None:
    size, extents = CASES[case]
    source, path = tmp_path / "raw", tmp_path / "image"
    raw(source, size, extents)
    write(source, path, size, most=64 * KiB if len(extents) < 3 else MiB)
    judge(source, path)


@pytest.mark.parametrize("seed", range(5))
def test_any_disk(tmp_path: Path, seed: int) -> None:
    numbers = random.Random(seed)
    size = numbers.randrange(1, 3 * GiB // 512) * 512
    extents = []
    for _ in range(numbers.randrange(40)):
        start = numbers.randrange(size)
        extents.append((start, min(numbers.randrange(1, 300 * KiB), size - start)))
    source, path = tmp_path / "raw", tmp_path / "image"
    raw(source, size, extents)
    layout = write(source, path, size)
    judge(source, path)
    # Six tables of a cluster, or of as many as the disk's size needs.
    assert layout.length < (
        8 + sum(n // layout.cluster + 2 for _, n in extents) + 8
    ) * (layout.cluster)


@pytest.mark.parametrize("count", [32_760, 32_768, 70_000])
def test_counts_in_several_blocks(tmp_path: Path, count: int) -> None:
    """Of so many clusters that the counts of references count themselves, too.

    All of the disk is said to hold data; the zeros are holes of the files.
    """
    size = count * 64 * KiB
    layout = qcow2image.Layout(size, lambda start: start)
    source, path = tmp_path / "raw", tmp_path / "image"
    source.touch()
    os.truncate(source, size)
    with path.open("wb") as file:
        for table in layout.tables():
            file.write(table)
        assert layout.length - file.tell() == size
        file.truncate(layout.length)
    assert sum(end - start for start, end in layout.spans(MiB)) == size
    check = ["qemu-img", "check", "-f", "qcow2", str(path)]
    subprocess.run(check, check=True, timeout=60, stdout=subprocess.DEVNULL)


def test_clusters_grow_with_the_disk() -> None:
    """What is kept in memory does not grow with a disk of many terabytes."""
    layout = qcow2image.Layout(64 * 1024 * GiB, lambda start: 64 * 1024 * GiB)
    assert layout.cluster == 2 * MiB
    assert len(layout._used) <= 32 * MiB


@pytest.mark.parametrize("size", [0, -512, 511, 1000])
def test_size_that_none_has(size: int) -> None:
    with pytest.raises(ValueError, match="no qcow2 image"):
        qcow2image.Layout(size, lambda start: size)
