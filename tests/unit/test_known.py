# SPDX-License-Identifier: Apache-2.0
"""What a target holds: never more than the truth, whenever the process ends."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from virtmigrate import known, manifest
from virtmigrate.known import Known
from virtmigrate.manifest import UNKNOWN, ZERO, Manifest

BLOCK = 64
COUNT = 8
SIZE = COUNT * BLOCK - 10
DIGESTS = [ZERO, b"a" * 32, b"b" * 32]


def of(*digests: bytes) -> Manifest:
    return Manifest(len(digests) * BLOCK, BLOCK, b"".join(digests))


@contextlib.contextmanager
def kept(initial: Manifest, path: Path) -> Iterator[Known]:
    made = Known(initial, path)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "known"


@pytest.mark.parametrize(
    "initial",
    [Manifest(SIZE, BLOCK), Manifest.unknown(SIZE, BLOCK), of(*DIGESTS), Manifest(0)],
    ids=["zeros", "unknown", "copy", "empty"],
)
def test_kept_from_the_start(initial: Manifest, path: Path) -> None:
    with kept(initial, path):
        found = known.load(path)
    assert found is not None
    assert found.root() == initial.root()


def test_acknowledged_is_kept(path: Path) -> None:
    with kept(of(ZERO, ZERO, ZERO), path) as mine:
        mine.writing(0, 2)
        mine.settled(0, DIGESTS[1])
    found = known.load(path)
    assert found is not None
    # The second was forgotten along with the first, and nothing came.
    assert found.digests() == DIGESTS[1] + UNKNOWN + ZERO
    assert mine[1] == ZERO


def test_forgotten_on_disk_before_it_is_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kept(of(*[ZERO] * 5), path) as mine:
        synced: list[Manifest | None] = []
        real = os.fsync

        def fsync(fd: int) -> None:
            real(fd)
            synced.append(known.load(path))

        monkeypatch.setattr(os, "fsync", fsync)
        mine.writing(1, 4)
        (found,) = synced
        assert found is not None
        assert found.slice(1, 4) == UNKNOWN * 3
        for index in (1, 2, 3):
            mine.writing(index, 4)
            mine.settled(index, DIGESTS[1])
        assert len(synced) == 1


def test_a_file_of_before_is_replaced(path: Path) -> None:
    with kept(of(*DIGESTS), path), kept(of(ZERO), path):
        found = known.load(path)
    assert found is not None
    assert found.count == 1


def test_made_durably(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut no older file may come back, which knew other things."""
    synced = []
    real = os.fsync

    def fsync(fd: int) -> None:
        real(fd)
        synced.append(str(Path(f"/proc/self/fd/{fd}").readlink()))

    monkeypatch.setattr(os, "fsync", fsync)
    with kept(of(ZERO), path):
        assert synced == [f"{path}.new", str(path.parent)]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"virtmigrate-known 2 64 64\n",
        b"something else\n",
        b"virtmigrate-known 1 64\n",
        b"virtmigrate-known 1 many 64\n",
        b"\xff\xfe\n",
        b"virtmigrate-known 1 64 64",
        bytes(4096),
    ],
)
def test_no_file_of_ours(text: bytes, path: Path) -> None:
    path.write_bytes(text)
    assert known.load(path) is None


def test_no_file(path: Path) -> None:
    assert known.load(path) is None


@pytest.mark.parametrize("point", ["write", "fsync", "rename"])
def test_killed_while_it_is_made(
    path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """A head without the digests would say that all is zeros."""
    with kept(of(*DIGESTS), path):
        pass
    owner = Path if point == "rename" else os
    real, calls = getattr(owner, point), 0

    def fail(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 2 or point != "write":
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(owner, point, fail)
    with pytest.raises(KeyboardInterrupt):
        Known(Manifest.unknown(3 * BLOCK, BLOCK), path)
    found = known.load(path)
    assert found is not None
    assert found.root() == of(*DIGESTS).root()


def test_torn_anywhere(path: Path) -> None:
    with kept(of(*[ZERO] * 4), path) as mine:
        begins = path.stat().st_size
        mine.writing(0, 4)
        ends = path.stat().st_size
        mine.settled(1, DIGESTS[1])
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        found = known.load(path)
        if length < begins:
            assert found is None
            continue
        assert found is not None
        assert (found[0] == UNKNOWN) == (length >= ends)
        assert (found[1] == DIGESTS[1]) == (length == len(whole))


def test_damage_is_never_believed(path: Path) -> None:
    with kept(of(*[ZERO] * 4), path) as mine:
        head = path.stat().st_size
        for index in range(3):
            mine.writing(index, index + 1)
            mine.settled(index, DIGESTS[1])
    whole = path.read_bytes()
    expected = known.load(path)
    assert expected is not None
    for at in range(head, len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 0x55
        path.write_bytes(changed)
        found = known.load(path)
        assert found is None or set(found.unlike(expected)) <= {2}


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["writing", "settled", "same"]),
        st.integers(0, COUNT - 1),
        st.integers(1, 4),
        st.sampled_from(DIGESTS),
    ),
    max_size=25,
)


@given(
    initial=st.lists(st.sampled_from([*DIGESTS, UNKNOWN]), min_size=COUNT).map(
        lambda digests: digests[:COUNT]
    ),
    operations=OPERATIONS,
    lost=st.integers(0, 1000),
)
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_never_more_than_the_truth(
    initial: list[bytes],
    operations: list[tuple[str, int, int, bytes]],
    lost: int,
    path: Path,
) -> None:
    """Killed at any moment, or cut from power: then what is not fsynced is gone."""
    with kept(of(*initial), path) as mine:
        synced = path.stat().st_size
        for kind, index, length, digest in operations:
            if kind == "writing":
                before = path.stat().st_size
                mine.writing(index, min(index + length, COUNT))
                if path.stat().st_size > before:
                    synced = path.stat().st_size
            elif kind == "settled":
                mine.writing(index, index + 1)
                synced = path.stat().st_size
                mine.settled(index, digest)
            elif mine[index] != UNKNOWN:
                mine.settled(index, mine[index])
            expect_true(known.load(path), mine)
        os.truncate(path, max(synced, path.stat().st_size - lost))
        expect_true(known.load(path), mine)


def expect_true(found: Manifest | None, mine: Known) -> None:
    assert found is not None
    for index in range(COUNT):
        assert found[index] in (UNKNOWN, mine[index])


def test_several_threads(path: Path) -> None:
    count = 400
    with kept(Manifest(count * BLOCK, BLOCK), path) as mine:

        def work(number: int) -> None:
            for index in range(number, count, 4):
                mine.writing(index, index + 1)
                mine.settled(index, manifest.digest_of(b"%d" % index))

        threads = [threading.Thread(target=work, args=[n]) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    found = known.load(path)
    assert found is not None
    for index in range(count):
        assert found[index] == mine[index] == manifest.digest_of(b"%d" % index)


def test_without_a_file() -> None:
    mine = Known(of(ZERO, DIGESTS[1], ZERO))
    assert mine.is_zero(0, 1)
    assert not mine.is_zero(0, 2)
    mine.writing(2, 3)
    assert mine[2] == UNKNOWN
    assert not mine.is_zero(2, 3)
    mine.close()
