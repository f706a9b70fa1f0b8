# SPDX-License-Identifier: Apache-2.0
"""Locks of each kind of backend, on the real thing, between processes and hosts.

Those of a volume group are those of a directory: files of this host.
"""

import concurrent.futures
import contextlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import sandbox
from sandbox.ceph import Ceph
from tests.functional import etcd, places
from virtmigrate import check, errors, host
from virtmigrate.backends import base
from virtmigrate.backends.terms import Reach

LONG = 60.0
SHORT = 0.3

KINDS = {
    "dir": ("dir-ext4", Reach.HOST),
    "rbd": ("rbd", Reach.STORAGE),
    "shared_dir": ("shared_dir", Reach.HOST),
    "shared_dir-etcd": ("shared_dir", Reach.STORAGE),
    "shared_dir-files": ("shared_dir", Reach.STORAGE),
}
LEASED = ("rbd", "shared_dir-etcd")


@dataclass(frozen=True)
class Side:
    """A backend as one host has it."""

    backend: base.Backend
    conf: Path
    uri: str

    @contextlib.contextmanager
    def holder(self, *names: str) -> Iterator["Holder"]:
        """Another process of this host, which holds these locks."""
        argv = [sys.executable, "-m", "tests.functional.holding"]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [*argv, str(self.conf), self.uri, *names],
            stdin=pipe,
            stdout=pipe,
            text=True,
        )
        try:
            holder = Holder(process)
            assert holder.line() == "held"
            yield holder
        finally:
            process.kill()
            process.wait(LONG)
            for each in (process.stdin, process.stdout):
                assert each is not None
                with contextlib.suppress(BrokenPipeError):
                    each.close()

    def is_free(self, *names: str, timeout: float = SHORT) -> bool:
        try:
            with self.backend.locks.held(names, timeout=timeout):
                return True
        except errors.LockBusy:
            return False


class Holder:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def ask(self) -> str:
        """Return "ours" or "lost"."""
        assert self._process.stdin is not None
        print("?", file=self._process.stdin, flush=True)
        return self.line()

    def release(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self.line() == "released"

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)


@pytest.fixture(scope="module")
def hosts(box: sandbox.Sandbox) -> Iterator[tuple[sandbox.Host, sandbox.Host]]:
    yield box.add_host("lock-alpha"), box.add_host("lock-beta")
    for name in ("lock-alpha", "lock-beta"):
        box.remove_host(name)


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[etcd.Etcd]:
    if shutil.which("etcd") is None:
        pytest.skip("etcd is missing: run tools/setup")
    with etcd.running(tmp_path_factory.mktemp("etcd")) as found:
        yield found


