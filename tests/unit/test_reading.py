# SPDX-License-Identifier: Apache-2.0
"""Reading files with holes, by several threads, unless they change."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from virtmigrate import errors, reading
from virtmigrate.units import KiB, MiB

PAGE = 4 * KiB

# Layouts of a file: (gap before, length, byte) of each run of data.
RUNS = st.lists(
    st.tuples(
        st.integers(0, 40 * KiB), st.integers(1, 40 * KiB), st.sampled_from(b"ab\0")
    ),
    max_size=5,
)


def write_runs(path: Path, runs: list[tuple[int, int, int]], tail: int = 0) -> int:
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


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk"


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def read_all(source: reading.Source, step: int) -> bytes:
    """Put together what a copy would, jumping over what may be skipped."""
    content = bytearray(source.size)
    position = 0
    while position < source.size:
        end = min(position + step, source.size)
        data = source.read(position, end)
        if data is not None:
            assert len(data) == end - position
            content[position:end] = data
        position = end
    return bytes(content)


@given(runs=RUNS, tail=st.integers(0, 40 * KiB), step=st.integers(1 * KiB, 64 * KiB))
@settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_layout(
    runs: list[tuple[int, int, int]], tail: int, step: int, path: Path
) -> None:
    size = write_runs(path, runs, tail)
    content = path.read_bytes()
    with reading.FileSource(path, size) as source:
        assert read_all(source, step) == content
        for start in range(0, size, step):
            until = source.skip(start)
            assert start <= until <= size
            assert content[start:until] == bytes(until - start)
        source.demand_unchanged()


def test_holes_are_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = write_runs(path, [(64 * MiB, 4096, ord("a"))], 64 * MiB)
    read: list[int] = []
    real = os.pread

    def pread(fd: int, length: int, offset: int) -> bytes:
        read.append(offset)
        return real(fd, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    with reading.FileSource(path, size) as source:
        assert source.skip(0) == 64 * MiB
        assert source.read(0, MiB) is None
        assert source.read(64 * MiB + 4096, 65 * MiB) is None
        data = source.read(64 * MiB, 65 * MiB)
        assert data == b"a" * 4096 + bytes(MiB - 4096)
        assert source.skip(64 * MiB + 100) == 64 * MiB + 100
        assert source.skip(65 * MiB) == size
    assert read == [64 * MiB]


def test_short_reads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(5009)
    path.write_bytes(content)
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: real(fd, min(n, 1000), at))
    with reading.FileSource(path, 5009) as source:
        assert source.read(0, 5009) == content
        assert source.read(3000, 5009) == content[3000:]


def test_file_that_somebody_opened(path: Path) -> None:
    """It is read even when the path leads elsewhere by now, and stays open."""
    size = write_runs(path, [(PAGE, PAGE, ord("a"))])
    with path.open("rb") as file:
        path.rename(path.with_name("elsewhere"))
        source = reading.FileSource(path, size, file.fileno())
        for _ in range(2):
            with source:
                assert read_all(source, 1000) == bytes(PAGE) + b"a" * PAGE
        wrong = reading.FileSource(path, size + 1, file.fileno())
        with pytest.raises(errors.SourceChanged), wrong:
            pass
        file.seek(0)
        assert file.read() == bytes(PAGE) + b"a" * PAGE


@pytest.mark.parametrize("size", [0, 1, MiB, MiB + 1])
def test_hole_only(size: int, path: Path) -> None:
    assert write_runs(path, [], size) == size
    with reading.FileSource(path, size) as source:
        assert source.skip(0) == size
        assert read_all(source, 64 * KiB) == bytes(size)
        source.demand_unchanged()


@pytest.mark.parametrize("difference", [-1, 1], ids=["shorter", "longer"])
def test_another_length(difference: int, path: Path) -> None:
    size = write_runs(path, [(0, 5000, 1)])
    source = reading.FileSource(path, size + difference)
    before = open_files()
    with pytest.raises(errors.SourceChanged, match="5000 bytes instead of"), source:
        pass
    assert open_files() == before


def test_no_file(path: Path) -> None:
    with pytest.raises(FileNotFoundError), reading.FileSource(path, 1):
        pass


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"changed")


def extend(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def punch(path: Path) -> None:
    """As a guest's discard."""
    with path.open("r+b") as file:
        os.truncate(file.fileno(), 0)
        os.truncate(file.fileno(), 10 * PAGE)


@pytest.mark.parametrize("change", [shrink, overwrite, extend, punch])
def test_changed_while_it_is_read(change: Callable[[Path], None], path: Path) -> None:
    size = write_runs(path, [(0, 10 * PAGE, 1)])
    os.utime(path, ns=(1, 1))
    with reading.FileSource(path, size) as source:
        source.read(0, PAGE)
        source.demand_unchanged()
        change(path)
        with pytest.raises(errors.SourceChanged, match="it changed while"):
            source.demand_unchanged()


def test_shrinks_between_looking_and_reading(path: Path) -> None:
    size = write_runs(path, [(0, 10 * PAGE, 1)])
    with reading.FileSource(path, size) as source:
        source.read(0, PAGE)
        os.truncate(path, 3 * PAGE)
        with pytest.raises(errors.SourceChanged, match="ends at 12288"):
            source.read(2 * PAGE, 5 * PAGE)
        with pytest.raises(errors.SourceChanged):
            source.read(4 * PAGE, 5 * PAGE)


def test_shrinks_before_a_hole_is_looked_for(path: Path) -> None:
    size = write_runs(path, [(0, PAGE, 1), (10 * PAGE, PAGE, 1)])
    with reading.FileSource(path, size) as source:
        os.truncate(path, 0)
        with pytest.raises(errors.SourceChanged, match="has 0 bytes"):
            source.read(2 * PAGE, 3 * PAGE)


def test_read_a_second_time_it_is_looked_at_anew(path: Path) -> None:
    """What was a hole then may be data now."""
    size = write_runs(path, [], 10 * PAGE)
    source = reading.FileSource(path, size)
    with source:
        assert source.read(0, PAGE) is None
    with path.open("r+b") as file:
        file.write(b"x" * PAGE)
    with source:
        assert source.read(0, PAGE) == b"x" * PAGE
        assert source.skip(0) == 0


def test_several_threads(path: Path) -> None:
    runs = [(PAGE * (n % 3), PAGE, 1 + n) for n in range(60)]
    size = write_runs(path, runs)
    content = path.read_bytes()
    found: list[bool] = []
    with reading.FileSource(path, size) as source:

        def work(step: int) -> None:
            found.extend(read_all(source, step) == content for _ in range(10))

        threads = [
            threading.Thread(target=work, args=[step])
            for step in (PAGE, 3 * PAGE, 1000, 64 * KiB)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    assert found == [True] * 40
