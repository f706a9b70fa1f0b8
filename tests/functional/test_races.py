# SPDX-License-Identifier: Apache-2.0
"""Two hosts on one shared directory, in a hurry, and killed: nothing is lost."""

import contextlib
import hashlib
import json
import queue
import random
import signal
import subprocess
import sys
import threading
import time
import types
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import sandbox
from sandbox.ceph import Ceph
from tests.functional import places
from tests.functional.sides import Kinds, Side
from virtmigrate import consistency, errors
from virtmigrate.units import MiB

SEED = 21
SIZE = 4 * MiB
LEASE = 1
SHARED = ["shared_dir", "rbd"]


@pytest.fixture(scope="module")
def hosts(box: sandbox.Sandbox) -> Iterator[tuple[sandbox.Host, sandbox.Host]]:
    yield box.add_host("race-alpha"), box.add_host("race-beta")
    box.remove_host("race-alpha")
    box.remove_host("race-beta")


@pytest.fixture
def sides(
    request: pytest.FixtureRequest,
    hosts: tuple[sandbox.Host, sandbox.Host],
    tmp_path: Path,
    cluster: Callable[[], Ceph],
) -> Iterator[tuple[Side, Side]]:
    """One backend for both."""
    kind = getattr(request, "param", "shared_dir")
    with contextlib.ExitStack() as stack:
        made = []
        for name, host in zip("ab", hosts, strict=True):
            make = places.PLACES[kind](host, "races", tmp_path / name, cluster)
            values = stack.enter_context(make) | {"image_max_count": 1}
            side = Side(
                host,
                tmp_path / name,
                values,
                f"the{kind}",
                image_lease=LEASE,
                lock_lease=LEASE,
                accept_moves=True,
            )
            stack.callback(side.close)
            made.append(side)
        yield made[0], made[1]


def image(tmp: Path, number: int) -> Path:
    path = tmp / f"image-{number}"
    data = hashlib.shake_128(b"%d" % number).digest(MiB)
    path.write_bytes(data + bytes(SIZE - 2 * MiB) + data)
    return path


def spawn(side: Side, path: Path) -> Any:
    made = types.SimpleNamespace(
        uuid=str(uuid.uuid4()),
        name=f"race-{uuid.uuid4().hex[:8]}",
        flavor=Kinds.flavor_of(side.name),
    )
    meta = {"id": path.name, "path": str(path), "disk_format": "raw"}
    side.driver.spawn(None, made, meta, power_on=False)
    return made


@pytest.mark.parametrize("sides", SHARED, indirect=True)
def test_sixteen_at_once_fetch_once(sides: tuple[Side, Side], tmp_path: Path) -> None:
    """Spawned from one image on two hosts."""
    path = image(tmp_path, 0)
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda n: (n % 2, spawn(sides[n % 2], path)), range(16)))
    caches = [each.driver.images.of(backend(each)) for each in sides]
    assert sum(cache.counters.misses for cache in caches) == 1
    (cached,) = caches[0].shelf.all()
    assert cached.volume == caches[1].shelf.all()[0].volume
    expected = sides[0].root(made[0][1])
    assert {sides[n].root(each) for n, each in made} == {expected}
    for number, each in made:
        sides[number].driver.destroy(None, each, None)
    caches[1].remove(cached)


def backend(side: Side) -> Any:
    return side.driver.node.backend(side.name)


