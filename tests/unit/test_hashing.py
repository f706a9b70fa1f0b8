# SPDX-License-Identifier: Apache-2.0
"""Digests of files, against those of their bytes, block by block."""

import itertools
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from virtmigrate import errors, hashing, manifest
from virtmigrate.units import KiB, MiB

BLOCK = 4 * KiB


def expected(data: bytes, block_size: int = 0) -> manifest.Manifest:
    found = manifest.Manifest(len(data), block_size)
    for index in range(found.count):
        start, end = found.span(index)
        found.add(index, data[start:end])
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "volume"


def hashed(
    path: Path, size: int, block_size: int = 0, workers: int = 2
) -> manifest.Manifest:
    found = manifest.Manifest.unknown(size, block_size)
    fd = os.open(path, os.O_RDONLY)
    try:
        hashing.hash_file(fd, found, range(found.count), workers=workers)
    finally:
        os.close(fd)
    return found


RUNS = st.lists(
    st.tuples(
        st.integers(0, 3 * BLOCK),
        st.integers(1, 3 * BLOCK),
        st.sampled_from([b"x", b"\0", b"\0\0\0y"]),
    ),
    max_size=6,
)


def written(path: Path, runs: list[tuple[int, int, bytes]], tail: int) -> bytes:
    with path.open("wb") as file:
        for gap, length, pattern in runs:
            file.seek(gap, os.SEEK_CUR)
            file.write((pattern * length)[:length])
        file.truncate(file.tell() + tail)
    return path.read_bytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(RUNS, st.integers(0, 3 * BLOCK), st.integers(1, 4))
def test_any_file(
    path: Path, runs: list[tuple[int, int, bytes]], tail: int, workers: int
) -> None:
    data = written(path, runs, tail)
    found = hashed(path, len(data), BLOCK, workers)
    assert found.digests() == expected(data, BLOCK).digests()


@pytest.mark.parametrize("size", [0, 1, MiB - 1, MiB, 4 * MiB, 9 * MiB + 5])
def test_blocks_larger_than_a_piece(path: Path, size: int) -> None:
    data = bytes(3 * MiB) + b"x" * (MiB + 7) + bytes(2 * MiB) + b"y" * 5 * MiB
    path.write_bytes(data[:size])
    found = hashed(path, size, 4 * MiB)
    assert found.digests() == expected(data[:size], 4 * MiB).digests()


def test_holes_are_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 64 * MiB
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(40 * MiB)
        file.write(b"x")
    read: list[int] = []
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        read.append(offset)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    found = hashed(path, size)
    assert found.known() == size and found[40] != manifest.ZERO
    assert read == [40 * MiB]


def test_only_what_was_asked(path: Path) -> None:
    path.write_bytes(b"x" * 10 * BLOCK)
    found = manifest.Manifest.unknown(10 * BLOCK, BLOCK)
    told: list[int] = []
    with path.open("rb") as file:
        hashing.hash_file(file.fileno(), found, [2, 3, 7], progress=told.append)
    known = [i for i in range(found.count) if found[i] != manifest.UNKNOWN]
    assert known == [2, 3, 7]
    assert sum(told) == 3 * BLOCK


def test_short_reads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(2 * MiB + 9)
    path.write_bytes(data)
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        return real(fd, [buffers[0][:1000]], offset)

    monkeypatch.setattr(os, "preadv", preadv)
    assert hashed(path, len(data)).root() == expected(data).root()


@pytest.mark.parametrize("workers", [1, 3])
def test_file_that_ends_too_early(path: Path, workers: int) -> None:
    path.write_bytes(b"x" * 5 * BLOCK)
    found = manifest.Manifest.unknown(9 * BLOCK, BLOCK)
    with path.open("rb") as file, pytest.raises(errors.ShortTransfer):
        hashing.hash_file(file.fileno(), found, range(found.count), workers=workers)
    assert found[8] == manifest.UNKNOWN


@pytest.mark.parametrize("workers", [1, 3])
def test_stopped(path: Path, workers: int) -> None:
    path.write_bytes(b"x" * 100 * BLOCK)
    found = manifest.Manifest.unknown(100 * BLOCK, BLOCK)
    lock, asked = threading.Lock(), iter(range(10**6))

    def stop() -> bool:
        with lock:
            return next(asked) >= 10

    with path.open("rb") as file, pytest.raises(errors.Cancelled):
        hashing.hash_file(
            file.fileno(), found, range(found.count), workers=workers, stop=stop
        )
    known = sum(found[i] != manifest.UNKNOWN for i in range(found.count))
    assert known <= 10


@given(st.sets(st.integers(0, 50)))
def test_runs(indexes: set[int]) -> None:
    found = list(hashing.runs(sorted(indexes)))
    assert list(flat(found)) == sorted(indexes)
    for (_, last), (first, _) in itertools.pairwise(found):
        assert first > last + 1


def flat(runs: list[tuple[int, int]]) -> Iterator[int]:
    for first, last in runs:
        yield from range(first, last + 1)
