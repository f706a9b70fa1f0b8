# SPDX-License-Identifier: Apache-2.0
"""Volumes copied by real streams, judged by the files themselves."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sandbox
from tests.functional.copies import STRETCH, Copy, noise, pool_of, write_runs
from virtmigrate import account, errors, host, manifest, reading, storagepool, stream
from virtmigrate.known import Known
from virtmigrate.manifest import UNKNOWN, Manifest
from virtmigrate.progress import Progress, Report
from virtmigrate.units import KiB, MiB

CALL = 3.0  # seconds that the host may take to answer


@pytest.fixture(scope="module")
def alpha(box: sandbox.Sandbox) -> Iterator[sandbox.Host]:
    yield box.add_host("str-alpha")
    box.remove_host("str-alpha")


@pytest.fixture(params=["local", "tls"])
def peer(request: pytest.FixtureRequest, alpha: sandbox.Host) -> Iterator[host.Host]:
    uri = alpha.uri if request.param == "tls" else alpha.local_uri
    with host.Host(uri, timeouts=host.Timeouts(call=CALL)) as opened:
        yield opened


@pytest.fixture
def pool(peer: host.Host, alpha: sandbox.Host) -> storagepool.Pool:
    return pool_of(peer, alpha.storage / "incoming")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """12 MiB and a bit, half of it data."""
    path = tmp_path / "source"
    with path.open("wb") as file:
        file.write(noise(3 * MiB))
        file.seek(7 * MiB + 300)
        file.write(noise(3 * MiB, seed=2))
        file.seek(12 * MiB)
        file.write(b"the last block is short".ljust(77))
    return path


@pytest.fixture
def blocks_of_4_mib(monkeypatch: pytest.MonkeyPatch) -> None:
    """As disks of more than 4 TiB have them: longer than what is kept of one."""
    monkeypatch.setattr(manifest, "_MAX_BLOCKS", 4)
    monkeypatch.setattr(stream, "HELD", MiB)


# Copies that work


RUNS = st.lists(
    st.tuples(
        st.integers(0, 3 * MiB),
        st.integers(1, 3 * MiB),
        st.sampled_from(["noise", "zeros", "text"]),
    ),
    max_size=5,
)


@given(
    runs=RUNS,
    tail=st.integers(0, 3 * MiB),
    stretch=st.sampled_from([MiB, 3 * MiB, 32 * MiB]),
)
@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_copy_equals_the_source(
    runs: list[tuple[int, int, str]],
    tail: int,
    stretch: int,
    pool: storagepool.Pool,
    tmp_path: Path,
) -> None:
    source = tmp_path / "source"
    write_runs(source, runs, tail)
    copy = Copy(pool, source, stream.Tuning(2, stretch))
    try:
        sent = copy.send()
        assert copy.is_equal()
        assert copy.survey().root() == sent.root()
        figures = copy.account.figures()
        assert figures.total == copy.size
        assert figures.resent == 0
    finally:
        copy.remove()


@given(
    runs=RUNS,
    tail=st.integers(0, 3 * MiB),
    changed=st.lists(st.integers(0, 20 * MiB), max_size=5),
    older=st.integers(0, 20 * MiB),
    forgotten=st.sets(st.integers(0, 20), max_size=3),
    is_device=st.booleans(),
)
@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_onto_what_is_there(
    runs: list[tuple[int, int, str]],
    tail: int,
    changed: list[int],
    older: int,
    forgotten: set[int],
    is_device: bool,
    pool: storagepool.Pool,
    tmp_path: Path,
) -> None:
    """An older copy, shorter or longer, or bytes of which nobody knows."""
    source = tmp_path / "source"
    write_runs(source, runs, tail)
    copy = Copy(pool, source)
    before = source.read_bytes()[:older] if not is_device else noise(copy.size)
    copy.target.write_bytes(before)
    os.truncate(copy.target, copy.size)
    with copy.target.open("r+b") as file:
        for at in changed:
            file.seek(min(at, max(0, copy.size - 1)))
            file.write(b"z"[: copy.size])
    found = Manifest.unknown(copy.size) if is_device else copy.survey()
    for index in forgotten & set(range(found.count)):
        found[index] = UNKNOWN
    copy.known = Known(found)
    try:
        sent = copy.send()
        assert copy.is_equal()
        assert copy.survey().root() == sent.root()
        assert copy.account.figures().total == copy.size
    finally:
        copy.remove()


def test_only_what_changed_is_sent(pool: storagepool.Pool, source: Path) -> None:
    copy = Copy(pool, source)
    copy.send()
    copy.account = account.Account()
    with source.open("r+b") as file:
        file.seek(5 * MiB + 7)
        file.write(b"new")
        file.seek(0)
        file.write(bytes(MiB))
    copy.send()
    assert copy.is_equal()
    figures = copy.account.figures()
    assert figures.sent == 2 * MiB
    assert figures.matched + figures.skipped == copy.size - 2 * MiB
    copy.remove()


def test_holes_stay_holes(pool: storagepool.Pool, tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_runs(source, [(100 * MiB, 4096, "noise")], 100 * MiB)
    copy, progress = Copy(pool, source), Progress()
    copy.send(progress)
    assert copy.is_equal()
    assert progress.sent <= MiB
    assert copy.target.stat().st_blocks * 512 <= MiB
    counted = account.Account()
    copy.survey(counted=counted)
    assert counted.figures().read <= MiB
    copy.remove()


def test_from_volume_to_volume(pool: storagepool.Pool, source: Path) -> None:
    first = Copy(pool, source)
    first.send()
    second = Copy(pool, source)
    second.send(source=first.reader())
    assert second.is_equal()
    for copy in (first, second):
        copy.remove()


def test_volume_that_is_read_again_is_looked_at_anew(
    pool: storagepool.Pool, tmp_path: Path
) -> None:
    """What was a hole then may be data now."""
    source = tmp_path / "source"
    write_runs(source, [(0, MiB, "noise")], 30 * MiB)
    copy = Copy(pool, source)
    copy.send()
    reader = copy.reader()
    with stream.Mover(stream.Tuning(1, MiB)) as mover:
        first = mover.survey(reader)
        with copy.target.open("r+b") as file:
            for at in range(MiB, 31 * MiB, 2 * MiB):
                file.seek(at)
                file.write(b"new")
        again = mover.survey(reader)
    assert list(again.unlike(first)) == list(range(1, 31, 2))
    copy.remove()


def test_some_blocks_of_a_volume(pool: storagepool.Pool, source: Path) -> None:
    copy = Copy(pool, source)
    sent = copy.send()
    with stream.Mover() as mover:
        found = mover.survey(copy.reader(), [0, 5, 12])
    assert {n for n in range(found.count) if found[n] != UNKNOWN} == {0, 5, 12}
    assert [found[n] for n in (0, 5, 12)] == [sent[n] for n in (0, 5, 12)]
    copy.remove()


def test_some_blocks_fetch_no_more(
    pool: storagepool.Pool, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Copy(pool, source)
    sent = copy.send()
    fetched: list[int] = []

    class Window(reading._Window):
        def __init__(self, start: int, end: int) -> None:
            super().__init__(start, end)
            fetched.append(end - start)

    monkeypatch.setattr(reading, "_Window", Window)
    sparing = reading.VolumeSource(pool, copy.name, copy.size, MiB)
    with stream.Mover() as mover:
        found = mover.survey(sparing, [0, 5])
    assert [found[0], found[5]] == [sent[0], sent[5]]
    assert fetched == [MiB, MiB]
    copy.remove()


def test_read_while_libvirt_refreshes_the_pool(
    pool: storagepool.Pool, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Copy(pool, source)
    sent = copy.send()
    refused: list[str] = []
    real = storagepool.Pool.opened

    def opened(self: storagepool.Pool, name: str, doing: str) -> Any:
        refused.append(doing)
        if refused.count(doing) == 1:
            raise errors.PoolBusy(host="h", pool="p", seconds=1, reason="refreshes")
        return real(self, name, doing)

    monkeypatch.setattr(storagepool.Pool, "opened", opened)
    assert copy.survey().root() == sent.root()
    assert len(set(refused)) == 2
    copy.remove()


def test_hostile_header_is_bytes(pool: storagepool.Pool, tmp_path: Path) -> None:
    """A guest's qcow2 header that claims 1 TiB moves as the bytes that it is."""
    source = tmp_path / "source"
    header = b"QFI\xfb" + (3).to_bytes(4) + bytes(16) + (1 << 40).to_bytes(8)
    source.write_bytes(header + noise(2 * MiB))
    copy = Copy(pool, source)
    sent = copy.send()
    pool.refresh()
    assert copy.is_equal()
    assert pool.physical(copy.name) == copy.size
    assert copy.survey().root() == sent.root()
    copy.remove()