@pytest.mark.timeout(3600)
def test_a_fetcher_that_is_killed(
    sides: tuple[Side, Side], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """At a random moment; another host goes on: one usable image, no orphan."""
    side, other = sides
    chosen = random.Random(SEED)
    for number in range(100 if request.config.getoption("--full") else 3):
        path = image(tmp_path, number)
        argv = [sys.executable, "-m", "tests.functional.killed_fetch", "-"]
        argv += [str(side.config), side.name, str(path)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(chosen.uniform(0, 1.2))
            process.send_signal(signal.SIGKILL)
        made = spawn(other, path)
        (cached,) = other.driver.images.of(backend(other)).shelf.all()
        assert cached.references == (other.disk(made)[1].name,)
        side.driver.settle()
        names = [n for n in backend(other).disks.names() if n.startswith("image")]
        assert names == [cached.volume.name]
        assert not [n for n in backend(side).incoming.names() if "image" in n]
        assert not list((tmp_path / "a" / "state" / "staging").glob("*"))
        other.driver.destroy(None, made, None)
        other.driver.images.of(backend(other)).remove(cached)


class Runner:
    """A racer, started again after each kill."""

    def __init__(self, side: Side, peer: Side, images: list[Path], seed: int) -> None:
        self._side = side
        self._peer = peer
        self._images = images
        self._random = random.Random(seed)
        self.rounds = 0
        self.kills = 0
        self.made: dict[str, str] = {}
        """Instances by the names of their images."""
        self.ended: set[str] = set()
        self.said: list[str] = []

    def run(self, rounds: int) -> None:
        while self.rounds < rounds:
            self._live(min(rounds, self.rounds + self._random.randint(5, 15)))

    # Private

    def _live(self, until: int) -> None:
        """Run a process for some rounds, and kill it in the middle of the next."""
        words = [self._side.config, self._side.name, self._peer.host.name]
        words += [self._random.randrange(2**30), *self._images]
        argv = [sys.executable, "-m", "tests.functional.racer", *map(str, words)]
        pipe = subprocess.PIPE
        with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True) as process:
            try:
                lines: queue.Queue[str] = queue.Queue()
                reader = threading.Thread(target=_read, args=(process.stdout, lines))
                reader.start()
                assert json.loads(lines.get(timeout=90)) == ["ready"]
                while self.rounds < until:
                    self._ask(process)
                    self._hear(lines, 120)
                self._ask(process)
                with contextlib.suppress(queue.Empty):
                    self._hear(lines, self._random.uniform(0, 1.5))
            finally:
                process.kill()
                self.kills += 1
        reader.join(30)
        while not lines.empty():
            self._note(json.loads(lines.get()))

    def _ask(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()

    def _hear(self, lines: "queue.Queue[str]", seconds: float) -> None:
        while not self._note(json.loads(lines.get(timeout=seconds))):
            pass

    def _note(self, line: list[str]) -> bool:
        """Take a line in; True for the end of a round."""
        if line[0] == "begins":
            self.ended.add(line[1])
            return False
        self.rounds += 1
        self.said.append(line[1])
        words = line[1].split()
        if words[0] == "spawn" and words[1] != "refused":
            self.made[words[1]] = words[2]
        return True


def _read(stream: Any, lines: "queue.Queue[str]") -> None:
    for line in stream:
        lines.put(line)


@pytest.mark.timeout(7200)
def test_races(
    sides: tuple[Side, Side], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Spawn, destroy, move, prune and settle, at once; each host is killed at times.

    No base is ever missing, no disk lost or taken from another, no lock held for
    ever.
    """
    rounds = 1000 if request.config.getoption("--full") else 24
    images = [image(tmp_path, number) for number in range(3)]
    for side in sides:
        side.driver.cleanup_host(side.host.name)
    a, b = sides
    runners = [Runner(a, b, images, SEED), Runner(b, a, images, SEED + 1)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda each: each.run(rounds // 2), runners))
    for side in sides:
        side.restart()
    left: list[str] = []
    for _ in range(20):
        left = [*a.driver.settle(), *b.driver.settle()]
        if not left:
            break
        time.sleep(LEASE)
    assert left == []
    expect_whole(sides, runners, tmp_path)


def expect_whole(
    sides: tuple[Side, Side], runners: list[Runner], tmp_path: Path
) -> None:
    """Each instance that was made, and not destroyed, is on one host, and whole."""
    made = runners[0].made | runners[1].made
    ended = runners[0].ended | runners[1].ended
    said = "\n".join(line for each in runners for line in each.said)
    where: dict[str, Side] = {}
    for side in sides:
        here = side.driver.node
        for name in here.instances.names():
            record = here.own_record(name)
            if record is not None and record.state.value in ("here", "arrived"):
                assert name not in where, (name, said)
                where[name] = side
    assert set(made) - ended <= set(where), said
    for name, side in where.items():
        found = types.SimpleNamespace(uuid=name)
        if not side.driver.instance_exists(found):
            # Killed while it was made, or destroyed: its caller does that again.
            assert name in ended or name not in made, said
            side.driver.destroy(None, found, None)
            continue
        if name in made:
            data = (tmp_path / made[name]).read_bytes()
            assert side.root(found) == told(data), (name, said)
        side.driver.power_on(None, found, None)
        assert side.state_of(found) == "running"
        side.driver.destroy(None, found, None)
    for side in sides:
        side.driver.settle()
        found_wrong = consistency.check(side.driver.node)
        done = consistency.repair(found_wrong)
        assert all(text for _, text in done), (done, said)
    cache = sides[0].driver.images.of(backend(sides[0]))
    for cached in cache.shelf.all():
        with contextlib.suppress(errors.ImageGone):
            cache.remove(cached)
    disks = backend(sides[0])
    names = {*disks.disks.names(), *disks.incoming.names()}
    assert not names, (names, said)
    assert disks.volumes.names() == [], said


def told(data: bytes) -> str:
    from tests.functional.test_imagecache import told as digest

    return digest(data)
