# SPDX-License-Identifier: Apache-2.0
"""Records: damage is refused, and of several publishers one wins."""

import functools
import threading
import types
from collections.abc import Callable, Iterator
from typing import cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virtmigrate import errors, model, record, storagepool
from virtmigrate.backends import catalog
from virtmigrate.units import GiB

GRACE = 10.0
SECONDS = 30  # until a test that hangs fails


class Body(model.Struct, frozen=True):
    text: str
    count: int = 0


class Clock:
    """Time that passes only when somebody sleeps, or a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class FakePool:
    """Volumes in memory; `before` is called first in each call and may fail it.

    `stays` bytes of a write arrive; None: all.
    """

    def __init__(self) -> None:
        self.host = types.SimpleNamespace(name="fake")
        self.name = "records"
        self.volumes: dict[str, bytes] = {}
        self.calls: list[tuple[str, str]] = []
        self.before: Callable[[str, str], object] = lambda call, volume: None
        self.stays: int | None = None
        self.free = 0

    def room(self) -> storagepool.Room:
        return storagepool.Room(capacity=2 * self.free, free=self.free)

    def names(self) -> list[str]:
        self._called("names", "")
        return list(self.volumes)

    def create_raw(self, name: str, size: int) -> None:
        self._called("create", name)
        if name in self.volumes:
            raise errors.VolumeExists(host="fake", pool=self.name, volume=name)
        self.volumes[name] = bytes(size)

    def write(self, name: str, data: bytes, *, offset: int = 0) -> None:
        self._called("write", name)
        volume = bytearray(self._found(name))
        kept = data[: self.stays]
        volume[offset : offset + len(kept)] = kept
        self.volumes[name] = bytes(volume)

    def read(self, name: str, *, limit: int) -> bytes:
        self._called("read", name)
        return self._found(name)

    def delete(self, name: str) -> None:
        self._called("delete", name)
        self.volumes.pop(name, None)

    # Private

    def _called(self, call: str, volume: str) -> None:
        self.calls.append((call, volume))
        self.before(call, volume)

    def _found(self, name: str) -> bytes:
        if name not in self.volumes:
            raise errors.VolumeNotFound(host="fake", pool=self.name, volume=name)
        return self.volumes[name]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(record, "time", clock)
    return clock


@pytest.fixture
def pool(clock: Clock) -> FakePool:
    return FakePool()


@pytest.fixture
def store(pool: FakePool) -> record.Store[Body]:
    return store_of(pool)


def store_of(pool: FakePool) -> record.Store[Body]:
    return record.Store(cast(storagepool.Pool, pool), Body, grace=GRACE)


def published(store: record.Store[Body], count: int) -> None:
    for after in range(count):
        store.publish("vol", Body(text=f"generation {after + 1}"), after=after)


# Bytes


@given(
    text=st.text(max_size=100),
    count=st.integers(-(2**63), 2**63),
    name=st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"])),
    generation=st.integers(1, 10**17),
)
@settings(max_examples=100, deadline=None)
def test_round_trip(text: str, count: int, name: str, generation: int) -> None:
    body = Body(text=text, count=count)
    data = record.encode(body, name, generation)
    assert len(data) % 4096 == 0
    assert record.decode(data, Body, name, generation) == body


@given(text=st.text(max_size=5000), where=st.floats(0, 1), flip=st.integers(1, 255))
@settings(max_examples=300, deadline=None)
def test_any_damaged_byte_is_refused(text: str, where: float, flip: int) -> None:
    data = bytearray(record.encode(Body(text=text), "vol", 3))
    data[round(where * (len(data) - 1))] ^= flip
    with pytest.raises((ValueError, record.TooNew)):
        record.decode(bytes(data), Body, "vol", 3)


def test_every_byte_of_a_small_record_is_guarded() -> None:
    whole = record.encode(Body(text="x"), "vol", 3)
    for position in range(len(whole)):
        data = bytearray(whole)
        data[position] ^= 1
        with pytest.raises((ValueError, record.TooNew)):
            record.decode(bytes(data), Body, "vol", 3)


@pytest.mark.parametrize(
    "size", [0, 1, 18, 19, 25, 60, 150, 4095], ids="{}-bytes".format
)
def test_truncated_is_refused(size: int) -> None:
    data = record.encode(Body(text="x" * 50), "vol", 3)
    with pytest.raises(ValueError):
        record.decode(data[:size], Body, "vol", 3)


@pytest.mark.parametrize(
    ("name", "generation"), [("other", 3), ("vol", 4)], ids=["name", "generation"]
)
def test_written_under_another_name_is_refused(name: str, generation: int) -> None:
    data = record.encode(Body(text="x"), "vol", 3)
    with pytest.raises(ValueError, match="another name"):
        record.decode(data, Body, name, generation)


class Wider(model.Struct, frozen=True):
    text: str
    count: int
    added: int


class Narrower(model.Struct, frozen=True):
    count: int


class Other(model.Struct, frozen=True):
    text: int


@pytest.mark.parametrize(
    "body",
    [Wider(text="x", count=1, added=2), Narrower(count=1), Other(text=1)],
    ids=["unknown-field", "missing-field", "other-type"],
)
def test_other_structure_is_refused(body: msgspec.Struct) -> None:
    with pytest.raises(ValueError):
        record.decode(record.encode(body, "vol", 1), Body, "vol", 1)


# Finding


def newer(monkeypatch: pytest.MonkeyPatch, name: str, generation: int) -> bytes:
    with monkeypatch.context() as patch:
        patch.setattr(record, "SCHEMA", max(record.READS) + 1)
        return record.encode(Body(text="new"), name, generation)


def test_newer_schema_is_left_untouched(
    pool: FakePool, store: record.Store[Body], monkeypatch: pytest.MonkeyPatch
) -> None:
    published(store, 1)
    pool.volumes["vol.rec.2"] = newer(monkeypatch, "vol", 2)
    before = dict(pool.volumes)
    with pytest.raises(errors.RecordTooNew, match="left untouched"):
        store.find("vol")
    with pytest.raises(errors.RecordTooNew):
        store.publish("vol", Body(text="mine"), after=1)
    with pytest.raises(errors.RecordTooNew):
        store.prune("vol")
    assert pool.volumes == before


def test_missing_record(store: record.Store[Body]) -> None:
    assert store.find("vol") is None
    with pytest.raises(errors.RecordMissing, match="no record vol"):
        store.read("vol")


def test_published_is_found(pool: FakePool, store: record.Store[Body]) -> None:
    stored = store.publish("vol", Body(text="a", count=7))
    assert (stored.name, stored.generation) == ("vol", 1)
    assert store_of(pool).read("vol") == stored


def test_name_with_spaces(store: record.Store[Body]) -> None:
    stored = store.publish("a disk.img", Body(text="a"))
    assert store.read("a disk.img") == stored


def test_torn_newest_leaves_the_older(
    pool: FakePool, store: record.Store[Body]
) -> None:
    published(store, 2)
    data = pool.volumes["vol.rec.2"]
    pool.volumes["vol.rec.2"] = data[:40].ljust(len(data), b"\0")
    assert store.read("vol").generation == 1


def test_no_valid_generation_is_broken(
    pool: FakePool, store: record.Store[Body]
) -> None:
    pool.volumes["vol.rec.1"] = b"half a record".ljust(4096, b"\0")
    with pytest.raises(errors.RecordBroken, match="none valid"):
        store.find("vol")


def test_removed_while_read_is_missing(
    pool: FakePool, store: record.Store[Body]
) -> None:
    published(store, 2)

    def remove(call: str, volume: str) -> None:
        if call == "read":
            pool.volumes.clear()

    pool.before = remove
    assert store.find("vol") is None


def test_pruned_while_read_is_found(pool: FakePool, store: record.Store[Body]) -> None:
    published(store, 1)
    other = FakePool()
    published(store_of(other), 4)

    def replace(call: str, volume: str) -> None:
        if call == "read" and volume == "vol.rec.1":
            pool.volumes = {k: v for k, v in other.volumes.items() if "1" not in k}

    pool.before = replace
    assert store.read("vol").generation == 4


def test_names_that_are_no_records(pool: FakePool, store: record.Store[Body]) -> None:
    for name in ("vol", "vol.rec.", "vol.rec.x", "vol.rec.01", "vol.rec.0", "a.rec.²"):
        pool.volumes[name] = b"somebody else's"
    pool.volumes["x.rec.2"] = pool.volumes["a.rec.b.rec.7"] = b""
    assert store.names() == ["a.rec.b", "x"]
    assert store.newest() == {"a.rec.b": 7, "x": 2}
    assert store.find("vol") is None


def test_newest_by_number_and_by_one_listing(
    pool: FakePool, store: record.Store[Body]
) -> None:
    published(store, 11)
    pool.volumes["vol.rec.12"] = b"half a record"
    pool.calls.clear()
    assert store.newest() == {"vol": 12}
    assert pool.calls == [("names", "")]


def test_load_is_of_one_generation(
    monkeypatch: pytest.MonkeyPatch, pool: FakePool, store: record.Store[Body]
) -> None:
    published(store, 2)
    pool.volumes["vol.rec.3"] = b"half a record"
    pool.volumes["vol.rec.4"] = newer(monkeypatch, "vol", 4)
    found = store.load("vol", 1)
    assert found == record.Stored("vol", 1, Body(text="generation 1"))
    assert store.load("vol", 3) is None
    assert store.load("vol", 5) is None
    with pytest.raises(errors.RecordTooNew):
        store.load("vol", 4)


# Publishing


def test_publish_after_another_generation(store: record.Store[Body]) -> None:
    published(store, 2)
    for after in (0, 1, 3):
        with pytest.raises(errors.RecordConflict, match=f"generation {after}"):
            store.publish("vol", Body(text="late"), after=after)
    assert store.read("vol").generation == 2


def test_follow(store: record.Store[Body]) -> None:
    first = store.publish("x", Body(text="one"))
    followed = store.follow(first, Body(text="two"))
    assert followed == store.read("x") == record.Stored("x", 2, Body(text="two"))


def test_follow_of_what_is_not_the_newest(
    pool: FakePool, store: record.Store[Body]
) -> None:
    first = store.publish("x", Body(text="one"))
    store.publish("x", Body(text="two"), after=1)
    with pytest.raises(errors.RecordConflict):
        store.follow(first, Body(text="mine"))
    store.publish("x", Body(text="three"), after=2)
    # The next number is free, and the newest is another one.
    pool.delete("x.rec.2")
    with pytest.raises(errors.RecordConflict):
        store.follow(first, Body(text="mine"))
    assert store.read("x").body.text == "three"


def test_follow_passes_over_what_was_never_written(
    pool: FakePool, store: record.Store[Body], clock: Clock
) -> None:
    first = store.publish("x", Body(text="one"))
    pool.create_raw("x.rec.2", 4096)
    assert store.follow(first, Body(text="two")).generation == 3
    assert store.read("x").body.text == "two"


def test_follow_that_took_long(
    pool: FakePool, store: record.Store[Body], clock: Clock
) -> None:
    """Another one may have passed over it: it is published once more."""
    first = store.publish("x", Body(text="one"))

    def slow(call: str, volume: str) -> None:
        if (call, volume) == ("create", "x.rec.2"):
            clock.now += GRACE

    pool.before = slow
    assert store.follow(first, Body(text="two")).generation == 3
    assert store.read("x").body.text == "two"


@pytest.mark.parametrize("free", [0, GiB], ids=["full", "not full"])
def test_publish_that_is_torn(
    pool: FakePool, store: record.Store[Body], free: int
) -> None:
    """Nobody else was there; and what did not become one is not waited for."""
    published(store, 1)
    pool.stays, pool.free = 30, free
    with pytest.raises(errors.StorageError, match="could not be written") as caught:
        store.publish("vol", Body(text="torn"), after=1)
    assert isinstance(caught.value, errors.DiskFull) is (free == 0)
    assert store.read("vol").generation == 1
    assert list(pool.volumes) == ["vol.rec.1"]


def test_dead_publisher_is_passed_over(
    pool: FakePool, store: record.Store[Body], clock: Clock
) -> None:
    published(store, 1)
    pool.volumes["vol.rec.2"] = bytes(4096)
    began = clock.now
    stored = store.publish("vol", Body(text="mine"), after=1)
    assert stored.generation == 3
    assert GRACE <= clock.now - began < GRACE + 1
    assert store.read("vol") == stored


def test_each_dead_publisher_gets_its_grace(
    pool: FakePool, store: record.Store[Body], clock: Clock
) -> None:
    """One that begins while another is waited for is not passed over at once."""
    began = clock.now
    pool.volumes["vol.rec.1"] = bytes(4096)

    def begin_another(call: str, volume: str) -> None:
        if clock.now >= began + 0.9 * GRACE:
            pool.volumes.setdefault("vol.rec.2", bytes(4096))

    pool.before = begin_another
    assert store.publish("vol", Body(text="mine")).generation == 3
    assert clock.now - began >= 1.9 * GRACE


def test_record_in_the_making_that_becomes_valid_wins(
    pool: FakePool, store: record.Store[Body], clock: Clock
) -> None:
    began = clock.now
    pool.volumes["vol.rec.1"] = bytes(4096)

    def finish(call: str, volume: str) -> None:
        if clock.now >= began + 2:
            data = record.encode(Body(text="theirs"), "vol", 1)
            pool.volumes["vol.rec.1"] = data

    pool.before = finish
    with pytest.raises(errors.RecordConflict):
        store.publish("vol", Body(text="mine"))
    assert store.read("vol").body.text == "theirs"


def slow_write(clock: Clock, *, times: int) -> Callable[[str, str], None]:
    left = [times]

    def slow(call: str, volume: str) -> None:
        if call == "write" and left[0]:
            left[0] -= 1
            clock.now += 0.6 * GRACE

    return slow


def test_slow_publisher_publishes_again(
    pool: FakePool, store: record.Store[Body], clock: Clock
) -> None:
    pool.before = slow_write(clock, times=2)
    stored = store.publish("vol", Body(text="slow"))
    assert stored.generation == 3
    assert store.read("vol") == stored


def test_storage_that_is_always_slow_is_said(
    pool: FakePool, store: record.Store[Body], clock: Clock
) -> None:
    pool.before = slow_write(clock, times=1000)
    with pytest.raises(errors.StorageError, match="record_grace"):
        store.publish("vol", Body(text="slow"))


def test_slow_publisher_that_was_passed_over_loses(
    pool: FakePool, store: record.Store[Body]
) -> None:
    other = store_of(pool)
    won: list[record.Stored[Body]] = []

    def overtake(call: str, volume: str) -> None:
        if call == "write" and not won:
            pool.before = lambda call, volume: None
            won.append(other.publish("vol", Body(text="other")))

    pool.before = overtake
    with pytest.raises(errors.RecordConflict):
        store.publish("vol", Body(text="slow"))
    assert store.read("vol") == won[0]


def test_publisher_that_was_pruned_loses(
    pool: FakePool, store: record.Store[Body]
) -> None:
    def prune(call: str, volume: str) -> None:
        if call == "read":
            pool.volumes.clear()

    pool.before = prune
    with pytest.raises(errors.RecordConflict):
        store.publish("vol", Body(text="slow"))


def test_error_of_the_host_is_not_hidden(
    pool: FakePool, store: record.Store[Body]
) -> None:
    def fail(call: str, volume: str) -> None:
        if call == "write":
            raise errors.HostUnreachable(host="fake", reason="gone")

    published(store, 1)
    pool.before = fail
    with pytest.raises(errors.HostUnreachable):
        store.publish("vol", Body(text="x"), after=1)
    assert store.read("vol").generation == 1


# Removing


def test_prune_keeps_two(pool: FakePool, store: record.Store[Body]) -> None:
    published(store, 5)
    store.prune("vol")
    assert sorted(pool.volumes) == ["vol.rec.4", "vol.rec.5"]
    store.prune("nothing")


def test_prune_keeps_what_is_in_the_making(
    pool: FakePool, store: record.Store[Body]
) -> None:
    published(store, 3)
    pool.volumes["vol.rec.4"] = bytes(4096)
    store.prune("vol")
    assert sorted(pool.volumes) == ["vol.rec.2", "vol.rec.3", "vol.rec.4"]


def test_remove_takes_the_lowest_first(
    pool: FakePool, store: record.Store[Body]
) -> None:
    published(store, 11)
    store.publish("vol2", Body(text="stays"))
    store.remove("vol")
    gone = [int(volume.rpartition(".")[2]) for c, volume in pool.calls if c == "delete"]
    assert gone == list(range(1, 12))
    assert list(pool.volumes) == ["vol2.rec.1"]


def test_interrupted_remove_revives_nothing(
    pool: FakePool, store: record.Store[Body]
) -> None:
    published(store, 3)

    def fail(call: str, volume: str) -> None:
        if (call, volume) == ("delete", "vol.rec.3"):
            raise errors.HostUnreachable(host="fake", reason="gone")

    pool.before = fail
    with pytest.raises(errors.HostUnreachable):
        store.remove("vol")
    assert store.read("vol").generation == 3


# Races


class Stepper(Clock):
    """Runs publishers one at a time; the schedule says whose step comes next.

    Each call of the pool, and each sleep, is a step.
    """

    def __init__(self, schedule: Iterator[tuple[int, float]]) -> None:
        super().__init__()
        self._schedule = schedule
        self._turns: dict[str, threading.Semaphore] = {}
        self._back = threading.Semaphore(0)
        self._alive: list[threading.Thread] = []

    def add(self, work: Callable[[], object]) -> None:
        name = f"publisher-{len(self._turns)}"
        self._turns[name] = threading.Semaphore(0)

        def run() -> None:
            try:
                self._wait()
                work()
            finally:
                self._alive.remove(threading.current_thread())
                self._back.release()

        thread = threading.Thread(target=run, name=name, daemon=True)
        self._alive.append(thread)
        thread.start()

    def step(self, call: str = "", volume: str = "") -> None:
        if threading.current_thread().name in self._turns:
            self._back.release()
            self._wait()

    def sleep(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.step("sleep")

    def run(self) -> None:
        while self._alive:
            # When the schedule ends, all take turns and time goes on slowly.
            who, passing = next(self._schedule, (None, 0.05))
            threads = self._alive
            thread = threads[0 if who is None else who % len(threads)]
            if who is None:
                threads.append(threads.pop(0))
            self.now += passing
            self._turns[thread.name].release()
            assert self._back.acquire(timeout=SECONDS)

    def _wait(self) -> None:
        mine = self._turns[threading.current_thread().name]
        assert mine.acquire(timeout=SECONDS)


class Died(Exception):
    pass


def compete(
    pool: FakePool, text: str, won: list[record.Stored[Body]], *, dies: bool
) -> None:
    """Publish the first generation; a publisher that dies does it before writing."""

    def die(call: str, volume: str) -> None:
        stepped(call, volume)
        if dies and call == "write" and threading.current_thread().name == me:
            raise Died

    me, stepped = threading.current_thread().name, pool.before
    pool.before = die
    try:
        won.append(store_of(pool).publish("vol", Body(text=text)))
    except (errors.RecordConflict, Died):
        pass


STEPS = st.tuples(
    st.integers(0, 5),
    st.sampled_from([0, 0, 0, 0, 0.1, 1, 0.45 * GRACE, 0.6 * GRACE, 1.1 * GRACE]),
)


@given(
    schedule=st.lists(STEPS, max_size=60),
    publishers=st.lists(st.booleans(), min_size=2, max_size=3),
    unfinished=st.integers(0, 2),
)
@settings(max_examples=300, deadline=None)
def test_never_two_winners(
    schedule: list[tuple[int, float]], publishers: list[bool], unfinished: int
) -> None:
    stepper, pool = Stepper(iter(schedule)), FakePool()
    pool.before = stepper.step
    won: list[record.Stored[Body]] = []
    for number in range(unfinished):
        pool.volumes[f"vol.rec.{number + 1}"] = bytes(4096)
    for number, dies in enumerate(publishers):
        text = f"of {number}"
        stepper.add(functools.partial(compete, pool, text, won, dies=dies))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "time", stepper)
        stepper.run()
        assert len(won) <= 1
        assert won or any(publishers), "nobody died, and nobody won"
        if won:
            assert store_of(pool).read("vol") == won[0]


def test_a_first_generation_that_was_never_written_is_no_record(
    pool: FakePool, store: record.Store[Body]
) -> None:
    pool.volumes["vol.rec.1"] = bytes(4096)
    assert store.find("vol") is None


# All of them


def reads(pool: FakePool) -> list[str]:
    found = [volume for call, volume in pool.calls if call == "read"]
    pool.calls.clear()
    return found


def test_catalog_reads_what_changed(pool: FakePool, store: record.Store[Body]) -> None:
    published(store, 1)
    store.publish("other", Body(text="x"))
    found = catalog.Catalog(store)
    assert [each.name for each in found.all()] == ["other", "vol"]
    reads(pool)
    store.publish("vol", Body(text="y"), after=1)
    pool.calls.clear()
    assert [each.body.text for each in found.all()] == ["x", "y"]
    # A first generation is read each time: its name may have been used before.
    assert reads(pool) == ["other.rec.1", "vol.rec.2"]
    assert list(found.all()) and reads(pool) == ["other.rec.1"]
    store.remove("other")
    assert [each.name for each in found.all()] == ["vol"]


def test_catalog_sees_a_name_that_is_used_again(
    pool: FakePool, store: record.Store[Body]
) -> None:
    store.publish("vol", Body(text="x"))
    found = catalog.Catalog(store)
    assert [each.body.text for each in found.all()] == ["x"]
    store.remove("vol")
    store.publish("vol", Body(text="y"))
    assert [each.body.text for each in found.all()] == ["y"]


def test_catalog_passes_over_what_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, pool: FakePool, store: record.Store[Body]
) -> None:
    published(store, 1)
    pool.volumes["vol.rec.2"] = b"half a record"
    pool.volumes["broken.rec.1"] = b"half a record"
    pool.volumes["newer.rec.3"] = newer(monkeypatch, "newer", 3)
    pool.volumes["unborn.rec.1"] = bytes(4096)
    (stored,) = catalog.Catalog(store).all()
    assert (stored.name, stored.generation) == ("vol", 1)