@pytest.mark.parametrize("stretch", [MiB, 3 * MiB, 32 * MiB])
def test_blocks_longer_than_what_is_kept(
    pool: storagepool.Pool, tmp_path: Path, blocks_of_4_mib: None, stretch: int
) -> None:
    """Longer than a stream as well; read twice, and the last one is short."""
    source = tmp_path / "source"
    runs = [(0, 5 * MiB + 5, "noise"), (3 * MiB, 2 * MiB, "noise"), (MiB, 9, "noise")]
    write_runs(source, runs, 100)
    copy = Copy(pool, source, stream.Tuning(2, stretch))
    assert copy.known.block_size == 4 * MiB
    sent = copy.send()
    assert copy.is_equal()
    assert copy.survey().root() == sent.root()
    figures = copy.account.figures()
    assert figures.total == copy.size
    assert figures.sent <= 10 * MiB
    copy.account = account.Account()
    copy.send()
    assert copy.account.figures().sent == 0
    copy.remove()


def test_source_that_takes_its_time(pool: storagepool.Pool, tmp_path: Path) -> None:
    """The host's deadline stands still while the source is what takes long."""
    source = tmp_path / "source"
    source.write_bytes(noise(3 * MiB))

    class Slow(reading.FileSource):
        def read(self, start: int, end: int) -> bytes | None:
            if start == MiB:
                time.sleep(1.3)
            return super().read(start, end)

    with host.Host(pool.host.uri, timeouts=host.Timeouts(call=1.0)) as hasty:
        hastily = storagepool.Pool(hasty, pool.name)
        copy = Copy(hastily, source, stream.Tuning(1, 32 * MiB))
        copy.send(source=Slow(source, 3 * MiB))
        assert copy.is_equal()
        copy.remove()


