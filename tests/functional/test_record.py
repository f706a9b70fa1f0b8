# SPDX-License-Identifier: Apache-2.0
"""Records in a pool of a real libvirt host, and publishers that race."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import sandbox
from virtmigrate import errors, host, model, record, storagepool

SECONDS = 60.0
RACES = 200


class Body(model.Struct, frozen=True):
    text: str


@pytest.fixture(scope="module")
def alpha(box: sandbox.Sandbox) -> Iterator[sandbox.Host]:
    yield box.add_host("rec-alpha")
    box.remove_host("rec-alpha")


@pytest.fixture
def directory(alpha: sandbox.Host, tmp_path: Path) -> Path:
    return alpha.storage / tmp_path.name


@pytest.fixture
def here(alpha: sandbox.Host) -> Iterator[host.Host]:
    with host.Host(alpha.local_uri) as opened:
        yield opened


@pytest.fixture
def there(alpha: sandbox.Host) -> Iterator[host.Host]:
    """The same host, as a peer reaches it."""
    with host.Host(alpha.uri) as opened:
        yield opened


def pool_of(opened: host.Host, directory: Path) -> storagepool.Pool:
    pool = storagepool.Pool(opened, directory.name)
    pool.ensure_directory(str(directory))
    return pool


def store_of(
    opened: host.Host, directory: Path, grace: float = 10.0
) -> record.Store[Body]:
    return record.Store(pool_of(opened, directory), Body, grace=grace)


@pytest.fixture
def store(here: host.Host, directory: Path) -> record.Store[Body]:
    return store_of(here, directory)


def test_life_of_a_record(store: record.Store[Body], directory: Path) -> None:
    assert store.find("vol") is None
    for after in range(4):
        store.publish("vol", Body(text=f"text {after + 1}"), after=after)
    found = store.read("vol")
    assert (found.generation, found.body.text) == (4, "text 4")
    assert store.names() == ["vol"]
    store.prune("vol")
    names = sorted(path.name for path in directory.iterdir())
    assert names == ["vol.rec.3", "vol.rec.4"]
    store.remove("vol")
    store.remove("vol")
    assert not list(directory.iterdir())


def test_seen_by_another_connection_at_once(
    store: record.Store[Body], there: host.Host, directory: Path
) -> None:
    other = store_of(there, directory)
    assert other.find("vol") is None
    store.publish("vol", Body(text="mine"))
    assert other.read("vol").body.text == "mine"
    other.publish("vol", Body(text="theirs"), after=1)
    assert store.read("vol").body.text == "theirs"
    with pytest.raises(errors.RecordConflict):
        store.publish("vol", Body(text="late"), after=1)


def test_file_is_what_was_encoded(store: record.Store[Body], directory: Path) -> None:
    body = Body(text="x" * 10_000)
    store.publish("vol", body)
    data = (directory / "vol.rec.1").read_bytes()
    assert data == record.encode(body, "vol", 1)


def test_large_record(store: record.Store[Body]) -> None:
    body = Body(text="domain " * 150_000)
    store.publish("vol", body)
    assert store.read("vol").body == body


def test_bit_that_flipped_on_disk(store: record.Store[Body], directory: Path) -> None:
    for after in range(2):
        store.publish("vol", Body(text="x" * 100), after=after)
    path = directory / "vol.rec.2"
    data = bytearray(path.read_bytes())
    data[60] ^= 4
    path.write_bytes(data)
    assert store.read("vol").generation == 1
    path.with_name("vol.rec.1").write_bytes(b"")
    with pytest.raises(errors.RecordBroken):
        store.read("vol")


@pytest.mark.parametrize("size", [0, 4096], ids=["created", "unwritten"])
def test_publisher_that_died(here: host.Host, directory: Path, size: int) -> None:
    store = store_of(here, directory, grace=0.5)
    store.publish("vol", Body(text="one"))
    store.pool.create_raw("vol.rec.2", size)
    assert store.read("vol").generation == 1
    assert store.publish("vol", Body(text="two"), after=1).generation == 3


def test_hostile_record(store: record.Store[Body], directory: Path) -> None:
    """No guest writes here; even if one did, nothing of it is believed."""
    header = b"QFI\xfb" + (3).to_bytes(4) + bytes(16) + (1 << 40).to_bytes(8)
    store.publish("vol", Body(text="one"))
    (directory / "vol.rec.2").write_bytes(header.ljust(4096, b"\0"))
    assert store.read("vol").generation == 1


def test_record_that_is_too_long(store: record.Store[Body], directory: Path) -> None:
    store.publish("vol", Body(text="one"))
    with (directory / "vol.rec.2").open("wb") as file:
        file.truncate(record.MAX_SIZE + 1)
    assert store.read("vol").generation == 1


class Race:
    """Publishers that publish each generation at the same time."""

    def __init__(self, **stores: record.Store[Body]) -> None:
        self.stores = stores
        self.won: dict[str, list[int]] = {name: [] for name in stores}
        self.lost: dict[str, list[int]] = {name: [] for name in stores}
        self._failed: list[BaseException] = []
        self._start = threading.Barrier(len(stores), timeout=SECONDS)

    def run(self, rounds: int) -> None:
        threads = [
            threading.Thread(target=self._race, args=(name, rounds))
            for name in self.stores
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        assert not self._failed

    def expect_one_winner_each(self, rounds: int) -> None:
        one, two = self.stores
        everything = list(range(1, rounds + 1))
        assert sorted(self.won[one] + self.won[two]) == everything
        assert self.won[one] == self.lost[two]
        assert self.won[two] == self.lost[one]
        last = one if rounds in self.won[one] else two
        for store in self.stores.values():
            assert store.read("vol") == record.Stored("vol", rounds, Body(text=last))

    def _race(self, name: str, rounds: int) -> None:
        try:
            for after in range(rounds):
                self._start.wait()
                self._publish(name, after)
                self._start.wait()
                if name == next(iter(self.stores)) and after % 10 == 9:
                    self.stores[name].prune("vol")
        except BaseException as e:
            self._failed.append(e)
            self._start.abort()

    def _publish(self, name: str, after: int) -> None:
        try:
            stored = self.stores[name].publish("vol", Body(text=name), after=after)
            self.won[name].append(stored.generation)
        except errors.RecordConflict:
            self.lost[name].append(after + 1)


def test_two_connections_race(
    here: host.Host, there: host.Host, directory: Path
) -> None:
    race = Race(here=store_of(here, directory), there=store_of(there, directory))
    race.run(RACES)
    race.expect_one_winner_each(RACES)


def test_two_hosts_race_in_one_directory(
    box: sandbox.Sandbox, here: host.Host, directory: Path
) -> None:
    beta = box.add_host("rec-beta")
    try:
        with host.Host(beta.uri) as other:
            stores = store_of(here, directory), store_of(other, directory)
            race = Race(alpha=stores[0], beta=stores[1])
            race.run(RACES // 2)
            race.expect_one_winner_each(RACES // 2)
    finally:
        box.remove_host("rec-beta")
