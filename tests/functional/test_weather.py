# SPDX-License-Identifier: Apache-2.0
"""Bad weather: a copy equals its source, or the error says that it does not.

What is said to be known of the target is true, whatever happened.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

import sandbox
from sandbox import process, proxy
from tests.functional import copies
from tests.functional.copies import STRETCH, Copy, noise, pool_of, write_runs
from virtmigrate import (
    account,
    errors,
    host,
    known,
    limit,
    manifest,
    reading,
    storagepool,
    stream,
    translation,
    writing,
)
from virtmigrate.known import Known
from virtmigrate.manifest import Manifest
from virtmigrate.progress import Progress, Report
from virtmigrate.units import KiB, MiB, TiB

CALL = 2.0  # seconds that the peer may take to answer
RETRY = 20.0
SEED = 3


@pytest.fixture(scope="module")
def beta(box: sandbox.Sandbox) -> Iterator[sandbox.Host]:
    """The peer."""
    yield box.add_host("wth-beta", tcp=True)
    box.remove_host("wth-beta")


@pytest.fixture(scope="module")
def alpha(box: sandbox.Sandbox) -> Iterator[sandbox.Host]:
    """The source, where that is a volume."""
    yield box.add_host("wth-alpha")
    box.remove_host("wth-alpha")


@pytest.fixture
def spoiler(beta: sandbox.Host) -> Iterator[proxy.Proxy]:
    with proxy.before(beta) as made:
        yield made


def opened(uri: str, call: float = CALL, *, insecure: bool = False) -> host.Host:
    timeouts = host.Timeouts(connect=3.0, call=call)
    return host.Host(uri, timeouts=timeouts, allow_insecure=insecure)


@pytest.fixture
def peer(beta: sandbox.Host, spoiler: proxy.Proxy) -> Iterator[host.Host]:
    """The peer behind the proxy."""
    with opened(spoiler.through(beta.uri)) as made:
        yield made


@pytest.fixture
def pool(peer: host.Host, beta: sandbox.Host) -> storagepool.Pool:
    return pool_of(peer, beta.storage / "incoming")


@pytest.fixture
def directly(beta: sandbox.Host) -> Iterator[storagepool.Pool]:
    """The same pool, past the proxy."""
    with opened(beta.local_uri) as made:
        yield pool_of(made, beta.storage / "incoming")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """8 MiB and a bit; two of them are a hole."""
    path = tmp_path / "source"
    runs = [(0, 4 * MiB, "noise"), (2 * MiB, 2 * MiB + 77, "noise")]
    write_runs(path, runs)
    return path


@pytest.fixture
def counts(request: pytest.FixtureRequest) -> Callable[[int], int]:
    """How often something random is tried: ten times as much with --full."""
    is_full = request.config.getoption("--full")
    return lambda count: count * 10 if is_full else count


def resume(copy: Copy, directly: storagepool.Pool, **options: Any) -> None:
    """Go on in good weather; the result is the source."""
    copy.expect_known_is_true()
    copy.send(pool=directly, **options)
    assert copy.is_equal()
    copy.expect_known_is_true()


# A host that goes away


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "in-order"])
def test_dropped(
    spoiler: proxy.Proxy, pool: storagepool.Pool, source: Path, reset: bool
) -> None:
    copy = Copy(pool, source)
    assert copy.hurt(lambda: spoiler.drop(reset=reset), retry=RETRY) is None
    assert copy.is_equal()
    figures = copy.account.figures()
    assert figures.resent <= 2 * STRETCH
    assert figures.total == copy.size
    assert copy.survey().root() == copy.expected().root()
    copy.remove()


def test_refused_for_a_while(
    spoiler: proxy.Proxy, pool: storagepool.Pool, source: Path
) -> None:
    copy = Copy(pool, source)
    timer = threading.Timer(1.5, spoiler.accept)

    def hurt() -> None:
        spoiler.refuse()
        spoiler.drop()
        timer.start()

    assert copy.hurt(hurt, retry=RETRY) is None
    timer.join(10)
    assert copy.is_equal()
    copy.remove()


@pytest.mark.parametrize("retry", [0.0, 1.5])
def test_refused_for_good(
    spoiler: proxy.Proxy,
    pool: storagepool.Pool,
    directly: storagepool.Pool,
    source: Path,
    retry: float,
) -> None:
    copy = Copy(pool, source)
    lost: list[float] = []

    def hurt() -> None:
        spoiler.refuse()
        spoiler.drop()
        lost.append(time.monotonic())

    error = copy.hurt(hurt, retry=retry)
    assert isinstance(error, errors.HostUnreachable)
    # The last wait between two tries comes on top.
    assert retry <= time.monotonic() - lost[0] < retry + 4
    spoiler.accept()
    resume(copy, directly)
    assert copy.account.figures().resent <= 2 * STRETCH
    copy.remove()


@pytest.mark.parametrize("way", ["to_host", "from_host"])
@pytest.mark.parametrize("retry", [0.0, RETRY], ids=["once", "retry"])
def test_stalled_until_the_watchdog(
    spoiler: proxy.Proxy,
    pool: storagepool.Pool,
    directly: storagepool.Pool,
    source: Path,
    way: str,
    retry: float,
) -> None:
    direction = getattr(spoiler, way)
    copy = Copy(pool, source)
    timer = threading.Timer(CALL + 0.5, direction.release)
    timer.start()
    began = time.monotonic()
    try:
        error = copy.hurt(direction.stall, retry=retry)
    finally:
        timer.join(10)
        direction.release()
    assert time.monotonic() - began >= CALL
    if retry:
        assert error is None
        assert copy.is_equal()
    else:
        assert isinstance(error, errors.HostTimeout)
    resume(copy, directly)
    copy.remove()


def test_slow_is_not_dead(
    spoiler: proxy.Proxy, pool: storagepool.Pool, source: Path
) -> None:
    """Each chunk within the deadline; the whole takes longer than it."""
    copy = Copy(pool, source)
    spoiler.to_host.rate = 2 * MiB
    spoiler.from_host.delay = 0.05
    began = time.monotonic()
    copy.send()
    assert time.monotonic() - began > CALL
    assert copy.is_equal()
    copy.remove()


@pytest.mark.parametrize("how", ["killed", "frozen", "stopped"])
def test_peer_that_comes_back(
    beta: sandbox.Host, pool: storagepool.Pool, source: Path, how: str
) -> None:
    copy = Copy(pool, source)
    hurt = {"killed": beta.kill_libvirtd, "stopped": beta.stop_libvirtd}
    heal = beta.thaw if how == "frozen" else beta.start_libvirtd
    # Longer than the watchdog waits.
    timer = threading.Timer(CALL + 0.5 if how == "frozen" else 0.5, heal)

    def work() -> None:
        hurt.get(how, beta.freeze)()
        timer.start()

    try:
        assert copy.hurt(work, retry=RETRY) is None
    finally:
        timer.join(20)
        beta.start_libvirtd()
    assert copy.is_equal()
    assert copy.account.figures().total == copy.size
    assert copy.survey().root() == copy.expected().root()
    copy.remove()


@pytest.mark.parametrize("retry", [0.0, RETRY], ids=["once", "retry"])
def test_source_s_daemon_is_killed(
    alpha: sandbox.Host,
    pool: storagepool.Pool,
    directly: storagepool.Pool,
    source: Path,
    retry: float,
) -> None:
    with opened(alpha.local_uri) as here:
        first = Copy(pool_of(here, alpha.storage / "disks"), source)
        first.send()
        copy = Copy(pool, source)
        timer = threading.Timer(0.5, alpha.start_libvirtd)

        def hurt() -> None:
            alpha.kill_libvirtd()
            timer.start()

        error = copy.hurt(
            hurt, lambda progress: copy.send(progress, first.reader(), retry=retry)
        )
        timer.join(20)
        if retry:
            assert error is None
            assert copy.is_equal()
        else:
            assert isinstance(error, errors.HostError)
        resume(copy, directly, source=first.reader())
        first.remove()
    copy.remove()


@pytest.mark.parametrize("way", ["to_host", "from_host"])
def test_cut_at_a_byte(
    spoiler: proxy.Proxy,
    pool: storagepool.Pool,
    source: Path,
    counts: Callable[[int], int],
    way: str,
) -> None:
    chosen = random.Random(f"{SEED}{way}")
    direction = getattr(spoiler, way)
    before = direction.count
    probe = Copy(pool, source)
    probe.send()
    total = direction.count - before
    probe.remove()
    for _ in range(counts(12)):
        at, reset = chosen.randrange(1, total), chosen.random() < 0.5
        copy = Copy(pool, source)
        cuts = direction.cuts
        direction.cut_after(at, reset=reset)
        try:
            copy.send(retry=RETRY)
            direction.cut_after(1 << 60)
            assert copy.is_equal()
            copy.expect_known_is_true()
            figures = copy.account.figures()
            assert figures.resent <= (direction.cuts - cuts) * 2 * STRETCH
            assert figures.total == copy.size
        except BaseException as e:
            e.add_note(f"cut at byte {at} of {total}, reset={reset}")
            raise
        copy.remove()


def test_cut_and_resumed_again_and_again(
    spoiler: proxy.Proxy,
    pool: storagepool.Pool,
    directly: storagepool.Pool,
    source: Path,
    tmp_path: Path,
    counts: Callable[[int], int],
) -> None:
    """Each time by what the file says, as another process would."""
    chosen = random.Random(SEED)
    for _ in range(counts(3)):
        copy, path = Copy(pool, source), tmp_path / "known"
        copy.known = Known(Manifest(copy.size), path)
        cuts = chosen.randrange(2, 5)
        for _ in range(cuts):
            spoiler.to_host.cut_after(chosen.randrange(1, 5 * MiB))
            with contextlib.suppress(errors.HostError):
                copy.send()
            copy.known.close()
            loaded = known.load(path)
            assert loaded is not None
            copy.known = Known(loaded, path)
            copy.expect_known_is_true()
        spoiler.to_host.cut_after(1 << 60)
        resume(copy, directly)
        copy.known.close()
        figures = copy.account.figures()
        data = copy.size - 2 * MiB
        assert figures.sent + figures.resent <= data + cuts * 2 * STRETCH
        copy.remove()


# A process that is killed


def plan(copy: Copy, uri: str, tmp_path: Path, **more: Any) -> Path:
    path = tmp_path / f"plan-{random.getrandbits(32)}"
    values = {
        "uri": uri,
        "pool": copy.pool.name,
        "volume": copy.name,
        "source": str(copy.source),
        "size": copy.size,
        "tuning": {"workers": 2, "stretch": STRETCH},
        **more,
    }
    path.write_text(json.dumps(values))
    return path


def child(path: Path) -> "subprocess.Popen[str]":
    argv = [sys.executable, "-m", "tests.functional.copies", str(path)]
    pipe = subprocess.PIPE
    return subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True)


def run_to_its_end(path: Path, seconds: float = 30.0) -> dict[str, int]:
    with child(path) as made:
        try:
            out, err = made.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            made.kill()
            raise
    assert made.returncode == 0, err
    figures: dict[str, int] = json.loads(out)
    return figures


def test_killed_and_gone_on_with(
    beta: sandbox.Host,
    spoiler: proxy.Proxy,
    directly: storagepool.Pool,
    tmp_path: Path,
    counts: Callable[[int], int],
) -> None:
    source = tmp_path / "source"
    source.write_bytes(noise(16 * MiB))
    chosen = random.Random(SEED)
    for _ in range(counts(3)):
        copy, kept = Copy(directly, source), tmp_path / "known"
        kept.unlink(missing_ok=True)
        uri = spoiler.through(beta.uri)
        path = plan(copy, uri, tmp_path, known=str(kept))
        before = spoiler.to_host.count
        spoiler.to_host.rate = 32 * MiB
        with child(path) as made:
            spoiler.to_host.wait(before + chosen.randrange(50_000, 15 * MiB), 20)
            made.send_signal(signal.SIGKILL)
            assert made.wait(10) == -signal.SIGKILL
        spoiler.to_host.rate = 0
        loaded = known.load(kept)
        if loaded is not None:
            copies.expect_true(loaded, copy.target)
        figures = run_to_its_end(path)
        assert copy.is_equal()
        assert figures["total"] == copy.size
        # By the bytes that crossed, TLS and the protocol's heads counted.
        crossed = spoiler.to_host.count - before
        assert crossed <= 1.02 * (copy.size + 2 * STRETCH) + 100 * KiB
        assert copy.survey().root() == copy.expected().root()
        copy.remove()


# A flipped bit, where nothing but the proof can find it


@pytest.fixture
def plainly(beta: sandbox.Host) -> Iterator[tuple[proxy.Proxy, storagepool.Pool]]:
    with (
        proxy.before(beta, transport="tcp") as spoiler,
        opened(spoiler.through(beta.tcp_uri), 1.0, insecure=True) as peer,
    ):
        yield spoiler, pool_of(peer, beta.storage / "incoming")


def test_flipped_bit_is_never_accepted(
    plainly: tuple[proxy.Proxy, storagepool.Pool],
    beta: sandbox.Host,
    source: Path,
    counts: Callable[[int], int],
) -> None:
    spoiler, pool = plainly
    chosen, found = random.Random(SEED), 0
    data = source.stat().st_size - 2 * MiB
    for _ in range(counts(12)):
        copy = Copy(pool, source)
        at, bit = chosen.randrange(data), chosen.randrange(8)
        spoiler.to_host.flip_bit(at, bit)
        with contextlib.suppress(errors.Error):
            copy.send()
            is_equal = copy.is_equal()
            proven = copy.survey().root() == copy.expected().root()
            assert proven == is_equal, f"flipped at {at}, bit {bit}"
            found += not proven
            # The blocks that differ are sent again.
            copy.known = Known(copy.survey())
            copy.send()
            assert copy.is_equal()
        beta.start_libvirtd()
        copy.remove()
    assert found


def test_flipped_bit_while_the_copy_is_read_back(
    plainly: tuple[proxy.Proxy, storagepool.Pool],
    beta: sandbox.Host,
    source: Path,
    counts: Callable[[int], int],
) -> None:
    spoiler, pool = plainly
    chosen, copy, wrong = random.Random(SEED), Copy(pool, source), 0
    sent = copy.send()
    data = copy.size - 2 * MiB
    for _ in range(counts(8)):
        flipped = spoiler.from_host.flipped
        spoiler.from_host.flip_bit(chosen.randrange(data), chosen.randrange(8))
        with contextlib.suppress(errors.Error):
            root = copy.survey().root()
            assert spoiler.from_host.flipped == flipped + 1
            wrong += root != sent.root()
    assert wrong
    # A flip that is still to come would hit what follows.
    spoiler.drop()
    assert copy.is_equal()
    copy.remove()


def test_tls_does_not_let_it_through(
    spoiler: proxy.Proxy, pool: storagepool.Pool, source: Path
) -> None:
    copy = Copy(pool, source)
    spoiler.to_host.flip_bit(3 * MiB)
    copy.send(retry=RETRY)
    assert spoiler.to_host.flipped == 1
    assert copy.is_equal()
    # What was lost may not have been counted as sent yet.
    assert copy.account.figures().resent <= 2 * STRETCH
    copy.remove()


# Each call of libvirt


class Fault:
    """Makes the n-th call of a method of libvirt's go wrong.

    It also sees to it that each stream that was opened is finished or aborted.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *hosts: host.Host) -> None:
        self.calls = 0
        self.hits = 0
        self._hosts = hosts
        self._lock = threading.Lock()
        self._monkeypatch = monkeypatch
        self._streams: list[libvirt.virStream] = []
        self._ended: set[int] = set()
        for name in ("upload", "download"):
            self._watch_opening(name)
        for name in ("finish", "abort"):
            self._watch_end(name)

    def set(self, owner: type, name: str, wrong: "Wrong", at: int) -> None:
        real = getattr(owner, name)

        def call(mine: Any, *args: Any) -> Any:
            with self._lock:
                self.calls += 1
                is_hit = self.calls == at
                self.hits += is_hit
            if is_hit:
                return wrong(self, real, mine, *args)
            return real(mine, *args)

        self._monkeypatch.setattr(owner, name, call)

    def cut(self) -> None:
        """End this thread's connections."""
        for each in self._hosts:
            current = each._thread.current
            if current is not None:
                current.cut()

    def expect_all_ended(self) -> None:
        assert {id(each) for each in self._streams} <= self._ended

    # Private

    def _watch_opening(self, name: str) -> None:
        real = getattr(libvirt.virStorageVol, name)

        def call(vol: Any, stream: Any, *args: Any) -> Any:
            result = real(vol, stream, *args)
            self._streams.append(stream)
            return result

        self._monkeypatch.setattr(libvirt.virStorageVol, name, call)

    def _watch_end(self, name: str) -> None:
        real = getattr(libvirt.virStream, name)

        def call(mine: Any) -> Any:
            if name == "abort":
                self._ended.add(id(mine))
            result = real(mine)
            self._ended.add(id(mine))
            return result

        self._monkeypatch.setattr(libvirt.virStream, name, call)