# Copies that do not


@pytest.mark.parametrize("where", [0, 5 * MiB, 12 * MiB + 76])
def test_flipped_byte_at_the_target_is_found(
    pool: storagepool.Pool, source: Path, where: int
) -> None:
    copy = Copy(pool, source)
    sent = copy.send()
    with copy.target.open("r+b") as file:
        file.seek(where)
        byte = file.read(1)[0]
        file.seek(where)
        file.write(bytes([byte ^ 1]))
    found = copy.survey()
    assert found.root() != sent.root()
    # And mended by sending that block once more.
    copy.known, copy.account = Known(found), account.Account()
    copy.send()
    assert copy.is_equal()
    assert copy.account.figures().sent <= MiB
    copy.remove()


def test_target_that_was_cut(pool: storagepool.Pool, source: Path) -> None:
    copy = Copy(pool, source)
    copy.send()
    os.truncate(copy.target, copy.size - 1)
    with pytest.raises(errors.TransferError):
        copy.survey()
    copy.remove()


@pytest.mark.parametrize("percent", [1, 50, 99])
def test_cancelled(pool: storagepool.Pool, source: Path, percent: int) -> None:
    copy = Copy(pool, source)

    def listen(report: Report) -> None:
        if report.done * 100 >= copy.size * percent:
            progress.cancel()

    progress = Progress(listen, interval=0)
    with pytest.raises(errors.Cancelled):
        copy.send(progress)
    copy.expect_known_is_true()
    copy.send()
    assert copy.is_equal()
    copy.remove()
    assert not copy.target.exists()


