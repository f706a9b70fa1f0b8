# SPDX-License-Identifier: Apache-2.0
"""Locks between threads, and between processes that may be killed."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from virtmigrate import errors, locks

UUID = "11111111-2222-3333-4444-555555555555"
OTHER = "99999999-2222-3333-4444-555555555555"
SHORT = 0.2
LONG = 20.0

HOLDER = """
import sys
from pathlib import Path
from virtmigrate import locks
with locks.HostLocks(Path(sys.argv[1]), "alpha", 5).instance(sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
print("released", flush=True)
"""


def of(directory: Path, timeout: float) -> locks.HostLocks:
    return locks.HostLocks(directory, "alpha", timeout)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the instance until its stdin ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path), UUID],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait(LONG)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def refused(directory: Path, timeout: float = SHORT) -> str:
    """Return what the error says when the instance is held."""
    began = time.monotonic()
    with (
        pytest.raises(errors.InstanceBusy) as caught,
        of(directory, timeout).instance(UUID),
    ):
        pass
    assert timeout <= time.monotonic() - began < timeout + 5
    return str(caught.value)


def test_held_by_another_process(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    message = refused(tmp_path)
    assert UUID in message
    assert "alpha" in message
    assert "0.2 s" in message


def test_no_waiting(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    refused(tmp_path, timeout=0)


def test_other_instance_is_free(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with of(tmp_path, 0).instance(OTHER):
        pass


def test_released_while_waited_for(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    assert holder.stdin is not None
    timer = threading.Timer(SHORT, holder.stdin.close)
    timer.start()
    with of(tmp_path, LONG).instance(UUID):
        timer.join()


def test_released_when_the_holder_is_killed(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    refused(tmp_path)
    holder.send_signal(signal.SIGKILL)
    with of(tmp_path, LONG).instance(UUID):
        assert holder.wait(LONG) == -signal.SIGKILL


def test_held_by_another_thread(tmp_path: Path) -> None:
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with of(tmp_path, SHORT).instance(UUID):
            held.set()
            release.wait(LONG)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert held.wait(LONG)
        assert UUID in refused(tmp_path)
    finally:
        release.set()
        thread.join(LONG)
    with of(tmp_path, 0).instance(UUID):
        pass


def test_threads_take_turns(tmp_path: Path) -> None:
    mine, inside, most = of(tmp_path, LONG), [0], [0]

    def work() -> None:
        for _ in range(5):
            with mine.instance(UUID):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.001)
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert most == [1]


def test_error_inside_releases_and_is_seen(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), of(tmp_path, 0).instance(UUID):
        raise ValueError("mine")
    with of(tmp_path, 0).instance(UUID):
        pass


def test_no_file_outside_the_directory(tmp_path: Path) -> None:
    with of(tmp_path / "a/locks", 0).instance("../../evil"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def never() -> None:
    """Nothing ends the wait."""


def test_slots_are_few(tmp_path: Path) -> None:
    mine = of(tmp_path, SHORT)
    with mine.slot("move", 2, SHORT, never), mine.slot("move", 2, SHORT, never):
        began = time.monotonic()
        with (
            pytest.raises(errors.HostBusy, match="no move place"),
            mine.slot("move", 2, SHORT, never),
        ):
            pass
        assert SHORT <= time.monotonic() - began < SHORT + 5
    with mine.slot("move", 1, 0, never):
        pass


def test_waiting_for_a_slot_can_be_ended(tmp_path: Path) -> None:
    mine = of(tmp_path, SHORT)

    def cancel() -> None:
        raise errors.Cancelled

    with (
        mine.slot("move", 1, LONG, never),
        pytest.raises(errors.Cancelled),
        mine.slot("move", 1, LONG, cancel),
    ):
        pass


def test_only_one(tmp_path: Path) -> None:
    mine, other = of(tmp_path, SHORT), of(tmp_path, SHORT)
    with mine.only("receiver") as is_ours:
        assert is_ours
        with other.only("receiver") as is_theirs:
            assert not is_theirs
        with other.only("other") as is_free:
            assert is_free
    with other.only("receiver") as is_theirs:
        assert is_theirs
