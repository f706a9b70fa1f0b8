# SPDX-License-Identifier: Apache-2.0
"""Limits of bandwidth: exact over a second, in order, and ended when asked."""

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtmigrate import errors, limit
from virtmigrate.progress import Progress
from virtmigrate.units import GiB, KiB, MiB

RATES = st.integers(MiB, 10 * GiB)
CHUNKS = st.integers(256 * KiB, MiB)


class Clock:
    """Time that passes only by waiting, and by what a test adds."""

    def __init__(self, late: float = 0.0) -> None:
        self.time = 1000.0
        self.late = late  # seconds that each wait takes too long
        self.waits: list[float] = []

    def now(self) -> float:
        return self.time

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.time += seconds + self.late


def go_on() -> None:
    """Nobody cancels."""


def forbidden() -> None:
    raise AssertionError("there is nothing to wait for")


@given(
    rate=RATES,
    chunks=st.lists(CHUNKS, min_size=1, max_size=20),
    late=st.sampled_from([0.0, 0.0001, 0.004]),
)
def test_rate_over_a_second(rate: int, chunks: list[int], late: float) -> None:
    clock = Clock(late)
    limiter = limit.Limiter(rate, clock)
    began, sent = clock.time, 0
    # As many rounds as take a second; a few of them stand for thousands.
    rounds = min(200, int(1.5 * rate / sum(chunks)) + 1)
    while sent < rounds * sum(chunks):
        for chunk in chunks:
            limiter.take(chunk, go_on)
            sent += chunk
    seconds = clock.time - began
    wanted = sent / rate
    assert abs(seconds - wanted) <= max(0.1 * wanted, limit.SHORT + late)


@given(rate=RATES, chunk=CHUNKS, part=st.floats(0, 0.95))
def test_time_spent_sending_is_not_lost(rate: int, chunk: int, part: float) -> None:
    clock = Clock()
    limiter = limit.Limiter(rate, clock)
    began, slot = clock.time, chunk / rate
    for _ in range(50):
        limiter.take(chunk, go_on)
        clock.time += part * slot
    seconds = clock.time - began
    # The last chunk's sending comes after the slots.
    assert abs(seconds - 50 * slot) <= slot + limit.SHORT


@given(
    rate=RATES,
    steps=st.lists(st.tuples(CHUNKS, st.floats(0, 3)), min_size=2, max_size=40),
)
def test_never_more_than_a_burst(rate: int, steps: list[tuple[int, float]]) -> None:
    clock = Clock()
    limiter = limit.Limiter(rate, clock)
    went: list[tuple[float, int]] = []
    for chunk, rest in steps:
        clock.time += rest
        limiter.take(chunk, go_on)
        went.append((clock.time, chunk))
    burst = max(limit.BURST * rate, *(chunk for chunk, _ in steps))
    for first in range(len(went)):
        # What went from this moment on, itself counted.
        total = 0
        for moment, chunk in went[first:]:
            total += chunk
            allowed = rate * (moment - went[first][0] + limit.SHORT) + burst
            assert total <= 1.001 * allowed + chunk


@given(rate=RATES, chunks=st.lists(CHUNKS, min_size=2, max_size=20))
def test_slots_are_in_the_order_of_asking(rate: int, chunks: list[int]) -> None:
    limiter = limit.Limiter(rate, Clock())
    ends = [limiter.reserve(chunk) for chunk in chunks]
    assert ends == sorted(ends)
    assert ends[-1] - ends[0] == pytest.approx(sum(chunks[1:]) / rate, rel=1e-3)


@given(
    rates=st.lists(RATES, min_size=2, max_size=3),
    chunk=CHUNKS,
    free=st.integers(0, 2),
)
def test_the_strictest_of_several_holds(
    rates: list[int], chunk: int, free: int
) -> None:
    clock = Clock()
    limiters = [limit.Limiter(rate, clock) for rate in rates + [0] * free]
    limits = limit.Limits(*limiters)
    began = clock.time
    for _ in range(20):
        limits.take(chunk, go_on)
    wanted = 20 * chunk / min(rates)
    assert clock.time - began == pytest.approx(wanted, abs=limit.SHORT)


def test_transfers_share_what_their_host_may() -> None:
    clock = Clock()
    host = limit.Limiter(4 * MiB, clock)
    one = limit.Limits(limit.Limiter(3 * MiB, clock), host)
    other = limit.Limits(limit.Limiter(3 * MiB, clock), host)
    for _ in range(40):
        one.take(MiB, go_on)
        other.take(MiB, go_on)
    assert clock.time - 1000 == pytest.approx(20.0, abs=limit.SHORT)


def test_no_limit_costs_nothing() -> None:
    clock = Clock()
    unlimited = limit.Limiter(0, clock)
    for each in (unlimited, limit.Limits(), limit.Limits(unlimited, unlimited)):
        each.take(10 * GiB, forbidden)
    assert not clock.waits


def test_negative_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="-1 bytes"):
        limit.Limiter(-1)


def test_cancelled_while_it_waits() -> None:
    clock = Clock()
    limiter = limit.Limiter(MiB, clock)
    progress = Progress()

    def check() -> None:
        if clock.time > 1003:
            progress.cancel()
        progress.check()

    with pytest.raises(errors.Cancelled):
        limiter.take(60 * MiB, check)
    assert clock.time == pytest.approx(1003, abs=0.2)
    assert max(clock.waits) <= 0.2


def test_what_was_cancelled_counts_as_not_sent() -> None:
    def refuse() -> None:
        raise errors.Cancelled

    clock = Clock()
    host = limit.Limiter(MiB, clock)
    limits = limit.Limits(limit.Limiter(2 * MiB, clock), host)
    for _ in range(100):
        with pytest.raises(errors.Cancelled):
            limits.take(MiB, refuse)
    limits.take(MiB, go_on)
    assert clock.time == pytest.approx(1001, abs=limit.SHORT)


def test_threads_in_real_time() -> None:
    """Each of four threads gets its share, and all together no more than was asked.

    How much less depends on what else the machine does.
    """
    rate, chunk = 64 * MiB, 256 * KiB
    host = limit.Limiter(rate)
    until = time.monotonic() + 1.2
    counts = [0] * 4

    def send(number: int) -> None:
        limits = limit.Limits(limit.Limiter(rate), host)
        while time.monotonic() < until:
            limits.take(chunk, go_on)
            counts[number] += chunk

    began = time.monotonic()
    threads = [threading.Thread(target=send, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    reached = sum(counts) / (time.monotonic() - began)
    assert 0.3 * rate < reached < 1.1 * rate
    assert min(counts) > 0.4 * max(counts)