def test_target_that_is_deleted_meanwhile(pool: storagepool.Pool, source: Path) -> None:
    """A copy into nothing is never proven."""
    copy = Copy(pool, source)

    def listen(report: Report) -> None:
        copy.target.unlink(missing_ok=True)

    with pytest.raises(errors.Error):
        copy.send(Progress(listen, interval=0))
        copy.survey()
    pool.refresh()
    copy.remove()


@pytest.mark.parametrize(
    ("size", "content"),
    [
        (256 * KiB, 16 * MiB),
        (3 * MiB + 512 * KiB, 16 * MiB),
        (15 * MiB + 512 * KiB, 16 * MiB),
        (16 * MiB - 64 * KiB, 16 * MiB),
    ],
    ids=["at-once", "early", "late", "last-bytes"],
)
def test_full_disk_is_never_a_proven_copy(
    alpha: sandbox.Host, peer: host.Host, tmp_path: Path, size: int, content: int
) -> None:
    source = tmp_path / "source"
    source.write_bytes(noise(content))
    alpha.mount_storage(size)
    try:
        copy = Copy(pool_of(peer, alpha.storage / tmp_path.name), source)
        expected = copy.expected()
        try:
            sent = copy.send(retry=60)
        except errors.Error as e:
            assert "space" in str(e)
        else:
            # libvirt forgot a late error: what it has is not what was sent.
            assert sent.root() == expected.root()
        assert copy.survey().root() != expected.root()
        copy.remove()
    finally:
        alpha.unmount_storage()


# Hosts that are hurt, and nobody tries again


def test_daemon_killed_in_the_middle(
    alpha: sandbox.Host, pool: storagepool.Pool, source: Path
) -> None:
    copy = Copy(pool, source)
    began = time.monotonic()
    try:
        error = copy.hurt(alpha.kill_libvirtd)
        assert isinstance(error, errors.HostError)
        assert time.monotonic() - began < CALL + 10
    finally:
        alpha.start_libvirtd()
    assert copy.survey().root() != copy.expected().root()
    copy.expect_known_is_true()
    copy.send()
    assert copy.is_equal()
    assert copy.account.figures().resent <= 2 * STRETCH
    copy.remove()


def test_daemon_frozen_in_the_middle(
    alpha: sandbox.Host, pool: storagepool.Pool, source: Path
) -> None:
    copy = Copy(pool, source)
    began = time.monotonic()
    try:
        error = copy.hurt(alpha.freeze)
        assert isinstance(error, errors.HostTimeout)
        assert CALL <= time.monotonic() - began < 4 * CALL + 10
    finally:
        alpha.thaw()
    copy.send()
    assert copy.is_equal()
    copy.remove()


def test_cancelled_while_the_daemon_is_frozen(
    alpha: sandbox.Host, pool: storagepool.Pool, source: Path
) -> None:
    """Aborting the stream waits for the host, and not for ever."""
    copy = Copy(pool, source, stream.Tuning(1, 32 * MiB))

    class Cancelling(reading.FileSource):
        def read(self, start: int, end: int) -> bytes | None:
            if start == 2 * MiB:
                alpha.freeze()
                raise errors.Cancelled
            return super().read(start, end)

    began = time.monotonic()
    try:
        with pytest.raises(errors.Cancelled):
            copy.send(source=Cancelling(source, copy.size))
        assert time.monotonic() - began < 4 * CALL + 10
    finally:
        alpha.thaw()
    copy.remove()


def test_daemon_killed_while_it_is_read(
    alpha: sandbox.Host, pool: storagepool.Pool, source: Path
) -> None:
    copy = Copy(pool, source)
    copy.send()
    try:
        error = copy.hurt(alpha.kill_libvirtd, copy.survey)
        assert isinstance(error, errors.HostError)
    finally:
        alpha.start_libvirtd()
    copy.remove()
