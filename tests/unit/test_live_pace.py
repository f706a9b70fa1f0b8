# SPDX-License-Identifier: Apache-2.0
"""When a live migration stalls, and what is done, step by step."""

import math

import pytest

from virtmigrate.livemigration.outlook import seconds
from virtmigrate.livemigration.pace import Pace, Schedule, Step
from virtmigrate.livemigration.terms import Status


def schedule(**changes: float) -> Schedule:
    values = {"downtime": 0.5, "downtime_limit": 2.0, "stall": 10.0, "timeout": 1000.0}
    return Schedule(**{**values, **changes})  # type: ignore[arg-type]


def test_less_than_ever_is_no_stall() -> None:
    pace = Pace(schedule(), 0.0)
    assert [pace.look(100 - now, float(now)) for now in range(0, 90, 9)] == [
        Step.GO_ON
    ] * 10


def test_a_stall_allows_more_and_gives_up() -> None:
    pace = Pace(schedule(), 0.0)
    assert pace.look(100, 1.0) is Step.GO_ON
    # What the guest writes adds to it again.
    assert pace.look(120, 11.0) is Step.GO_ON
    assert pace.look(110, 12.0) is Step.ALLOW
    assert pace.allowed == 1.0
    assert pace.look(110, 20.0) is Step.GO_ON
    assert pace.look(110, 23.0) is Step.ALLOW
    assert pace.allowed == 2.0
    assert pace.look(100, 34.0) is Step.GIVE_UP
    assert "never less than 100 bytes" in pace.reason


def test_progress_begins_the_clock_anew() -> None:
    pace = Pace(schedule(), 0.0)
    pace.look(100, 1.0)
    assert pace.look(100, 12.0) is Step.ALLOW
    assert pace.look(99, 21.0) is Step.GO_ON
    assert pace.look(99, 31.0) is Step.GO_ON
    assert pace.look(99, 31.5) is Step.ALLOW


def test_a_pause_comes_before_giving_up_and_once() -> None:
    pace = Pace(schedule(downtime_limit=0.5, pauses=True), 0.0)
    pace.look(100, 1.0)
    assert pace.look(100, 12.0) is Step.PAUSE
    assert pace.look(100, 23.0) is Step.GIVE_UP


def test_the_beginning_has_more_time() -> None:
    pace = Pace(schedule(), 0.0)
    assert pace.look(0, 119.0) is Step.GO_ON
    assert pace.look(0, 121.0) is Step.GIVE_UP
    assert "nothing was sent" in pace.reason


def test_timeout() -> None:
    pace = Pace(schedule(timeout=5.0), 100.0)
    assert pace.look(10, 105.0) is Step.GO_ON
    assert pace.look(5, 105.1) is Step.GIVE_UP
    assert "longer than 5 s" in pace.reason


@pytest.mark.parametrize(
    ("dirty", "expected"),
    [(0.0, 10.0), (50.0, 10.0 + 5.0 + 2.5), (100.0, math.inf), (200.0, math.inf)],
    ids=["idle", "half", "as-fast", "faster"],
)
def test_how_long_passes_take(dirty: float, expected: float) -> None:
    assert seconds(1000.0, dirty, 100.0, 2.5) == expected


def test_what_a_status_promises() -> None:
    status = Status(total=100, remaining=50, rate=10.0, dirty_rate=5.0)
    assert (status.left, status.downtime) == (10.0, 5.0)
    assert Status(remaining=50, rate=5.0, dirty_rate=5.0).left is None
    assert Status().downtime is None