@pytest.fixture(scope="module", params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    given = str(request.param)
    needed = places.NEEDS.get(KINDS[given][0], ())
    lacking = [name for name in needed if shutil.which(name) is None]
    if lacking:
        pytest.skip(f"{', '.join(lacking)} missing: run tools/setup")
    return given


@pytest.fixture(scope="module")
def sides(
    kind: str,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    cluster: Callable[[], Ceph],
) -> Iterator[tuple[Side, ...]]:
    """The backend as its hosts have it: one, or two."""
    place, reach = KINDS[kind]
    hosts = request.getfixturevalue("hosts")[: 2 if reach is Reach.STORAGE else 1]
    options: dict[str, object] = {}
    if kind == "shared_dir-etcd":
        options["lock_url"] = request.getfixturevalue("coordinator").url
    if kind == "shared_dir-files":
        options["lock_files"] = True
    tmp = tmp_path_factory.mktemp(kind)
    if place == "shared_dir":
        options["path"] = tmp / "directory"
    with contextlib.ExitStack() as stack:
        found = []
        for number, on in enumerate(hosts):
            own = tmp / str(number) / kind
            own.mkdir(parents=True)
            uri = places.uri_of(on)
            opened = stack.enter_context(host.Host(uri, name=on.name))
            made = places.backend(place, on, opened, own, cluster, **options)
            backend = stack.enter_context(made)
            found.append(Side(backend, own / "virtmigrate.conf", uri))
        yield tuple(found)


@pytest.fixture
def here(sides: tuple[Side, ...]) -> Side:
    return sides[0]


@pytest.fixture
def there(sides: tuple[Side, ...]) -> Side:
    """The other host where locks reach it, else another process of this one."""
    return sides[-1]


def test_reach(kind: str, here: Side) -> None:
    assert here.backend.capabilities.locks is KINDS[kind][1]
    assert (here.backend.locks.lease is not None) == (kind in LEASED)


def test_holders_exclude_each_other(here: Side, there: Side) -> None:
    with there.holder("vda.1", "vda.2") as holder:
        assert not here.is_free("vda.2")
        assert here.is_free("vda.3")
        holder.release()
        assert here.is_free("vda.2", timeout=LONG)
    with here.backend.locks.held(["vda.1"], timeout=LONG) as lease:
        lease.demand()
        assert not here.is_free("vda.1")
        assert not there.is_free("vda.1")


def test_a_killed_holder_loses_its_lock(here: Side, there: Side) -> None:
    with there.holder("vda.1") as holder:
        holder.signal(signal.SIGKILL)
        assert here.is_free("vda.1", timeout=LONG)


def test_a_holder_keeps_it_beyond_the_lease(here: Side, there: Side) -> None:
    with there.holder("vda.1") as holder:
        time.sleep(2.5 * places.LEASE)
        assert not here.is_free("vda.1")
        assert holder.ask() == "ours"
        holder.release()


def test_a_stopped_holder_finds_out(kind: str, here: Side, there: Side) -> None:
    with there.holder("vda.1") as holder:
        holder.signal(signal.SIGSTOP)
        if kind not in LEASED:
            assert not here.is_free("vda.1", timeout=2 * places.LEASE)
            holder.signal(signal.SIGCONT)
            assert holder.ask() == "ours"
            return
        with here.backend.locks.held(["vda.1"], timeout=LONG) as lease:
            holder.signal(signal.SIGCONT)
            assert holder.ask() == "lost"
            holder.release()
            # What it had is not given up for us.
            lease.demand()
            assert not there.is_free("vda.1")


def test_opposite_orders_do_not_wait_in_a_circle(here: Side, there: Side) -> None:
    def work(side: Side, names: list[str]) -> int:
        for _ in range(5):
            with side.backend.locks.held(names, timeout=LONG) as lease:
                lease.demand()
        return 5

    orders = (["a", "b", "c"], ["c", "b", "a"])
    with concurrent.futures.ThreadPoolExecutor() as pool:
        done = list(pool.map(work, (here, there), orders, timeout=LONG))
    assert done == [5, 5]


def test_waiting_ends_in_time_and_holds_nothing(here: Side, there: Side) -> None:
    with there.holder("b") as holder:
        with (
            pytest.raises(errors.LockBusy, match=r"lock b.* 0\.3 s"),
            here.backend.locks.held(["c", "b", "a"], timeout=SHORT),
        ):
            pass
        assert here.is_free("a", "c", timeout=LONG)
        holder.release()


def test_a_check_ends_the_wait(here: Side, there: Side) -> None:
    def cancel() -> None:
        raise errors.Cancelled

    with (
        there.holder("b"),
        pytest.raises(errors.Cancelled),
        here.backend.locks.held(["b"], timeout=LONG, check=cancel),
    ):
        pass


def test_a_lease_of_storage_that_stops_is_lost(
    kind: str, here: Side, request: pytest.FixtureRequest
) -> None:
    if kind not in LEASED:
        pytest.skip("a file's lock is the kernel's")
    found = "cluster" if kind == "rbd" else "coordinator"
    storage = request.getfixturevalue(found)
    storage = storage() if kind == "rbd" else storage
    with here.backend.locks.held(["vda.1"], timeout=LONG) as lease:
        storage.freeze()
        try:
            with pytest.raises(errors.LockLost, match=r"vda\.1"):
                for _ in range(int(10 * LONG)):
                    lease.demand()
                    time.sleep(0.1)
        finally:
            storage.thaw()
        with pytest.raises(errors.LockLost):
            lease.demand()
    assert here.is_free("vda.1", timeout=LONG)


def test_host_check_says_how_far_they_reach(kind: str, here: Side) -> None:
    rows = {each.what: each for each in check._backend(here.backend)}
    found = rows.get(f"backend {here.backend.name}: locks")
    if kind == "dir":
        assert found is None
    elif kind == "shared_dir":
        assert found is not None
        assert found.state is check.State.WARNING
        assert "lock_url" in found.remedy
    else:
        assert found is not None
        assert found.state is check.State.WORKS


def test_nothing_stays_in_the_cluster(kind: str, here: Side) -> None:
    if kind != "rbd":
        pytest.skip("of files only their names stay, and etcd's keys have leases")
    with here.backend.locks.held(["vda.9"], timeout=LONG):
        assert "lock.vda.9" in objects(here)
    assert "lock.vda.9" not in objects(here)


def objects(side: Side) -> list[str]:
    context = side.backend.cluster.context("virtmigrate")  # type: ignore[attr-defined]
    return [str(each.key) for each in context.list_objects()]
