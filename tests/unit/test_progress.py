# SPDX-License-Identifier: Apache-2.0
"""Progress: told at a bounded rate, and ended at the next chunk."""

import pytest

from virtmigrate import errors, progress
from virtmigrate.units import MiB


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_report(clock: Clock) -> None:
    mine = progress.Progress()
    mine.phase("copying", 100 * MiB)
    clock.now += 2
    mine.advance(20 * MiB, sent=5 * MiB)
    report = mine.report()
    assert report == progress.Report(
        "copying", 20 * MiB, 100 * MiB, 5 * MiB, 10.0 * MiB
    )
    assert report.left == 8.0


def test_new_phase_begins_at_zero_and_keeps_what_was_sent(clock: Clock) -> None:
    mine = progress.Progress()
    mine.phase("copying", 10)
    mine.advance(10, sent=7)
    mine.phase("verifying", 20)
    report = mine.report()
    assert (report.done, report.total, report.sent) == (0, 20, 7)
    assert report.left is None


def test_listener_hears_each_phase_and_not_each_chunk(clock: Clock) -> None:
    heard: list[progress.Report] = []
    mine = progress.Progress(heard.append, interval=1.0)
    mine.phase("copying", 1000)
    for _ in range(100):
        clock.now += 0.0625
        mine.advance(10)
    mine.phase("verifying", 1000)
    assert [report.phase for report in heard] == ["copying"] * 7 + ["verifying"]
    assert [report.done for report in heard[1:3]] == [160, 320]


def test_cancelled_at_the_next_chunk(clock: Clock) -> None:
    mine = progress.Progress()
    mine.advance(1)
    mine.check()
    mine.cancel()
    mine.cancel()
    with pytest.raises(errors.Cancelled):
        mine.advance(1)
    with pytest.raises(errors.Cancelled):
        mine.check()
    assert mine.report().done == 1


def test_cancelled_by_the_listener(clock: Clock) -> None:
    mine = progress.Progress(lambda report: mine.cancel())
    mine.phase("copying", 10)
    with pytest.raises(errors.Cancelled):
        mine.advance(1)


def test_cancel_is_no_failure() -> None:
    assert not issubclass(errors.Cancelled, errors.Error)


def test_what_goes_on_when_it_is_too_late_to_cancel() -> None:
    told: list[progress.Report] = []
    mine = progress.Progress(told.append)
    mine.cancel()
    going_on = mine.uncancelled()
    going_on.phase("merging", MiB)
    going_on.advance(MiB)
    assert told[-1].phase == "merging"
    with pytest.raises(errors.Cancelled):
        mine.check()