Wrong = Callable[..., Any]
"""What happens instead of a call: gets the fault, the method and its arguments."""


def refused(fault: Fault, call: Any, *args: Any) -> Any:
    error = libvirt.libvirtError("out of luck")
    code, domain = libvirt.VIR_ERR_OPERATION_FAILED, libvirt.VIR_FROM_STORAGE
    error.err = (code, domain, "out of luck", 2, None, None, None, -1, -1)
    translation.keep(None, error.err)
    raise error


def cut_before(fault: Fault, call: Any, *args: Any) -> Any:
    fault.cut()
    return call(*args)


def cut_after(fault: Fault, call: Any, *args: Any) -> Any:
    """It was done, but what follows is not."""
    result = call(*args)
    fault.cut()
    return result


def short_send(fault: Fault, call: Any, mine: Any, data: bytes) -> Any:
    return call(mine, data[: max(1, len(data) // 3)])


def short_receive(fault: Fault, call: Any, mine: Any, wanted: int, *flags: int) -> Any:
    return call(mine, max(1, wanted // 3), *flags)


def answer(value: object) -> Wrong:
    def wrong(fault: Fault, call: Any, *args: Any) -> Any:
        return value

    wrong.__name__ = f"answer {value!r}"
    return wrong


VOL, CONN, STREAM = libvirt.virStorageVol, libvirt.virConnect, libvirt.virStream
POOL = libvirt.virStoragePool

FAULTS: list[tuple[type, str, Wrong]] = [
    *((owner, name, wrong)
      for owner, names in (
          (VOL, ("upload", "download", "XMLDesc", "infoFlags")),
          (CONN, ("newStream", "storagePoolLookupByName")),
          (POOL, ("storageVolLookupByName", "createXML")),
          (STREAM, ("send", "finish", "recvFlags", "recvHole")),
      )
      for name in names
      for wrong in (refused, cut_before, cut_after)),
    *((STREAM, "abort", wrong) for wrong in (cut_before, cut_after)),
    (STREAM, "send", short_send),
    *((STREAM, "send", answer(value)) for value in (0, -1, -2)),
    (STREAM, "recvFlags", short_receive),
    *((STREAM, "recvFlags", answer(value)) for value in (b"", -1, -2)),
    (STREAM, "recvHole", answer(0)),
]  # fmt: skip

CUTS = (cut_before, cut_after)
HARMLESS = (short_send, short_receive)


@pytest.fixture(scope="module")
def origin(
    alpha: sandbox.Host, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Copy]:
    """A volume of 20 MiB; 17 of them are a hole, longer than two looks."""
    path = tmp_path_factory.mktemp("origin") / "source"
    write_runs(path, [(0, 2 * MiB, "noise"), (17 * MiB, MiB, "noise")])
    with opened(alpha.local_uri) as made:
        copy = Copy(pool_of(made, alpha.storage / "disks"), path)
        copy.send()
        yield copy
        copy.remove()


# Trying again helps where a connection is lost.
CASES = [(*each, 0.0) for each in FAULTS] + [
    (*each, RETRY) for each in FAULTS if each[2] in CUTS
]


@pytest.mark.parametrize(
    ("owner", "name", "wrong", "retry"),
    CASES,
    ids=[
        f"{name}-{wrong.__name__}-{'retry' if retry else 'once'}"
        for _, name, wrong, retry in CASES
    ],
)
def test_each_call_in_turn(
    directly: storagepool.Pool,
    origin: Copy,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    owner: type,
    name: str,
    wrong: Wrong,
    retry: float,
) -> None:
    tuning = stream.Tuning(workers=2, stretch=MiB)

    def run(at: int) -> tuple[Fault, Copy | None, errors.Error | None]:
        with monkeypatch.context() as patch:
            fault = Fault(patch, directly.host, origin.pool.host)
            fault.set(owner, name, wrong, at)
            copy = None
            try:
                copy = Copy(directly, origin.source, tuning)
                copy.send(source=origin.reader(), retry=retry)
            except errors.Error as e:
                return fault, copy, e
            finally:
                fault.expect_all_ended()
            return fault, copy, None

    fault, copy, error = run(0)
    assert copy is not None and error is None
    copy.remove()
    count = fault.calls
    assert count
    points = list(range(1, count + 1))
    if not request.config.getoption("--full"):
        points = sorted({1, count, *random.Random(name).sample(points, 1)})
    for at in points:
        fault, copy, error = run(at)
        what = f"the {at}th of {count}: {error}"
        if copy is None:
            # Its volume was not made.
            assert error is not None, what
            continue
        if error is None:
            assert copy.is_equal(), what
            assert copy.survey().root() == copy.expected().root()
        if wrong in HARMLESS or (retry and wrong in CUTS):
            assert error is None, what
        elif fault.hits and must_be_told(name, wrong):
            assert error is not None, what
        resume(copy, directly, source=origin.reader())
        copy.remove()


def must_be_told(name: str, wrong: Wrong) -> bool:
    """Tell whether nothing can make up for it, and it is not a clean-up."""
    if wrong is cut_before:
        # What is received now came before.
        return name not in ("abort", "recvFlags", "recvHole")
    return wrong is refused or name == "send"


# Sources that change


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size - MiB)


def grow(path: Path) -> None:
    os.truncate(path, path.stat().st_size + MiB)


def rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4 * MiB - 10)
        file.write(b"something else")


@pytest.mark.parametrize("change", [shrink, grow, rewrite])
@pytest.mark.parametrize("kind", ["file", "volume"])
@pytest.mark.parametrize("percent", [1, 60, 100])
def test_source_that_changes(
    alpha: sandbox.Host,
    directly: storagepool.Pool,
    source: Path,
    kind: str,
    change: Callable[[Path], None],
    percent: int,
) -> None:
    with opened(alpha.local_uri) as here:
        first = Copy(pool_of(here, alpha.storage / "disks"), source)
        first.send()
        path = source if kind == "file" else first.target
        os.utime(path, ns=(1, 1))
        reader = None if kind == "file" else first.reader()
        copy = Copy(directly, source)
        error = copy.hurt(
            lambda: change(path),
            lambda progress: copy.send(progress, reader, retry=RETRY),
            at=percent,
        )
        # A volume that ends early is told so by its stream.
        assert isinstance(error, errors.SourceChanged | errors.ShortTransfer)
        copy.remove()
        first.remove()


# Disks that take no more


@pytest.mark.parametrize("limit_at", [100 * KiB, 3 * MiB + 5, 8 * MiB + 1])
def test_file_size_limit_at_the_peer(
    beta: sandbox.Host, directly: storagepool.Pool, source: Path, limit_at: int
) -> None:
    """libvirt forgets an error of the last messages: only reading proves."""
    copy = Copy(directly, source)
    with limited(beta, limit_at):
        try:
            copy.send(retry=RETRY)
        except errors.LibvirtFailed as e:
            assert "too large" in str(e)
    found = copy.survey()
    assert found.root() != copy.expected().root()
    copy.known = Known(found)
    resume(copy, directly)
    copy.remove()


@contextlib.contextmanager
def limited(beta: sandbox.Host, size: int) -> Iterator[None]:
    """Give libvirtd a limit that fails its writes instead of ending it."""
    beta.kill_libvirtd()
    (beta.directory / "run/libvirtd.pid").unlink(missing_ok=True)
    beta.run(["sh", "-c", "trap '' XFSZ; exec libvirtd --listen --daemon"])
    beta.wait_libvirtd()
    pid = str(beta.libvirtd_pid)
    process.run(["prlimit", "--pid", pid, f"--fsize={size}:unlimited"])
    try:
        yield
    finally:
        beta.kill_libvirtd()
        beta.start_libvirtd()


# Block devices


@pytest.fixture
def device(tmp_path: Path, beta: sandbox.Host) -> Iterator[Path]:
    """A loop device of 6 MiB and a bit, full of something old, in a pool."""
    backing = tmp_path / "device.img"
    size = 6 * MiB + 512 * 3
    backing.write_bytes(b"\xee" * size)
    done = process.run(["losetup", "--show", "--find", str(backing)])
    made = Path(done.stdout.strip())
    directory = beta.storage / "devices"
    directory.mkdir(exist_ok=True)
    node = directory / "disk"
    try:
        os.mknod(node, 0o600 | 0o060000, made.stat().st_rdev)
        yield node
    finally:
        node.unlink(missing_ok=True)
        process.run(["losetup", "--detach", str(made)])


def device_target(peer: host.Host, node: Path, size: int) -> writing.VolumeTarget:
    pool = pool_of(peer, node.parent)
    pool.refresh()
    return writing.VolumeTarget(pool, node.name, size)


def contents(node: Path, size: int) -> bytes:
    """What the device holds, past the page cache of nobody."""
    with node.open("rb") as file:
        return file.read(size)


def test_block_device_as_target(
    peer: host.Host, device: Path, tmp_path: Path, spoiler: proxy.Proxy
) -> None:
    """What lies there from before is overwritten, also where the source has holes."""
    source = tmp_path / "source"
    write_runs(source, [(MiB, MiB + 77, "noise"), (2 * MiB, 100, "text")], MiB)
    size = 6 * MiB + 512 * 3
    target, mine = device_target(peer, device, size), Known(Manifest.unknown(size))
    counted = account.Account()
    spoiler.to_host.cut_after(3 * MiB)
    with stream.Mover(stream.Tuning(2, STRETCH, retry=RETRY), counted=counted) as mover:
        length = source.stat().st_size
        sent = mover.copy(reading.FileSource(source, length), target, mine)
        expected = source.read_bytes().ljust(size, b"\0")
        assert contents(device, size) == expected
        assert counted.figures().total == size
        there = reading.VolumeSource(target.pool, device.name, size)
        assert mover.survey(there).root() == sent.root()
        assert mover.survey(reading.FileSource(device, size)).root() == sent.root()


def test_block_device_as_source(
    peer: host.Host, directly: storagepool.Pool, device: Path, tmp_path: Path
) -> None:
    size = 6 * MiB + 512 * 3
    with device.open("r+b") as file:
        file.write(noise(2 * MiB) + bytes(3 * MiB))
    path = tmp_path / "as-file"
    path.write_bytes(contents(device, size))
    target = device_target(peer, device, size)
    for source in (
        reading.FileSource(device, size),
        reading.VolumeSource(target.pool, device.name, size),
    ):
        copy = Copy(directly, path)
        copy.send(source=source)
        assert copy.is_equal()
        assert copy.account.figures().skipped == 3 * MiB
        assert copy.target.stat().st_blocks * 512 < 4 * MiB
        copy.remove()


@pytest.mark.parametrize("difference", [-512, 512])
def test_block_device_of_another_size(device: Path, difference: int) -> None:
    size = 6 * MiB + 512 * 3 + difference
    with (
        pytest.raises(errors.SourceChanged),
        reading.FileSource(device, size),
    ):
        pass


# Long blocks


def test_cut_in_the_middle_of_a_long_block(
    spoiler: proxy.Proxy,
    pool: storagepool.Pool,
    directly: storagepool.Pool,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(manifest, "_MAX_BLOCKS", 3)
    monkeypatch.setattr(stream, "HELD", MiB)
    copy = Copy(pool, source, stream.Tuning(2, MiB))
    assert copy.known.block_size == 4 * MiB
    spoiler.to_host.cut_after(2 * MiB + MiB // 2)
    with pytest.raises(errors.HostError):
        copy.send()
    resume(copy, directly)
    again = Copy(pool, source, stream.Tuning(2, MiB))
    spoiler.to_host.cut_after(2 * MiB + MiB // 2)
    again.send(retry=RETRY)
    assert again.is_equal()
    assert again.account.figures().total == again.size
    for each in (copy, again):
        each.remove()


# Memory and bandwidth


def test_memory_of_a_long_sparse_file(
    beta: sandbox.Host, directly: storagepool.Pool, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    write_runs(source, [(0, MiB, "noise"), (TiB - 2 * MiB, MiB, "noise")])
    copy = Copy(directly, source)
    kept = str(tmp_path / "known")
    path = plan(copy, beta.uri, tmp_path, known=kept, tuning={})
    figures = run_to_its_end(path, 60)
    assert figures["grown"] < 64 * MiB
    assert figures["sent"] <= 4 * MiB
    with copy.target.open("rb") as file:
        assert file.read(MiB) == noise(MiB, seed=MiB)
        file.seek(TiB - MiB)
        assert file.read() == noise(MiB, seed=MiB)
    copy.remove()


def test_memory_of_a_dense_file(
    beta: sandbox.Host, directly: storagepool.Pool, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    block = noise(MiB)
    with source.open("wb") as file:
        for index in range(512):
            file.write(index.to_bytes(8) + block[8:])
    copy = Copy(directly, source)
    path = plan(copy, beta.uri, tmp_path, tuning={}, survey=True)
    figures = run_to_its_end(path, 60)
    assert figures["grown"] < 64 * MiB
    assert figures["sent"] == copy.size
    copy.remove()


def test_bandwidth(directly: storagepool.Pool, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(noise(24 * MiB))
    copy, rate = Copy(directly, source), 10 * MiB
    began = time.monotonic()
    copy.send(limits=limit.Limits(limit.Limiter(rate)))
    seconds = time.monotonic() - began
    # Never faster; a busy machine may take its time.
    assert 0.9 * copy.size / rate <= seconds <= 1.5 * copy.size / rate + 1
    assert copy.is_equal()
    assert copy.account.figures().bottleneck is account.LIMIT
    copy.remove()


def test_one_host_as_source_and_target(
    directly: storagepool.Pool, beta: sandbox.Host, source: Path
) -> None:
    """Between two pools: on one connection per worker, one stream in the other."""
    first = Copy(pool_of(directly.host, beta.storage / "others"), source)
    first.send()
    copy, reports = Copy(directly, source), []

    def listen(report: Report) -> None:
        reports.append(report.done)

    progress = Progress(listen, interval=0)
    progress.phase("copying", copy.size)
    copy.send(progress, first.reader())
    assert copy.is_equal()
    assert max(reports) == copy.size
    for each in (first, copy):
        each.remove()
