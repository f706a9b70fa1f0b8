# SPDX-License-Identifier: Apache-2.0
"""The account: bytes and waits of many threads, and one line that names the cause."""

import threading

import pytest

from virtmigrate import account
from virtmigrate.units import GiB, MiB


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def mine(clock: Clock) -> account.Account:
    return account.Account(clock)


def test_bytes_add_up(mine: account.Account) -> None:
    mine.add(read=10, sent=4, skipped=5, matched=1)
    mine.add(resent=2, verified=10)
    figures = mine.figures()
    assert figures == account.Figures(10, 5, 1, 4, 2, 10)
    assert figures.total == 10


def test_waits_are_told_apart(clock: Clock, mine: account.Account) -> None:
    for seconds, kind in enumerate(account.Wait, start=1):
        with mine.waiting(kind):
            clock.now += seconds
    clock.now += 0.5
    figures = mine.figures()
    assert [figures.waited(kind) for kind in account.Wait] == [1, 2, 3, 4, 5]
    assert figures.wall == 15.5
    assert figures.bottleneck is account.PEER


def test_wait_within_a_wait_is_counted_once(
    clock: Clock, mine: account.Account
) -> None:
    with mine.waiting(account.NETWORK):
        clock.now += 1
        with mine.waiting(account.LIMIT):
            clock.now += 10
        clock.now += 2
    figures = mine.figures()
    assert (figures.network, figures.limit) == (3, 10)


def test_wait_ends_with_an_error(clock: Clock, mine: account.Account) -> None:
    with pytest.raises(OSError, match="lost"), mine.waiting(account.NETWORK):
        clock.now += 1
        raise OSError("lost")
    clock.now += 1
    assert mine.figures().network == 1


def test_wait_that_goes_on_is_counted(clock: Clock, mine: account.Account) -> None:
    with mine.waiting(account.SOURCE):
        clock.now += 3
        assert mine.figures().source == 3
        clock.now += 1
    assert mine.figures().source == 4


def test_two_threads_wait_no_longer_than_the_clock(
    clock: Clock, mine: account.Account
) -> None:
    inside, done = threading.Event(), threading.Event()

    def wait() -> None:
        with mine.waiting(account.NETWORK):
            inside.set()
            done.wait(5)

    thread = threading.Thread(target=wait)
    with mine.waiting(account.NETWORK):
        clock.now += 1
        thread.start()
        assert inside.wait(5)
        clock.now += 1
    clock.now += 1
    done.set()
    thread.join(5)
    clock.now += 1
    assert mine.figures().network == 3


def test_many_threads_lose_nothing(mine: account.Account) -> None:
    def work() -> None:
        for _ in range(1000):
            with mine.waiting(account.NETWORK):
                mine.add(sent=3)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert mine.figures().sent == 12000
    assert mine.figures().network == 0


def test_merged_account_keeps_its_own_time(clock: Clock, mine: account.Account) -> None:
    clock.now += 2
    mine.add(sent=1)
    mine.merge(account.Figures(sent=10, network=3.0, wall=100.0))
    figures = mine.figures()
    assert (figures.sent, figures.network, figures.wall) == (11, 3.0, 2.0)


def test_figures_one_after_the_other() -> None:
    first = account.Figures(sent=1, peer=1.0, wall=2.0)
    second = account.Figures(sent=2, skipped=7, wall=3.0)
    both = account.Figures(sent=3, skipped=7, peer=1.0, wall=5.0)
    assert first + second == both


def test_no_bottleneck_without_waiting() -> None:
    figures = account.Figures()
    assert figures.bottleneck is None
    assert figures.summary().endswith("waited source 0.0 s, network 0.0 s, peer 0.0 s")


def test_summary() -> None:
    figures = account.Figures(
        read=512 * MiB,
        sent=512 * MiB,
        skipped=8 * GiB - 512 * MiB,
        source=0.1,
        network=0.9,
        peer=0.1,
        hashing=0.01,
        wall=1.25,
    )
    assert figures.summary() == (
        "sent 512.0 MiB of 8.0 GiB (matched 0 B, zeros 7.5 GiB) in 1.2 s, "
        "409.6 MiB/s; waited source 0.1 s, network 0.9 s, peer 0.1 s: "
        "the network is the limit"
    )


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (account.SOURCE, "source 2.0 s"),
        (account.HASHING, "cpu 2.0 s"),
        (account.NETWORK, "network 2.0 s"),
        (account.LIMIT, "limit 2.0 s"),
        (account.PEER, "peer 2.0 s"),
    ],
    ids=lambda value: value.value if isinstance(value, account.Wait) else "",
)
def test_summary_names_the_bottleneck(
    clock: Clock, mine: account.Account, kind: account.Wait, text: str
) -> None:
    with mine.waiting(kind):
        clock.now += 2
    mine.add(resent=MiB, verified=2 * MiB)
    line = mine.summary()
    assert text in line
    assert "resent 1.0 MiB, verified 2.0 MiB" in line
    assert mine.figures().bottleneck is kind
