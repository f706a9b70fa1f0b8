# SPDX-License-Identifier: Apache-2.0
"""Reading files with holes, putting blocks together, and stopping in time."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from virtmigrate import errors, manifest, stream
from virtmigrate.progress import Progress, Report
from virtmigrate.units import KiB, MiB

BLOCK = 8  # bytes, where no file is read


class FakeReader:
    """Yields the given pieces; `before` is called ahead of each."""

    def __init__(self, *pieces: tuple[int, bytes]) -> None:
        self.given = pieces
        self.taken = 0

    def pieces(self) -> Iterator[tuple[int, bytes]]:
        for piece in self.given:
            self.taken += 1
            yield piece


class FakeWriter:
    """Keeps what is written; fails at offset `breaks_at`."""

    def __init__(self, size: int, breaks_at: int | None = None) -> None:
        self.content = bytearray(size)
        self.offsets: list[int] = []
        self.left_by: type[BaseException] | None = None
        self.is_finished = False
        self._breaks_at = breaks_at

    def __enter__(self) -> "FakeWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.left_by = kind
        self.is_finished = kind is None

    def write(self, offset: int, data: bytes) -> None:
        if offset == self._breaks_at:
            raise errors.HostUnreachable(host="fake", reason="gone")
        self.offsets.append(offset)
        self.content[offset : offset + len(data)] = data


# Layouts of a file: (gap before, length, byte) of each run of data.
RUNS = st.lists(
    st.tuples(
        st.integers(0, 3 * MiB), st.integers(1, 2 * MiB), st.sampled_from(b"ab\0")
    ),
    max_size=4,
)


def write_runs(path: Path, runs: list[tuple[int, int, int]], tail: int) -> int:
    """Write a sparse file and return its length."""
    position = 0
    with path.open("wb") as file:
        for gap, length, byte in runs:
            position += gap
            file.seek(position)
            file.write(bytes([byte]) * length)
            position += length
        file.truncate(position + tail)
    return position + tail


def put_together(pieces: Iterator[tuple[int, bytes]], size: int) -> bytes:
    content = bytearray(size)
    end = 0
    for offset, data in pieces:
        assert offset >= end, "pieces come in order"
        end = offset + len(data)
        content[offset:end] = data
    assert len(content) == size
    return bytes(content)


# FileReader


@given(runs=RUNS, tail=st.integers(0, 2 * MiB))
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_file_with_holes(
    runs: list[tuple[int, int, int]], tail: int, tmp_path: Path
) -> None:
    path = tmp_path / "disk"
    size = write_runs(path, runs, tail)
    pieces = list(stream.FileReader(path, size).pieces())
    assert put_together(iter(pieces), size) == path.read_bytes()
    assert all(
        offset // MiB == (offset + len(data) - 1) // MiB for offset, data in pieces
    )


def test_holes_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    size = write_runs(path, [(64 * MiB, 4096, ord("a"))], 64 * MiB)
    pieces = list(stream.FileReader(path, size).pieces())
    assert sum(len(data) for _, data in pieces) <= 64 * KiB


@pytest.mark.parametrize("size", [0, 1, MiB, MiB + 1], ids="{}-bytes".format)
def test_hole_only(tmp_path: Path, size: int) -> None:
    path = tmp_path / "disk"
    assert write_runs(path, [], size) == size
    content = put_together(stream.FileReader(path, size).pieces(), size)
    assert content == bytes(size)


@pytest.mark.parametrize("difference", [-1, 1], ids=["shorter", "longer"])
def test_file_of_another_length(tmp_path: Path, difference: int) -> None:
    path = tmp_path / "disk"
    size = write_runs(path, [(0, 5000, 1)], 0)
    with pytest.raises(errors.SourceChanged, match="5000 bytes instead of"):
        list(stream.FileReader(path, size + difference).pieces())


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(stream.FileReader(tmp_path / "none", 1).pieces())


def shrink(path: Path, size: int) -> None:
    os.truncate(path, size)


def overwrite(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.seek(size)
        file.write(b"changed")
    os.utime(path)


def extend(path: Path, size: int) -> None:
    with path.open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize("change", [shrink, overwrite, extend])
@pytest.mark.parametrize("where", [0, 3 * MiB], ids=["behind", "ahead"])
def test_source_that_changes_while_it_is_read(
    tmp_path: Path, change: object, where: int
) -> None:
    assert callable(change)
    path = tmp_path / "disk"
    size = write_runs(path, [(0, 4 * MiB, 1)], 0)
    os.utime(path, ns=(1, 1))
    pieces = stream.FileReader(path, size).pieces()
    next(pieces)
    next(pieces)
    change(path, where)
    with pytest.raises(errors.SourceChanged, match="the source changed"):
        list(pieces)


def test_source_that_shrinks_between_looking_and_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk"
    size = write_runs(path, [(0, 4 * MiB, 1)], 0)
    real = os.lseek

    def lseek(fd: int, position: int, whence: int) -> int:
        found = real(fd, position, whence)
        if whence == os.SEEK_DATA:
            os.truncate(path, 0)
        return found

    monkeypatch.setattr(os, "lseek", lseek)
    with pytest.raises(errors.SourceChanged):
        list(stream.FileReader(path, size).pieces())


# Blocks


@given(data=st.data(), size=st.integers(1, 100))
@settings(max_examples=300, deadline=None)
def test_blocks_of_any_pieces(data: st.DataObject, size: int) -> None:
    edges = data.draw(st.lists(st.integers(0, size), min_size=2).map(sorted))
    content = bytearray(size)
    pieces = []
    for start, end in zip(edges[::2], edges[1::2], strict=False):
        piece = data.draw(st.binary(min_size=end - start, max_size=end - start))
        content[start:end] = piece
        pieces.append((start, piece))
    found = dict(stream.blocks(FakeReader(*pieces), BLOCK, size))
    assert list(found) == sorted(found)
    for index in range(-(-size // BLOCK)):
        expected = bytes(content[index * BLOCK : (index + 1) * BLOCK])
        assert found.get(index, bytes(len(expected))) == expected


def test_piece_over_several_blocks() -> None:
    found = list(stream.blocks(FakeReader((6, b"abcdefghijkl")), BLOCK, 19))
    assert found == [(0, b"\0" * 6 + b"ab"), (1, b"cdefghij"), (2, b"kl\0")]


def test_no_pieces() -> None:
    assert list(stream.blocks(FakeReader(), BLOCK, 100)) == []
    assert list(stream.blocks(FakeReader((3, b"")), BLOCK, 100)) == []


# Copying


def copied(
    reader: stream.Reader, writer: FakeWriter, size: int, progress: Progress
) -> manifest.Manifest:
    return stream.copy(reader, writer, size, progress)  # type: ignore[arg-type]


@given(runs=RUNS, tail=st.integers(0, 2 * MiB))
@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_copy_equals_the_source(
    runs: list[tuple[int, int, int]], tail: int, tmp_path: Path
) -> None:
    path = tmp_path / "disk"
    size = write_runs(path, runs, tail)
    writer, progress = FakeWriter(size), Progress()
    progress.phase("copying", size)
    sent = copied(stream.FileReader(path, size), writer, size, progress)
    assert bytes(writer.content) == path.read_bytes()
    assert writer.is_finished
    assert progress.report().done == size
    found = stream.survey(stream.FileReader(path, size), size, Progress())
    assert found.root() == sent.root()


def test_zeros_are_not_sent() -> None:
    size = 3 * MiB
    writer, progress = FakeWriter(size), Progress()
    reader = FakeReader((0, bytes(MiB)), (MiB, b"a" * MiB), (2 * MiB, bytes(MiB)))
    copied(reader, writer, size, progress)
    assert writer.offsets == [MiB]
    assert progress.sent == MiB


def test_volume_that_grew() -> None:
    """The target may be longer than the source: what follows is zeros."""
    writer = FakeWriter(3 * MiB)
    sent = copied(FakeReader((0, b"a" * 10)), writer, 3 * MiB, Progress())
    assert bytes(writer.content) == b"a" * 10 + bytes(3 * MiB - 10)
    longer = stream.survey(FakeReader((0, bytes(writer.content))), 3 * MiB, Progress())
    assert longer.root() == sent.root()


@pytest.mark.parametrize("chunks", [1, 2, 9])
def test_cancelled_at_the_next_chunk(chunks: int) -> None:
    reader = FakeReader(*((n * MiB, b"a" * MiB) for n in range(20)))
    writer = FakeWriter(20 * MiB)

    def listen(report: Report) -> None:
        if report.done >= chunks * MiB:
            progress.cancel()

    progress = Progress(listen, interval=0)
    with pytest.raises(errors.Cancelled):
        copied(reader, writer, 20 * MiB, progress)
    assert len(writer.offsets) == chunks + 1
    assert writer.left_by is errors.Cancelled
    with pytest.raises(errors.Cancelled):
        stream.survey(FakeReader((0, b"a")), MiB, progress)


def test_asked_once_per_chunk() -> None:
    asked = []

    class Asking(Progress):
        def check(self) -> None:
            asked.append(1)

    reader = FakeReader(*((n * MiB, b"a" * MiB) for n in range(10)))
    copied(reader, FakeWriter(10 * MiB), 10 * MiB, Asking())
    assert len(asked) == 10 + 1


def test_writer_that_fails_ends_the_copy() -> None:
    reader = FakeReader(*((n * MiB, b"a" * MiB) for n in range(10)))
    writer = FakeWriter(10 * MiB, breaks_at=2 * MiB)
    with pytest.raises(errors.HostUnreachable):
        copied(reader, writer, 10 * MiB, Progress())
    assert writer.left_by is errors.HostUnreachable
    assert reader.taken <= 4
