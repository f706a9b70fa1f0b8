# SPDX-License-Identifier: Apache-2.0
"""Copies that are cut and resumed: equal in the end, and known on the way."""

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from virtmigrate import (
    account,
    crew,
    errors,
    known,
    limit,
    manifest,
    reading,
    stream,
)
from virtmigrate.known import Known
from virtmigrate.manifest import UNKNOWN, ZERO, Manifest
from virtmigrate.progress import Progress, Report

BLOCK = 64
PIECE = 16


@pytest.fixture(autouse=True, params=["kept", "read-twice"])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 bytes: kept while they are sent, or longer than what is kept."""
    held = BLOCK if request.param == "kept" else PIECE
    monkeypatch.setattr(manifest, "block_size_for", lambda size: BLOCK)
    monkeypatch.setattr(stream, "HELD", held)
    monkeypatch.setattr(stream, "PIECE", PIECE)
    monkeypatch.setattr(crew, "_wait", lambda work, seconds: work.check())


class FakeSource:
    """Bytes, of which all-zero runs of PIECE bytes are holes."""

    name = "fake"

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.size = len(content)
        self.entered = self.left = 0
        self.before_read: Callable[[int], None] = lambda start: None
        self.at_the_end: Callable[[], None] = lambda: None

    def __enter__(self) -> "FakeSource":
        self.entered += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.left += 1

    def read(self, start: int, end: int) -> bytes | None:
        self.before_read(start)
        data = self.content[start:end]
        assert len(data) == end - start > 0
        is_hole = not any(data) and not (start % PIECE or end % PIECE)
        return None if is_hole else data

    def skip(self, start: int) -> int:
        while start < self.size and not any(self.content[start : start + PIECE]):
            start = start - start % PIECE + PIECE
        return min(start, self.size)

    def demand_unchanged(self) -> None:
        self.at_the_end()


class FakeTarget:
    """Bytes that what is not acknowledged may have reached or not.

    Arguments:
        fails: called before each step of a writer; what it raises is the failure.
    """

    name = "fake"
    host = "peer"

    def __init__(
        self, content: bytes, fails: Callable[[str], None] = lambda step: None
    ) -> None:
        self.content = bytearray(content)
        self.size = len(content)
        self.fails = fails
        self.log: list[tuple[int, int]] = []
        self.streams: list[tuple[int, int]] = []
        self.opened = 0
        self.random = random.Random(1)

    def writer(self, until: int, acknowledge: Any) -> "FakeWriter":
        return FakeWriter(self, until, acknowledge)


class FakeWriter:
    def __init__(self, target: FakeTarget, until: int, acknowledge: Any) -> None:
        self._target = target
        self._until = until
        self._acknowledge = acknowledge
        self._pending: list[tuple[int, bytes]] = []

    def __enter__(self) -> "FakeWriter":
        self._target.opened += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._target.opened -= 1
        if kind is None:
            self.finish()
        else:
            self._lose()

    def write(self, offset: int, data: bytes) -> None:
        if self._pending:
            last, before = self._pending[-1]
            assert offset >= last + len(before), "in the order of the offsets"
            if offset != last + len(before):
                self.finish()
        assert data and offset + len(data) <= self._until
        self._target.fails("write")
        self._pending.append((offset, data))
        self._target.log.append((offset, len(data)))

    def finish(self) -> None:
        if not self._pending:
            return
        self._target.fails("finish")
        for offset, data in self._pending:
            self._target.content[offset : offset + len(data)] = data
        start = self._pending[0][0]
        end = self._pending[-1][0] + len(self._pending[-1][1])
        self._pending = []
        self._target.streams.append((start, end))
        self._acknowledge()

    def _lose(self) -> None:
        """Any of it may have arrived."""
        for offset, data in self._pending:
            arrived = data[: self._target.random.randint(0, len(data))]
            self._target.content[offset : offset + len(arrived)] = arrived


def away(*_: object) -> None:
    raise errors.HostUnreachable(host="peer", reason="gone")


class Cuts:
    """Fails at the given counts of steps."""

    def __init__(self, *at: int) -> None:
        self.at = list(at)
        self.count = self.failed = 0
        self._lock = threading.Lock()

    def __call__(self, step: str) -> None:
        with self._lock:
            self.count += 1
            if self.count not in self.at:
                return
            self.failed += 1
        away()


def copied(
    source: reading.Source,
    target: FakeTarget,
    mine: Known | None = None,
    *,
    tuning: stream.Tuning | None = None,
    **options: Any,
) -> Manifest:
    tuning = tuning or stream.Tuning(workers=2, stretch=4 * BLOCK)
    with stream.Mover(tuning, **options) as mover:
        return mover.copy(source, target, mine)


def of(data: bytes) -> Manifest:
    made = Manifest(len(data))
    for index in range(made.count):
        made.add(index, data[slice(*made.span(index))])
    return made


def expect_true(mine: Known | Manifest, content: bytes) -> None:
    """What is said to be known is there."""
    truth = of(content)
    for index in range(truth.count):
        assert mine[index] in (UNKNOWN, truth[index]), index


# Bytes in runs, so that blocks of zeros, of data and of both are frequent.
CONTENTS = st.lists(
    st.tuples(
        st.sampled_from(b"\0\0ab"), st.sampled_from([1, PIECE, BLOCK, 3 * BLOCK])
    ),
    max_size=12,
).map(lambda runs: b"".join(bytes([byte]) * length for byte, length in runs))

TUNINGS = st.builds(
    stream.Tuning,
    workers=st.integers(1, 3),
    stretch=st.sampled_from([1, BLOCK, 3 * BLOCK, 100 * BLOCK]),
    retry=st.just(0.0),
)

EACH = settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def targets(draw: st.DrawFn, source: bytes) -> tuple[bytes, Manifest]:
    """What a target holds before, and what is known of it."""
    size = len(source) + draw(st.integers(0, 2 * BLOCK))
    kind = draw(st.sampled_from(["fresh", "device", "older"]))
    if kind == "fresh":
        return bytes(size), Manifest(size)
    if kind == "device":
        return b"\xee" * size, Manifest.unknown(size)
    # A copy of before that was cut or grown to the size, and changes since then.
    older = bytearray(source[: draw(st.integers(0, size))].ljust(size, b"\0"))
    for at in draw(st.lists(st.integers(0, size), max_size=6)):
        older[at : at + 1] = b"z"[: size - at]
    found = of(bytes(older))
    for index in draw(st.lists(st.integers(0, 40), max_size=3)):
        if index < found.count:
            found[index] = UNKNOWN
    return bytes(older), found


@given(data=st.data(), content=CONTENTS, tuning=TUNINGS)
@EACH
def test_equals_the_source(
    data: st.DataObject, content: bytes, tuning: stream.Tuning
) -> None:
    before, initial = data.draw(targets(content))
    target, mine, counted = FakeTarget(before), Known(initial), account.Account()
    had = Manifest(initial.size, BLOCK, initial.digests())
    expected = content.ljust(target.size, b"\0")
    source = FakeSource(content)
    found = copied(source, target, mine, tuning=tuning, counted=counted)
    assert bytes(target.content) == expected
    assert found.root() == of(expected).root()
    assert [mine[index] for index in range(found.count)] == [
        found[index] for index in range(found.count)
    ]
    expect_settled(counted, target)
    lacking = set(found.unlike(had))
    assert {start // BLOCK for start, _ in target.log} <= lacking
    assert (source.entered, source.left) == (1, 1)


def expect_settled(counted: account.Account, target: FakeTarget) -> None:
    """Each byte was sent, skipped or matched; each that crossed is counted."""
    figures = counted.figures()
    assert figures.total == target.size
    crossed = sum(length for _, length in target.log)
    assert figures.sent + figures.resent == crossed


@given(
    data=st.data(),
    content=CONTENTS,
    tuning=TUNINGS,
    cuts=st.lists(st.integers(1, 12), max_size=8),
    through_file=st.booleans(),
)
@EACH
def test_cut_and_resumed(
    data: st.DataObject,
    content: bytes,
    tuning: stream.Tuning,
    cuts: list[int],
    through_file: bool,
    tmp_path: Path,
) -> None:
    before, initial = data.draw(targets(content))
    path = tmp_path / "known" if through_file else None
    lacking = BLOCK * len(list(initial.unlike(of(content.ljust(len(before), b"\0")))))
    target, mine = FakeTarget(before), Known(initial, path)
    for cut in cuts:
        target.fails = fails = Cuts(cut)
        try:
            copied(FakeSource(content), target, mine, tuning=tuning)
        except errors.HostUnreachable:
            assert fails.failed
        expect_true(mine, bytes(target.content))
        mine.close()
        if path is not None:
            loaded = known.load(path)
            assert loaded is not None
            expect_true(loaded, bytes(target.content))
            mine = Known(loaded, path)
    target.fails = lambda step: None
    copied(FakeSource(content), target, mine, tuning=tuning)
    mine.close()
    assert bytes(target.content) == content.ljust(target.size, b"\0")
    # Sent again is only what nobody acknowledged.
    crossed = sum(length for _, length in target.log)
    assert crossed <= lacking + len(cuts) * tuning.workers * max(tuning.stretch, BLOCK)


@given(
    content=CONTENTS,
    tuning=TUNINGS,
    cuts=st.lists(st.integers(1, 60), max_size=6, unique=True),
)
@EACH
def test_tried_again_by_itself(
    content: bytes, tuning: stream.Tuning, cuts: list[int]
) -> None:
    tuning = stream.Tuning(tuning.workers, tuning.stretch, retry=60.0)
    fails = Cuts(*cuts)
    target = FakeTarget(b"\xee" * len(content), fails)
    mine, counted = Known(Manifest.unknown(target.size)), account.Account()
    progress = Progress()
    progress.phase("copying", len(content))
    copied(
        FakeSource(content), target, mine, tuning=tuning, counted=counted,
        progress=progress,
    )  # fmt: skip
    assert bytes(target.content) == content
    expect_settled(counted, target)
    # What was not acknowledged when it was cut, and nothing else.
    assert counted.figures().resent <= fails.failed * max(tuning.stretch, BLOCK)
    assert progress.report().done == len(content)
    assert counted.figures().sent == len(content)


def test_acknowledged_in_the_stretch_is_not_sent_again(tmp_path: Path) -> None:
    """Streams end at each gap: what is before it is there."""
    content = (b"a" * BLOCK + bytes(BLOCK)) * 4
    fails = Cuts(6)  # the third stream's finish
    target, counted = FakeTarget(bytes(len(content)), fails), account.Account()
    tuning = stream.Tuning(1, 100 * BLOCK, retry=60.0)
    copied(FakeSource(content), target, tuning=tuning, counted=counted)
    assert bytes(target.content) == content
    figures = counted.figures()
    assert figures.resent <= 2 * BLOCK
    assert (figures.sent, figures.skipped) == (4 * BLOCK, 4 * BLOCK)


def test_the_last_short_block_is_known_too() -> None:
    content = b"a" * (2 * BLOCK + 10)
    mine = Known(Manifest.unknown(len(content)))
    copied(FakeSource(content), FakeTarget(bytes(len(content))), mine)
    assert mine[2] == manifest.digest_of(b"a" * 10)


def test_streams_are_bounded() -> None:
    content = b"a" * 20 * BLOCK
    for stretch in (PIECE, 2 * BLOCK):
        target = FakeTarget(bytes(len(content)))
        copied(FakeSource(content), target, tuning=stream.Tuning(2, stretch))
        longest = max(end - start for start, end in target.streams)
        assert longest <= (
            BLOCK if stretch < BLOCK and stream.HELD == BLOCK else stretch
        )


def test_zeros_of_a_long_block_are_not_sent() -> None:
    content = b"a" * PIECE + bytes(BLOCK - PIECE)
    target, counted = FakeTarget(bytes(BLOCK)), account.Account()
    copied(FakeSource(content), target, counted=counted)
    sent = BLOCK if stream.HELD == BLOCK else PIECE
    assert counted.figures().sent == sent
    assert counted.figures().skipped == BLOCK - sent
    device = FakeTarget(b"\xee" * BLOCK)
    copied(FakeSource(content), device, Known(Manifest.unknown(BLOCK)))
    assert bytes(device.content) == content


# Patience


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(crew, "_wait", lambda _, seconds: self.pass_by(seconds))

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.mark.parametrize("retry", [0.0, 1.0, 100.0])
def test_given_up_in_time(clock: Clock, retry: float) -> None:
    target = FakeTarget(bytes(BLOCK), away)
    tuning = stream.Tuning(1, BLOCK, retry=retry)
    with pytest.raises(errors.HostUnreachable):
        copied(FakeSource(b"a" * BLOCK), target, tuning=tuning)
    assert retry <= clock.now - 1000 <= retry + 5
    assert target.opened == 0


def test_time_of_good_work_does_not_count(clock: Clock) -> None:
    """A stretch that took long until the host was lost is tried again all the same."""
    cuts = Cuts(2)

    def slow(step: str) -> None:
        clock.now += 100
        cuts(step)

    target = FakeTarget(bytes(BLOCK), slow)
    copied(FakeSource(b"a" * BLOCK), target, tuning=stream.Tuning(1, BLOCK, retry=10.0))
    assert cuts.failed == 1
    assert target.content == b"a" * BLOCK


def test_each_acknowledgement_begins_it_anew(clock: Clock) -> None:
    """A host that is away again and again is not given up while bytes arrive."""
    tries: list[int] = []

    def fails(step: str) -> None:
        clock.now += 4
        if step == "write":
            tries.append(1)
            if len(tries) % 7 == 1:
                away()

    content = (b"a" * BLOCK + bytes(BLOCK)) * 20
    target = FakeTarget(bytes(len(content)), fails)
    copied(FakeSource(content), target, tuning=stream.Tuning(1, 9999, retry=20.0))
    assert target.content == content
    assert clock.now - 1000 > 100


def failed(reason: str, code: int | None) -> errors.LibvirtFailed:
    return errors.LibvirtFailed(
        host="h", doing="d", reason=reason, code=code, domain=18
    )


def certificate(reason: str) -> errors.CertificateRefused:
    return errors.CertificateRefused(host="h", problem="our own", reason=reason)


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (errors.HostUnreachable(host="h", reason="r"), True),
        (errors.HostTimeout(host="h", seconds=1, doing="d"), True),
        (errors.PoolBusy(host="h", pool="p", seconds=1, reason="r"), True),
        (ConnectionResetError(104, "reset"), True),
        (failed("lost", None), True),
        (failed("storage pool 'p' is not active", 55), True),
        (failed("no space", 38), False),
        (errors.VolumeNotFound(host="h", pool="p", volume="v"), False),
        (errors.AuthenticationFailed(host="h", reason="r"), False),
        (certificate("the host hung up when it had seen our certificate"), True),
        (certificate("expired"), False),
        (errors.SourceChanged(volume="v", reason="r"), False),
        (OSError(5, "input/output error"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_may_pass(error: Exception, passes: bool) -> None:
    once = iter([error])

    def fails(step: str) -> None:
        for each in once:
            raise each

    target = FakeTarget(bytes(BLOCK), fails)
    tuning = stream.Tuning(1, BLOCK, retry=60.0)
    if passes:
        copied(FakeSource(b"a" * BLOCK), target, tuning=tuning)
        assert target.content == b"a" * BLOCK
    else:
        with pytest.raises(type(error)):
            copied(FakeSource(b"a" * BLOCK), target, tuning=tuning)


@pytest.mark.parametrize("where", ["entering", "reading", "leaving"])
def test_source_that_is_away_for_a_moment(where: str) -> None:
    source = FakeSource(b"a" * BLOCK)
    once = iter([1])

    def fail(*args: object) -> None:
        for _ in once:
            away()

    class Shy(FakeSource):
        def __enter__(self) -> "FakeSource":
            fail()
            return super().__enter__()

    if where == "entering":
        source = Shy(b"a" * BLOCK)
    elif where == "reading":
        source.before_read = fail
    else:
        source.at_the_end = fail
    target = FakeTarget(bytes(BLOCK))
    copied(source, target, tuning=stream.Tuning(2, BLOCK, retry=60.0))
    assert target.content == b"a" * BLOCK
    assert source.entered == source.left == 1
    assert not list(once)


# Ends


def test_first_error_wins_and_stops_the_others() -> None:
    """The other worker waits in its call until the first one failed."""
    failed = threading.Event()

    def fail(start: int) -> None:
        if start >= 4 * BLOCK:
            failed.set()
            raise errors.SourceChanged(volume="fake", reason="first")
        assert failed.wait(10)

    source = FakeSource(b"a" * 400 * BLOCK)
    source.before_read = fail
    target = FakeTarget(bytes(source.size))
    with pytest.raises(errors.SourceChanged, match="first"):
        copied(source, target)
    assert len(target.log) <= 4 * BLOCK // PIECE
    assert target.opened == 0
    assert source.left == 1


@pytest.mark.parametrize("blocks", [1, 2, 9, 20])
def test_cancelled(blocks: int) -> None:
    def listen(report: Report) -> None:
        if report.done >= blocks * BLOCK:
            progress.cancel()

    progress = Progress(listen, interval=0)
    content = b"a" * 20 * BLOCK
    target, mine = FakeTarget(bytes(len(content))), Known(Manifest(len(content)))
    with pytest.raises(errors.Cancelled):
        copied(
            FakeSource(content),
            target,
            mine,
            progress=progress,
            tuning=stream.Tuning(1, 4 * BLOCK),
        )
    assert len({start // BLOCK for start, _ in target.log}) <= blocks + 1
    expect_true(mine, bytes(target.content))
    with (
        stream.Mover(progress=progress) as mover,
        pytest.raises(errors.Cancelled),
    ):
        mover.survey(FakeSource(b"a" * BLOCK))


def test_cancelled_while_a_host_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    progress = Progress()
    threading.Timer(0.3, progress.cancel).start()
    target = FakeTarget(bytes(BLOCK), away)
    with pytest.raises(errors.Cancelled):
        copied(
            FakeSource(b"a" * BLOCK),
            target,
            progress=progress,
            tuning=stream.Tuning(retry=600.0),
        )


def test_cancelled_while_a_limit_holds_it_back() -> None:
    progress = Progress()
    threading.Timer(0.3, progress.cancel).start()
    source = FakeSource(b"a" * 100 * BLOCK)
    with pytest.raises(errors.Cancelled):
        copied(
            source,
            FakeTarget(bytes(source.size)),
            progress=progress,
            limits=limit.Limits(limit.Limiter(1)),
        )


def test_listener_that_raises_ends_it() -> None:
    def listen(report: Report) -> None:
        raise ZeroDivisionError

    source = FakeSource(b"a" * 100 * BLOCK)
    with pytest.raises(ZeroDivisionError):
        copied(
            source,
            FakeTarget(bytes(source.size)),
            progress=Progress(listen, interval=0),
        )


@pytest.mark.parametrize("size", [0, 1])
def test_tiny(size: int) -> None:
    target = FakeTarget(b"\xee" * size)
    found = copied(
        FakeSource(b"a" * size), target, Known(Manifest.unknown(size)), tuning=None
    )
    assert target.content == b"a" * size
    assert found.root() == of(b"a" * size).root()


def test_source_that_does_not_fit() -> None:
    source, target = FakeSource(b"a" * BLOCK), FakeTarget(bytes(BLOCK - 1))
    with pytest.raises(errors.TransferError, match="64 bytes do not fit into 63"):
        copied(source, target)
    assert not target.log


def test_known_of_another_volume() -> None:
    for wrong in (Manifest(BLOCK + 1), Manifest(BLOCK, 2 * BLOCK)):
        with pytest.raises(ValueError, match="what is known is of"):
            copied(FakeSource(b"a" * BLOCK), FakeTarget(bytes(BLOCK)), Known(wrong))


def test_block_that_changes_between_two_looks(
    request: pytest.FixtureRequest,
) -> None:
    """It would be sent as another one than it was hashed as."""
    if stream.HELD == BLOCK:
        return
    source = FakeSource(b"a" * BLOCK)
    seen: list[int] = []

    def change(start: int) -> None:
        seen.append(start)
        if len(seen) == BLOCK // PIECE + 2:
            source.content = b"b" * BLOCK

    source.before_read = change
    mine = Known(Manifest(BLOCK))
    with pytest.raises(errors.SourceChanged):
        copied(source, FakeTarget(bytes(BLOCK)), mine)
    assert mine[0] == UNKNOWN


# Surveys


@given(content=CONTENTS, tuning=TUNINGS)
@EACH
def test_survey_finds_what_a_copy_finds(content: bytes, tuning: stream.Tuning) -> None:
    counted = account.Account()
    with stream.Mover(tuning, counted=counted) as mover:
        found = mover.survey(FakeSource(content))
    assert found.root() == of(content).root()
    assert counted.figures().read <= len(content)
    assert counted.figures().sent == 0


def test_survey_of_some_blocks() -> None:
    content = b"a" * BLOCK + bytes(BLOCK) + b"c" * 10
    read: list[int] = []
    source = FakeSource(content)
    source.before_read = read.append
    with stream.Mover() as mover:
        found = mover.survey(source, [0, 2])
        assert [found[0], found[1]] == [of(content)[0], UNKNOWN]
        assert found[2] == of(content)[2]
        assert all(not BLOCK <= start < 2 * BLOCK for start in read)
        again = mover.survey(source, [1])
        assert (again[1], again.known()) == (ZERO, BLOCK)
        assert mover.survey(source, []).digests() == UNKNOWN * 3


@given(
    runs=st.lists(
        st.tuples(
            st.integers(0, 3 * BLOCK),
            st.integers(1, 3 * BLOCK),
            st.sampled_from([b"x", b"\0", b"\0\0\0y"]),
        ),
        max_size=6,
    ),
    tail=st.integers(0, 3 * BLOCK),
    scale=st.sampled_from([1, 100]),
    tuning=TUNINGS,
)
@EACH
def test_survey_of_any_file(
    runs: list[tuple[int, int, bytes]],
    tail: int,
    scale: int,
    tuning: stream.Tuning,
    tmp_path: Path,
) -> None:
    """Holes of files are whole pages, of many blocks each."""
    path = tmp_path / "file"
    with path.open("wb") as file:
        for gap, length, pattern in runs:
            file.seek(gap * scale, os.SEEK_CUR)
            file.write((pattern * length)[:length])
        size = file.truncate(file.tell() + tail * scale)
    with stream.Mover(tuning) as mover, path.open("rb") as file:
        found = mover.survey(reading.FileSource(path, size, file.fileno()))
    assert found.digests() == of(path.read_bytes()).digests()


@pytest.mark.parametrize("workers", [1, 3])
def test_survey_of_a_file_that_ends_too_early(tmp_path: Path, workers: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 9 * BLOCK)
    progress = Progress(lambda _: os.truncate(path, 5 * BLOCK), interval=0)
    tuning = stream.Tuning(workers, BLOCK)
    with (
        stream.Mover(tuning, progress=progress) as mover,
        pytest.raises(errors.TransferError),
    ):
        mover.survey(reading.FileSource(path, 9 * BLOCK))


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("blocks", [None, range(100)], ids=["all", "some"])
def test_survey_is_told_and_cancelled(workers: int, blocks: range | None) -> None:
    """It ends between blocks, not between stretches."""

    def listen(report: Report) -> None:
        if report.done >= 10 * BLOCK:
            progress.cancel()

    progress = Progress(listen, interval=0)
    tuning = stream.Tuning(workers, 50 * BLOCK)
    with (
        stream.Mover(tuning, progress=progress) as mover,
        pytest.raises(errors.Cancelled),
    ):
        mover.survey(FakeSource(b"x" * 100 * BLOCK), blocks)
    assert 10 <= progress.report().done // BLOCK <= 10 + workers


def test_one_mover_for_several_copies() -> None:
    contents = [b"a" * 5 * BLOCK, b"b" * 9 * BLOCK]

    def work() -> Iterator[bytes]:
        with stream.Mover(stream.Tuning(2, BLOCK)) as mover:
            for content in contents:
                target = FakeTarget(bytes(len(content)))
                mover.copy(FakeSource(content), target)
                yield bytes(target.content)

    before = threading.active_count()
    assert list(work()) == contents
    assert threading.active_count() == before
