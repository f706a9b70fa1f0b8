# SPDX-License-Identifier: Apache-2.0
"""Deadlines: they fire, move, stand still and are taken back."""

import os
import threading
import time

import pytest

from virtmigrate import watchdog

SOON = 0.1
LONG = 5.0


class Bell:
    """Counts how often an alarm rang."""

    def __init__(self, *, failing: bool = False) -> None:
        self.count = 0
        self.rang = threading.Event()
        self._failing = failing

    def __call__(self) -> None:
        self.count += 1
        self.rang.set()
        if self._failing:
            raise OSError("the bell broke")


@pytest.fixture
def dog() -> watchdog.Watchdog:
    return watchdog.Watchdog()


def test_fires_in_time(dog: watchdog.Watchdog) -> None:
    bell = Bell()
    began = time.monotonic()
    alarm = dog.arm(SOON, bell)
    assert bell.rang.wait(LONG)
    assert SOON <= time.monotonic() - began < SOON + 1
    assert alarm.fired
    dog.disarm(alarm)


def test_earlier_alarm_is_not_late(dog: watchdog.Watchdog) -> None:
    late, early = Bell(), Bell()
    alarms = [dog.arm(60, late)]
    time.sleep(SOON)
    alarms.append(dog.arm(SOON, early))
    assert early.rang.wait(1)
    assert not late.count
    for alarm in alarms:
        dog.disarm(alarm)


def test_repeats_until_disarmed(dog: watchdog.Watchdog) -> None:
    bell = Bell()
    alarm = dog.arm(SOON, bell)
    time.sleep(SOON + 3.5 * watchdog.REPEAT)
    dog.disarm(alarm)
    count = bell.count
    assert count >= 2
    time.sleep(2 * watchdog.REPEAT)
    assert bell.count == count


def test_disarmed_in_time(dog: watchdog.Watchdog) -> None:
    bell = Bell()
    alarm = dog.arm(SOON, bell)
    dog.disarm(alarm)
    assert not bell.rang.wait(2 * SOON)
    assert not alarm.fired


def test_touch_moves_deadline(dog: watchdog.Watchdog) -> None:
    bell = Bell()
    alarm = dog.arm(4 * SOON, bell)
    for _ in range(8):
        time.sleep(SOON)
        alarm.touch()
    assert not bell.count
    assert bell.rang.wait(LONG)
    dog.disarm(alarm)


def test_rearm_starts_anew(dog: watchdog.Watchdog) -> None:
    bell = Bell()
    alarm = dog.arm(2 * SOON, bell)
    dog.disarm(alarm)
    time.sleep(3 * SOON)
    dog.rearm(alarm)
    assert not bell.rang.wait(SOON)
    assert bell.rang.wait(LONG)
    dog.disarm(alarm)


def test_failing_action_spares_others(dog: watchdog.Watchdog) -> None:
    broken, sound = Bell(failing=True), Bell()
    alarms = [dog.arm(SOON, broken), dog.arm(2 * SOON, sound)]
    assert broken.rang.wait(LONG)
    assert sound.rang.wait(LONG)
    for alarm in alarms:
        dog.disarm(alarm)


def test_after_fork() -> None:
    """The child's watchdog works, and the parent's alarms are not its own."""
    bell = Bell()
    alarm = watchdog.WATCHDOG.arm(60, bell)
    pid = os.fork()
    if pid == 0:
        mine = Bell()
        watchdog.WATCHDOG.arm(SOON, mine)
        os._exit(0 if mine.rang.wait(LONG) and not bell.count else 1)
    assert os.waitpid(pid, 0)[1] == 0
    watchdog.WATCHDOG.disarm(alarm)
