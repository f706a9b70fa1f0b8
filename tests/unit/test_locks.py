# SPDX-License-Identifier: Apache-2.0
"""Locks between threads, and between processes that may be killed."""

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from virtmigrate import errors, locks
from virtmigrate.backends import coordination

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


@pytest.mark.parametrize(
    "call",
    [
        lambda found: found.instance(UUID),
        lambda found: found.slot("transfer", 2, SHORT, lambda: None),
        lambda found: found.only("receiver"),
    ],
    ids=["instance", "slot", "only"],
)
def test_a_directory_that_takes_no_files(
    tmp_path: Path,
    call: Callable[[locks.HostLocks], contextlib.AbstractContextManager[object]],
) -> None:
    """A full or read-only file system is said by its path, and what to do."""
    (tmp_path / "state").write_text("not a directory")
    found = of(tmp_path / "state" / "locks", SHORT)
    with (
        pytest.raises(errors.LockFileFailed, match=r"state/locks.*state_path") as said,
        call(found),
    ):
        pass
    assert isinstance(said.value.__cause__, OSError)


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


class Storage:
    """Leased locks in memory: what a real one does when it fails is said to it."""

    def __init__(self, lease: float | None = 0.4) -> None:
        self.lease = lease
        self.calls: list[tuple[str, str]] = []
        self.taken: set[str] = set()
        self.failing: errors.Error | None = None

    def take(self, name: str) -> locks.Grip | None:
        self.calls.append(("take", name))
        if name in self.taken:
            return None
        return Kept(self, name)

    def call(self, what: str, name: str) -> None:
        self.calls.append((what, name))
        if self.failing is not None:
            raise self.failing


class Kept:
    def __init__(self, storage: Storage, name: str) -> None:
        self._storage = storage
        self._name = name

    def renew(self) -> None:
        self._storage.call("renew", self._name)

    def release(self) -> None:
        self._storage.call("release", self._name)


DOWN = errors.StorageDown(host="alpha", pool="p", seconds=1, reason="away")
LOST = errors.LockLost(host="alpha", backend="b", name="a")


def told(storage: locks.Mechanism) -> locks.Locks:
    return locks.Locks(storage, "alpha", "b")


def until_lost(lease: locks.Lease) -> None:
    with pytest.raises(errors.LockLost, match="host alpha, backend b: the lock a"):
        for _ in range(int(LONG * 100)):
            lease.demand()
            time.sleep(0.01)


def test_taken_in_order_and_released_in_reverse() -> None:
    storage = Storage(lease=None)
    with told(storage).held(["c", "a", "b", "a"], timeout=0):
        pass
    assert [name for what, name in storage.calls if what == "take"] == ["a", "b", "c"]
    assert [n for what, n in storage.calls if what == "release"] == ["c", "b", "a"]


def test_renewed_while_held() -> None:
    storage = Storage()
    with told(storage).held(["a"], timeout=0) as lease:
        for _ in range(int(LONG * 100)):
            if storage.calls.count(("renew", "a")) > 2:
                break
            time.sleep(0.01)
        lease.demand()


def test_lost_when_it_cannot_be_renewed_and_released_all_the_same() -> None:
    storage = Storage()
    with told(storage).held(["a"], timeout=0) as lease:
        storage.failing = DOWN
        until_lost(lease)
        storage.failing = None
        until_lost(lease)
        storage.failing = DOWN


def test_lost_at_once_when_the_storage_says_so() -> None:
    storage = Storage(lease=2)
    storage.failing = LOST
    with told(storage).held(["a"], timeout=0) as lease:
        began = time.monotonic()
        until_lost(lease)
        asked = storage.calls.count(("renew", "a"))
        assert asked == 1 or time.monotonic() - began > 2


def test_lost_while_waiting_for_another() -> None:
    storage = Storage()
    storage.taken.add("b")
    storage.failing = DOWN
    with (
        pytest.raises(errors.LockLost),
        told(storage).held(["a", "b"], timeout=LONG),
    ):
        pass
    assert storage.calls[-1] == ("release", "a")


def test_an_answer_after_the_lease_is_no_lock() -> None:
    class Slow(Storage):
        def take(self, name: str) -> locks.Grip | None:
            time.sleep(0.5)
            return super().take(name)

    with told(Slow()).held(["a"], timeout=0) as lease:
        until_lost(lease)


def test_an_error_inside_is_seen_and_not_that_of_the_release() -> None:
    storage = Storage()
    with (
        pytest.raises(ValueError, match="mine"),
        told(storage).held(["a"], timeout=0),
    ):
        storage.failing = DOWN
        raise ValueError("mine")


def test_a_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    mine = told(locks.FileLocks(tmp_path / "file"))
    with (
        pytest.raises(errors.LockError, match="lock a cannot be had"),
        mine.held(["a"], timeout=0),
    ):
        pass


def test_two_objects_of_one_directory_exclude_each_other(tmp_path: Path) -> None:
    first, second = (told(locks.FileLocks(tmp_path)) for _ in range(2))
    with first.held(["a"], timeout=0):
        for _ in range(2):
            with pytest.raises(errors.LockBusy), second.held(["a"], timeout=0):
                pass


def test_no_tooz(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tooz.coordination", None)
    with pytest.raises(errors.ConfigurationError, match=r"virtmigrate\[etcd\]"):
        coordination.CoordinatedLocks("etcd3+http://h", 1, "s", ("alpha", "b"))


def test_a_coordinator_that_is_away() -> None:
    url = "etcd3+http://127.0.0.1:9"
    mine = told(coordination.CoordinatedLocks(url, 1, "s", ("alpha", "b")))
    with (
        pytest.raises(errors.LockError, match="lock_url"),
        mine.held(["a"], timeout=0),
    ):
        pass
