# SPDX-License-Identifier: Apache-2.0
"""Data that is cut into pieces, each in a file that is used again."""

import concurrent.futures
import threading
import types
from typing import Any

import pytest

from virtmigrate import errors, pieces, request
from virtmigrate.units import MiB

NAME = "vda.0123456789abcdef"
LENGTH = 4 * MiB


class Files:
    """A pool that keeps what is written; files are what a stream leaves."""

    def __init__(self) -> None:
        self.host = types.SimpleNamespace(name="peer")
        self.files: dict[str, bytearray] = {}
        self.lock = threading.Lock()

    def create_raw(self, name: str, size: int) -> None:
        with self.lock:
            if name in self.files:
                raise errors.VolumeExists(host="peer", pool="incoming", volume=name)
            self.files[name] = bytearray(size)


class File:
    """Stands for an upload into one of them; the real one is tested over libvirt."""

    def __init__(self, data: bytearray, acknowledge: Any) -> None:
        self._data = data
        self._acknowledge = acknowledge

    def write(self, offset: int, data: bytes) -> None:
        assert offset + len(data) <= len(self._data)
        self._data[offset : offset + len(data)] = data

    def finish(self) -> None:
        self._acknowledge()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.finish()


class Volume:
    """The volume at the peer, and what its receiver was asked for."""

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.data = bytearray(size)
        self.asked: list[tuple[str, int, int]] = []
        self.pool = Files()
        self.target = pieces.PieceTarget(
            self.pool,  # type: ignore[arg-type]
            NAME,
            size,
            LENGTH,
            self.bring,
        )

        def writer(file: Any, until: int, acknowledge: Any) -> File:
            return File(self.pool.files[file.name], acknowledge)

        monkeypatch.setattr("virtmigrate.writing.VolumeTarget.writer", writer)

    def bring(self, piece: str, offset: int, size: int) -> None:
        self.asked.append((piece, offset, size))
        self.data[offset : offset + size] = self.pool.files[piece][:size]


def test_what_is_contiguous_is_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    volume, told = Volume(16 * MiB, monkeypatch), []
    with volume.target.writer(16 * MiB, lambda: told.append(1)) as writer:
        for offset in (0, MiB, 2 * MiB, 8 * MiB):
            writer.write(offset, bytes([offset // MiB + 1]) * MiB)
    piece = request.piece_name(NAME, 0)
    assert volume.asked == [(piece, 0, 3 * MiB), (piece, 8 * MiB, MiB)]
    assert told == [1, 1]
    for offset in (0, MiB, 2 * MiB, 8 * MiB):
        assert set(volume.data[offset : offset + MiB]) == {offset // MiB + 1}


def test_what_is_long_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    volume = Volume(16 * MiB, monkeypatch)
    data = bytes(range(256)) * (9 * MiB // 256)
    with volume.target.writer(16 * MiB, lambda: None) as writer:
        writer.write(3 * MiB, data)
        writer.finish()
        writer.finish()
    assert [size for _, _, size in volume.asked] == [LENGTH, LENGTH, MiB]
    assert volume.data[3 * MiB : 12 * MiB] == data
    assert set(volume.pool.files) == {request.piece_name(NAME, 0)}


def test_each_writer_has_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    volume = Volume(64 * MiB, monkeypatch)
    together = threading.Barrier(4, timeout=20)

    def write(number: int) -> None:
        for turn in range(4):
            start = (turn * 4 + number) * 4 * MiB
            with volume.target.writer(64 * MiB, lambda: None) as writer:
                together.wait()
                writer.write(start, bytes([turn * 4 + number + 1]) * 4 * MiB)

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        list(threads.map(write, range(4)))
    assert len(volume.pool.files) == 4
    for number in range(16):
        assert set(volume.data[number * 4 * MiB : (number + 1) * 4 * MiB]) == {
            number + 1
        }


def test_after_an_error_nothing_is_brought(monkeypatch: pytest.MonkeyPatch) -> None:
    volume, told = Volume(16 * MiB, monkeypatch), []
    writing = volume.target.writer(16 * MiB, lambda: told.append(1))
    with pytest.raises(ValueError, match="mine"), writing as writer:
        writer.write(0, bytes(MiB))
        raise ValueError("mine")
    assert not volume.asked and not told
    # Its file is free again.
    with volume.target.writer(16 * MiB, lambda: None) as writer:
        writer.write(0, b"x")
    assert volume.asked == [(request.piece_name(NAME, 0), 0, 1)]


def test_no_piece_is_longer_than_a_receiver_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    volume = Volume(MiB, monkeypatch)
    target = pieces.PieceTarget(
        volume.pool,  # type: ignore[arg-type]
        NAME,
        MiB,
        2**40,
        volume.bring,
    )
    assert target.length == request.PIECE_LIMIT
