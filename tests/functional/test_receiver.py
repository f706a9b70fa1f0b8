# SPDX-License-Identifier: Apache-2.0
"""A real receiver on a real host, asked over TLS as a source asks it."""

import contextlib
import dataclasses
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import blake3
import msgspec
import pytest

import sandbox
from virtmigrate import (
    asking,
    assistance,
    conf,
    errand,
    errors,
    host,
    mailbox,
    manifest,
    model,
    node,
    receiver,
    request,
    storagepool,
)
from virtmigrate.backends import base, layout
from virtmigrate.formats import DiskFormat
from virtmigrate.model import Hold, Proof, Role, TransferState, VolumeState
from virtmigrate.request import Answer, Request, State, Verb
from virtmigrate.units import GiB, KiB, MiB, TiB

SECONDS = 20.0
OPERATION = "0123456789abcdef"
OTHER = "fedcba9876543210"
INSTANCE = "11111111-2222-3333-4444-555555555555"
TILE = bytes(range(1, 252)) * 1060
assert len(TILE) > 256 * KiB


@pytest.fixture(scope="module")
def alpha(box: sandbox.Sandbox) -> Iterator[sandbox.Host]:
    yield box.add_host("rec-alpha")
    box.remove_host("rec-alpha")


@pytest.fixture
def place(alpha: sandbox.Host, tmp_path: Path) -> Iterator["Place"]:
    made = Place(alpha, tmp_path)
    try:
        yield made
    finally:
        made.close()


class Place:
    """The host `alpha` with pools of its own, and a source that asks it."""

    def __init__(self, alpha: sandbox.Host, tmp: Path) -> None:
        self.root = alpha.storage / tmp.name
        self.config = tmp / "virtmigrate.conf"
        self.config.write_text(
            f"[virtmigrate]\nuri = {alpha.local_uri}\naddress = {alpha.name}\n"
            f"state_path = {tmp}/state\nenabled_backends = local, other\n"
            "record_grace = 1\nreceiver_interval = 0.5\n"
            f"[local]\npath = {self.root}/local\n[other]\npath = {self.root}/other\n"
        )
        self.here = node.Node(conf.load(self.config))
        self.here.ensure()
        self.local = self.here.backends["local"]
        self.receiver = receiver.Receiver(self.here)
        self.source = host.Host(alpha.uri)
        self.mailbox = storagepool.Pool(self.source, mailbox.MAILBOX)
        self.files = self.root / "local/mailbox" / alpha.name
        self.incoming = self.root / "local/incoming"

    def close(self) -> None:
        self.receiver.stop()
        with self.here.host.session("cleaning up") as session:
            for pool in session.conn.listAllStoragePools(0):
                pool.destroy()
                pool.undefine()
        self.source.close()
        self.here.close()

    def fresh(self) -> receiver.Receiver:
        """A receiver as a restarted process would have it; the old one is gone."""
        self.receiver.stop()
        self.receiver = receiver.Receiver(self.here)
        return self.receiver

    def transfer(
        self,
        *volumes: model.TransferVolume,
        operation: str = OPERATION,
        state: TransferState = TransferState.RESERVED,
    ) -> None:
        body = model.Transfer(
            operation=operation,
            request="req",
            instance=INSTANCE,
            source="beta",
            peer=self.here.name,
            state=state,
            generation=0,
            volumes=volumes or (volume(),),
            created=time.time(),
        )
        store = self.here.mailbox.transfers
        found = store.find(operation)
        store.publish(operation, body, after=found.generation if found else 0)

    def put(self, data: bytes, name: str = f"vda.{OPERATION}", size: int = 0) -> Path:
        """An incoming volume as an upload leaves it."""
        self.local.incoming.create_raw(name, max(size, len(data)))
        path = self.incoming / name
        with path.open("r+b") as file:
            file.write(data)
        return path

    def asker(self, begin: float = 10.0, operation: str = OPERATION) -> asking.Asker:
        return asking.Asker(
            self.mailbox, operation, begin_timeout=begin, stall_timeout=SECONDS
        )

    def ask(
        self, verb: Verb, *, operation: str = OPERATION, **fields: Any
    ) -> tuple[Answer, manifest.Manifest | None]:
        """Ask while a receiver serves, and see that nothing of it stays."""
        wanted = Request(verb=verb, **fields)
        if self.receiver._thread is None:
            self.receiver.start()
        try:
            return self.asker(operation=operation).ask(wanted)
        finally:
            assert self.letters() == []

    def verify(self, size: int, **fields: Any) -> manifest.Manifest:
        fields.setdefault("volume", f"vda.{OPERATION}")
        _, found = self.ask(Verb.VERIFY, size=size, **fields)
        assert found is not None
        return found

    def letters(self) -> list[str]:
        return sorted(
            p.name for p in self.files.iterdir() if p.suffix in (".request", ".answer")
        )

    def post(self, wanted: Request, *, answer_size: int | None = None) -> bytes:
        """Put a request there as a source that is killed at once; return it."""
        data = request.encode(wanted)
        name = request.request_name(wanted.operation, wanted.number)
        size = request.answer_size(wanted) if answer_size is None else answer_size
        (self.files / request.answer_name(name)).write_bytes(bytes(size))
        (self.files / name).write_bytes(data)
        return data

    def answer(self, wanted: Request) -> Answer | None:
        """What stands in the answer's file now."""
        name = request.answer_name(
            request.request_name(wanted.operation, wanted.number)
        )
        data = (self.files / name).read_bytes()[: request.HEAD]
        with contextlib.suppress(ValueError):
            return request.decode_answer(data, name)
        return None

    def keep(
        self, name: str, data: bytes, **fields: object
    ) -> tuple[model.Volume, manifest.Manifest]:
        """A volume on the disks pool with record and manifest."""
        pool = self.local.disks
        found = told(data)
        body = model.Volume(
            name=name,
            pool=pool.name,
            path=pool.volume_path(name),
            format=DiskFormat.RAW,
            role=Role.ROOT,
            size=len(data),
            state=VolumeState.RETIRED,
            owner=INSTANCE,
            operation="op",
            origin="alpha",
            digest=found.digest(),
        )
        body = msgspec.structs.replace(body, **fields)
        self.local.allocate(body)
        Path(body.path).write_bytes(data)
        self.local.keep_manifest(name, found)
        return body, found


def volume(
    name: str = f"vda.{OPERATION}", *, size: int = 64 * TiB, **fields: object
) -> model.TransferVolume:
    made = model.TransferVolume(
        name=name,
        backend="local",
        source="vda.old",
        target="vda",
        role=Role.ROOT,
        format=DiskFormat.RAW,
        size=size,
        length=size,
        room=size,
    )
    return msgspec.structs.replace(made, **fields)


def told(data: bytes) -> manifest.Manifest:
    """The manifest of bytes, block by block."""
    found = manifest.Manifest(len(data))
    for index in range(found.count):
        start, end = found.span(index)
        found.add(index, data[start:end])
    return found


def content() -> bytes:
    """Noise, zeros, a block that is zeros but for its end, a short tail."""
    parts = [os.urandom(MiB), bytes(2 * MiB), bytes(MiB - 1) + b"x", b"tail"]
    return b"".join(parts)


def until(check: Callable[[], object], seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)


def job(**fields: object) -> Request:
    defaults: dict[str, object] = {
        "verb": Verb.VERIFY,
        "operation": OPERATION,
        "nonce": "00",
        "volume": f"vda.{OPERATION}",
        "size": 4 * KiB,
    }
    return Request(**{**defaults, **fields})  # type: ignore[arg-type]


# Who may read the volume

ACCESS = ["direct", "unreadable", "remote"]


@pytest.fixture
def access(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """This process may read files; or see the directory only; or nothing of it."""
    real = os.access

    def deny(path: str | Path, mode: int, **named: bool) -> bool:
        is_dir = Path(path).is_dir()
        return request.param == "unreadable" and is_dir and real(path, mode, **named)

    if request.param != "direct":
        monkeypatch.setattr(os, "access", deny)
    return str(request.param)


@pytest.mark.parametrize("access", ACCESS, indirect=True)
def test_verify(access: str, place: Place) -> None:
    data = content()
    place.transfer()
    path = place.put(data)
    answer, found = place.ask(Verb.VERIFY, volume=f"vda.{OPERATION}", size=len(data))
    assert found is not None and found.digest() == told(data).digest()
    assert answer.durable == (access != "remote")
    assert place.verify(len(data)).root() == told(data).root()
    with path.open("r+b") as file:
        file.seek(3 * MiB + 17)
        file.write(b"y")
    assert list(place.verify(len(data)).unlike(told(data))) == [3]


@pytest.mark.parametrize("access", ["direct", "remote"], indirect=True)
def test_verify_a_sample(access: str, place: Place) -> None:
    data = TILE[:MiB] * 40
    data = data[: 9 * MiB + 5]
    place.transfer()
    place.put(data)
    found = place.verify(len(data), sample=4, seed="abc123")
    drawn = request.sampled(found.count, 4, "abc123")
    assert len(drawn) == 4
    for index in range(found.count):
        wanted = told(data)[index] if index in drawn else manifest.UNKNOWN
        assert found[index] == wanted


@pytest.mark.parametrize("size", [0, 1, 4096, MiB, 2 * MiB + 1])
def test_verify_sizes(place: Place, size: int) -> None:
    data = (TILE * 9)[:size]
    place.transfer()
    place.put(data)
    assert place.verify(size).root() == told(data).root()


@pytest.mark.parametrize("access", ["direct", "remote"], indirect=True)
def test_verify_holes(access: str, place: Place) -> None:
    size = 70 * MiB + 3
    place.transfer()
    path = place.put(b"begin", size=size)
    with path.open("r+b") as file:
        file.seek(50 * MiB + 100)
        file.write(b"end")
    assert place.verify(size).root() == told(path.read_bytes()).root()


@pytest.mark.parametrize("access", ["direct", "remote"], indirect=True)
def test_verify_a_huge_volume_in_bounded_memory(access: str, place: Place) -> None:
    size = 8 * TiB
    place.transfer()
    path = place.put(b"begin", size=size)
    os.truncate(path, size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = place.verify(size)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * KiB < 300 * MiB
    expected = manifest.Manifest(size)
    expected.add(0, b"begin".ljust(expected.block_size, b"\0"))
    assert found.root() == expected.root()


def test_verify_another_size(place: Place) -> None:
    place.transfer()
    place.put(bytes(5000))
    with pytest.raises(errors.RequestRefused, match="5000"):
        place.verify(5001)


def test_verify_is_fast(place: Place) -> None:
    place.transfer()
    place.put(TILE)
    place.verify(len(TILE))
    asker, wanted = place.asker(), job(size=len(TILE))
    took = []
    for _ in range(5):
        began = time.monotonic()
        asker.ask(wanted)
        took.append(time.monotonic() - began)
    assert sorted(took)[2] < 0.3, took


# What a source gets who has nobody to ask


def test_nobody_there(place: Place) -> None:
    place.transfer()
    asker, began = place.asker(begin=0.5), time.monotonic()
    for shortest, longest in ((0.5, 6.0), (0.0, 0.4)):
        began = time.monotonic()
        with pytest.raises(errors.ReceiverSilent, match="to verify vda"):
            asker.ask(job())
        assert shortest <= time.monotonic() - began < longest
    assert place.letters() == []


def test_cancelled_while_it_asks(place: Place) -> None:
    place.transfer()

    def cancel(_done: int) -> None:
        raise errors.Cancelled

    with pytest.raises(errors.Cancelled):
        place.asker().ask(job(), cancel)
    assert place.letters() == []


def test_leftovers_of_a_killed_source(place: Place) -> None:
    """The same number lies there already, of another kind and size."""
    place.transfer()
    place.put(TILE)
    for number in range(3):
        place.post(job(number=number, verb=Verb.GROW, size=1))
    for _ in range(3):
        place.receiver.start()
        assert place.asker().ask(job(size=len(TILE)))[1] is not None
    assert not [name for name in place.letters() if ".0." in name]


def test_answer_to_another_request(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow receiver answers what a source asked before, by the same number."""
    place.transfer()
    name = request.request_name(OPERATION, 0)
    late = request.encode_answer(
        Answer(request=request.digest(b"older"), state=State.DONE, name="wrong"),
        request.answer_name(name),
    )
    real = place.mailbox.write

    def write(volume: str, data: bytes, *, offset: int = 0) -> None:
        real(volume, data, offset=offset)
        with (place.files / request.answer_name(name)).open("r+b") as file:
            file.write(late)

    monkeypatch.setattr(place.mailbox, "write", write)
    with pytest.raises(errors.ReceiverSilent):
        place.asker(begin=0.3).ask(job(verb=Verb.RELEASE))


def test_many_at_once(place: Place) -> None:
    """More askers than numbers, of one operation."""
    place.transfer()
    place.put(TILE)
    place.receiver.start()
    asker, failures = place.asker(begin=SECONDS), []
    roots: set[str] = set()

    def work() -> None:
        try:
            for _ in range(3):
                found = asker.ask(job(size=len(TILE)))[1]
                roots.add(found.root() if found else "")
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert not failures and roots == {told(TILE).root()}
    assert place.letters() == []


# Again, and after a death


def test_answered_once(place: Place) -> None:
    place.transfer()
    path = place.put(TILE)
    place.post(job(size=len(TILE)))
    assert place.receiver.look() == 1
    first = place.answer(job())
    assert first is not None and first.state is State.DONE
    path.write_bytes(bytes(len(TILE)))
    assert place.receiver.look() == 0
    assert place.fresh().look() == 0
    assert place.answer(job()) == first
    place.post(job(size=len(TILE), nonce="01"))
    assert place.receiver.look() == 1
    second = place.answer(job())
    assert second is not None and second.digest != first.digest


def test_begun_and_left(place: Place) -> None:
    """What a killed receiver was working on is worked on from the start."""
    place.transfer()
    place.put(TILE)
    data = place.post(job(size=len(TILE)))
    name = request.answer_name(request.request_name(OPERATION, 0))
    head = Answer(request=request.digest(data), state=State.WORKING, done=5)
    with (place.files / name).open("r+b") as file:
        file.write(request.encode_answer(head, name))
    assert place.receiver.look() == 1
    answer = place.answer(job())
    assert answer is not None and answer.digest == told(TILE).digest()


def big_volume(place: Place, size: int = GiB) -> Path:
    """Data enough to be in the middle of for a while."""
    place.transfer()
    path = place.put(b"", size=size)
    block = os.urandom(4 * MiB)
    with path.open("r+b") as file:
        for _ in range(0, size, len(block)):
            file.write(block)
    return path


def test_stopped_in_the_middle(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    big_volume(place, 64 * MiB)
    reading, going = threading.Event(), threading.Event()
    real = os.pread

    def slow(*args: object) -> bytes:
        reading.set()
        going.wait(0.5)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pread", slow)
    wanted = job(size=64 * MiB)
    place.post(wanted)
    place.receiver.start()
    assert reading.wait(SECONDS)
    began = time.monotonic()
    place.receiver.stop()
    assert time.monotonic() - began < 8
    answer = place.answer(wanted)
    assert answer is not None and answer.state is State.WORKING
    going.set()
    assert place.fresh().look() == 1
    answer = place.answer(wanted)
    assert answer is not None and answer.state is State.DONE


def test_nobody_waits_any_more(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that is gone takes its volumes with it: the work ends."""
    big_volume(place, 40 * MiB)
    real = os.pread

    def slow(*args: object) -> bytes:
        time.sleep(0.8)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pread", slow)
    place.receiver.start()
    with pytest.raises(errors.Cancelled):
        place.asker().ask(job(size=40 * MiB), cancelling_after(0.3))
    until(lambda: not place.receiver._desk.is_busy(), 10)


def test_libvirt_is_busy_for_a_moment(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is worked on goes on."""
    big_volume(place, 4 * MiB)
    reading, going = threading.Event(), threading.Event()
    real = os.pread

    def slow(*args: object) -> bytes:
        reading.set()
        going.wait(SECONDS)
        return real(*args)  # type: ignore[arg-type]

    def busy(*_args: object) -> list[str]:
        going.set()
        raise errors.PoolBusy(host="x", pool="x", seconds=1, reason="x")

    monkeypatch.setattr(os, "pread", slow)
    place.receiver.start()
    asked = threading.Thread(
        target=place.asker().ask, args=(job(size=4 * MiB),), daemon=True
    )
    asked.start()
    assert reading.wait(SECONDS)
    (working,) = place.receiver._desk._jobs.values()
    monkeypatch.setattr(place.here.mailbox.pool, "names", busy)
    (place.files / f"{OPERATION}.9.request").write_bytes(b"")
    asked.join(SECONDS)
    assert working.is_final


@pytest.mark.usefixtures("quick")
def test_signs_of_life(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that waits no longer than a second between two of them gets through."""
    big_volume(place, 24 * MiB)
    real = os.pread

    def slow(*args: object) -> bytes:
        time.sleep(0.2)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pread", slow)
    place.receiver.start()
    asker = asking.Asker(place.mailbox, OPERATION, begin_timeout=10, stall_timeout=1.7)
    seen: list[int] = []
    answer, _ = asker.ask(job(size=24 * MiB), seen.append)
    assert answer.done == 24 * MiB
    assert seen == sorted(seen) and len(set(seen)) >= 3


@pytest.mark.usefixtures("quick")
def test_waiting_for_fsync(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read meanwhile, and the source sees that it goes on."""
    place.transfer()
    place.put(TILE)
    going, began = threading.Event(), time.monotonic()
    monkeypatch.setattr(os, "fsync", lambda _fd: going.wait(SECONDS))

    def listen(_done: int) -> None:
        if time.monotonic() - began > 3:
            going.set()

    place.receiver.start()
    asker = asking.Asker(place.mailbox, OPERATION, begin_timeout=10, stall_timeout=1.4)
    asker.ask(job(size=len(TILE)), listen)


@pytest.mark.usefixtures("quick")
def test_waiting_for_a_thread(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("virtmigrate.desk._RUNNING_EACH", 0)
    place.transfer()
    place.put(TILE)
    place.receiver.start()
    asker = asking.Asker(place.mailbox, OPERATION, begin_timeout=10, stall_timeout=1.4)
    with pytest.raises(errors.Cancelled):
        asker.ask(job(size=len(TILE)), cancelling_after(3))


@pytest.mark.usefixtures("quick")
def test_signs_of_life_alone_are_not_believed_for_ever(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("virtmigrate.desk._RUNNING_EACH", 0)
    monkeypatch.setattr(asking, "_LIVELY", 2.0)
    place.transfer()
    place.put(TILE)
    place.receiver.start()
    asker = asking.Asker(place.mailbox, OPERATION, begin_timeout=10, stall_timeout=2)
    with pytest.raises(errors.ReceiverSilent):
        asker.ask(job(size=len(TILE)), cancelling_after(15))


@pytest.mark.parametrize("verb", ["hold", "reuse", "grow", "reclaim"])
def test_cancel_is_heard(
    place: Place, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("virtmigrate.desk._RUNNING_EACH", 0)
    image = volume(
        f"img.{OPERATION}", size=len(TILE), role=Role.IMAGE, digest=told(TILE).digest()
    )
    place.transfer(volume(), image)
    stored = place.here.mailbox.transfers.read(OPERATION).body
    place.receiver.start()
    helps = assistance.Assistance(place.asker())
    cancel = cancelling_after(0.5)
    asks: dict[str, Callable[[], object]] = {
        "hold": lambda: helps.hold(stored, lambda: cancel(0)),
        "reuse": lambda: helps.reuse(stored.volumes[0].name, 9, lambda: cancel(0)),
        "grow": lambda: helps.grow(stored.volumes[0].name, 1, 9, lambda: cancel(0)),
        "reclaim": lambda: helps.reclaim("local", 9, lambda: cancel(0)),
    }
    began = time.monotonic()
    with pytest.raises(errors.Cancelled):
        asks[verb]()
    assert time.monotonic() - began < 9 and place.letters() == []


def test_an_image_on_another_is_not_asked_for(place: Place) -> None:
    """Its root says nothing of what is below."""
    body, found = place.keep(
        "image", TILE, role=Role.IMAGE, state=VolumeState.USABLE, owner="cache"
    )
    name = f"img.{OPERATION}"
    image = volume(name, size=body.size, role=Role.IMAGE, digest=found.digest())
    place.transfer(image)
    stored = place.here.mailbox.transfers.read(OPERATION).body
    place.receiver.start()
    helps = assistance.Assistance(place.asker())
    (held,) = helps.hold(stored).volumes
    assert held.held and held.name == "image"
    upon = msgspec.structs.replace(image, backing=f"base.{OPERATION}")
    (sent,) = helps.hold(msgspec.structs.replace(stored, volumes=(upon,))).volumes
    assert not sent.held and sent.role is Role.LAYER and sent.digest is None


def cancelling_after(seconds: float) -> Callable[[int], None]:
    deadline = time.monotonic() + seconds

    def cancel(_done: int) -> None:
        if time.monotonic() > deadline:
            raise errors.Cancelled

    return cancel


def test_stuck_in_the_middle(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    big_volume(place, 4 * MiB)
    going = threading.Event()
    real = os.pread

    def stuck(*args: object) -> bytes:
        going.wait(SECONDS)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pread", stuck)
    place.receiver.start()
    asker = asking.Asker(place.mailbox, OPERATION, begin_timeout=5, stall_timeout=1.5)
    began = time.monotonic()
    with pytest.raises(errors.ReceiverSilent):
        asker.ask(job(size=4 * MiB))
    assert time.monotonic() - began < 10
    going.set()
    until(lambda: not place.receiver._desk.is_busy())
    assert place.letters() == []


@contextlib.contextmanager
def process(place: Place) -> Iterator[subprocess.Popen[bytes]]:
    """The real command."""
    argv = [sys.executable, "-m", "virtmigrate.cli.main"]
    argv += ["--config-file", str(place.config), "receiver"]
    with subprocess.Popen(argv, stderr=subprocess.PIPE) as running:
        try:
            yield running
        finally:
            running.kill()


def test_killed_in_the_middle(place: Place) -> None:
    big_volume(place)
    wanted = job(size=GiB)
    with process(place) as running:
        place.post(wanted)
        until(lambda: place.answer(wanted))
        os.kill(running.pid, signal.SIGKILL)
        running.wait(SECONDS)
    answer = place.answer(wanted)
    assert answer is not None and answer.state is State.WORKING
    with process(place) as running:
        until(lambda: place.answer(wanted).state is State.DONE)  # type: ignore[union-attr]
        os.kill(running.pid, signal.SIGTERM)
        assert running.wait(5) == 0
        assert running.stderr is not None and running.stderr.read() == b""


# One at a time


def test_two_receivers(place: Place) -> None:
    place.transfer()
    place.put(TILE)
    first, second = place.receiver, receiver.Receiver(place.here)
    place.verify(len(TILE))
    second.start()
    try:
        looks = second.looks
        place.verify(len(TILE))
        assert second.look() == 0 and second.looks == looks == 0
        first.stop()
        until(lambda: second.looks)
        assert place.asker().ask(job(size=len(TILE)))[1] is not None
    finally:
        second.stop()


def test_not_from_afar(alpha: sandbox.Host, place: Place) -> None:
    """A driver that is bound to a peer's URI leaves the peer to its own receiver."""
    place.here.conf.set_override("uri", alpha.uri, "virtmigrate")
    place.receiver.serve(threading.Event())
    assert place.receiver.looks == 0


# How it notices


@pytest.mark.parametrize("access", ["direct", "remote"], indirect=True)
def test_idle_costs_nothing(access: str, place: Place) -> None:
    place.transfer(state=TransferState.SETTLED)
    place.receiver.start()
    until(lambda: place.receiver.looks)
    time.sleep(0.1)
    before = place.receiver.looks
    time.sleep(1.7)
    looks = place.receiver.looks - before
    assert looks == 0 if access == "direct" else 1 <= looks <= 5


@pytest.mark.parametrize("access", ["remote"], indirect=True)
def test_looks_often_while_a_transfer_is_open(
    place: Place, access: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.here.conf.set_override("receiver_interval", 30.0, "virtmigrate")
    place.transfer()
    place.put(TILE)
    began = time.monotonic()
    place.verify(len(TILE))
    place.verify(len(TILE))
    assert time.monotonic() - began < 15


def test_answers_do_not_wake_it(place: Place) -> None:
    place.receiver.start()
    until(lambda: place.receiver.looks)
    before = place.receiver.looks
    for number in range(5):
        (place.files / f"{OPERATION}.{number}.answer").write_bytes(b"x")
    time.sleep(0.2)
    assert place.receiver.looks == before


def test_stops_at_once(place: Place) -> None:
    place.receiver.start()
    until(lambda: place.receiver.looks)
    time.sleep(0.2)
    began = time.monotonic()
    place.receiver.stop()
    assert time.monotonic() - began < 3


def test_starts_while_libvirtd_is_away(alpha: sandbox.Host, place: Place) -> None:
    """The interval is for standing by; what failed is tried again soon."""
    place.here.conf.set_override("receiver_interval", 30.0, "virtmigrate")
    place.transfer()
    place.put(TILE)
    alpha.kill_libvirtd()
    try:
        place.receiver.start()
        time.sleep(0.5)
    finally:
        alpha.start_libvirtd()
    place.verify(len(TILE))


def test_libvirtd_comes_back(alpha: sandbox.Host, place: Place) -> None:
    place.transfer()
    place.put(TILE)
    place.verify(len(TILE))
    alpha.kill_libvirtd()
    alpha.start_libvirtd()
    assert place.asker().ask(job(size=len(TILE)))[1] is not None


# Hostile requests


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "none of this operation's"),
        (f".vda.{OPERATION}", "none of this operation's"),
        ("vda", "none of this operation's"),
        (f"vda.{OTHER}", "none of this operation's"),
        (f"vdb.{OPERATION}", "no such volume"),
        (f"shared.{OPERATION}", "no such volume"),
        (f"held.{OPERATION}", "no such volume"),
        (f"small.{OPERATION}", "smaller"),
        (f"gone.{OPERATION}", "no volume gone"),
    ],
)
def test_hostile_names(place: Place, name: str, reason: str) -> None:
    place.transfer(
        volume(),
        volume(f"shared.{OPERATION}", shared=True),
        volume(f"held.{OPERATION}", held=True),
        volume(f"small.{OPERATION}", size=100),
        volume(f"gone.{OPERATION}"),
        # What a hostile source wrote into its own transfer is believed no more.
        volume(f"../disks/vda.{OPERATION}"),
        volume(f"vda.{OTHER}"),
        volume(f".vda.{OPERATION}"),
        volume(""),
    )
    for each in (f"shared.{OPERATION}", f"vda.{OTHER}", f"small.{OPERATION}"):
        place.put(bytes(4096), each)
    refuse_all(place, name, [reason, "nothing is left"])


@pytest.mark.parametrize(
    "name",
    [
        f"../disks/vda.{OPERATION}",
        f"/etc/passwd.{OPERATION}",
        f"vda.{OPERATION}\n",
        f"x\n2026-11-21 CRITICAL forged .{OPERATION}",
        f"v\u2028da.{OPERATION}",
    ],
)
def test_names_that_nobody_has(
    place: Place, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """They are passed over, and the log has them on one line, if at all."""
    caplog.set_level("DEBUG", logger="virtmigrate")
    place.transfer(volume(name))
    wanted = job(volume=name, backend="other")
    place.post(wanted)
    assert place.receiver.look() == 0
    assert place.answer(wanted) is None
    said = [record.getMessage() for record in caplog.records]
    assert any("passed over" in text for text in said)
    assert not any(len(text.splitlines()) > 1 for text in said)


def test_an_answer_in_many_lines(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.transfer()

    def perform(*_: object) -> errand.Outcome:
        raise errand.Refused("no\n2026-11-21 CRITICAL forged")

    monkeypatch.setattr(place.receiver._errands, "perform", perform)
    with pytest.raises(errors.RequestRefused, match=r"no\?2026") as caught:
        place.ask(Verb.RELEASE)
    assert "\n" not in str(caught.value)


def refuse_all(place: Place, name: str, reasons: list[str], size: int = 4096) -> None:
    """See that every verb on a volume is refused, for one of the reasons."""
    wanted = [
        job(
            verb=verb,
            number=number,
            volume=name,
            size=size,
            piece=request.piece_name(name, 0) if verb is Verb.IMPORT else "",
        )
        for number, verb in enumerate(ON_VOLUMES)
    ]
    for each in wanted:
        place.post(each)
    assert place.receiver.look() == len(wanted)
    for each in wanted:
        answer = place.answer(each)
        assert answer is not None and answer.state is State.FAILED, each
        found = [reason for reason in (*reasons, NO_PIECES) if reason in answer.reason]
        assert found, (each, answer)
        if "nothing is left" in found:
            assert each.verb is Verb.REUSE
        if NO_PIECES in found:
            assert each.verb is Verb.IMPORT


NO_PIECES = "takes no pieces"

ON_VOLUMES = (Verb.VERIFY, Verb.GROW, Verb.IMPORT, Verb.REUSE)


@pytest.mark.parametrize("kind", ["symlink", "hardlink", "fifo", "directory"])
def test_no_plain_file(place: Place, kind: str) -> None:
    secret = place.root / "secret"
    secret.write_bytes(TILE[:4096])
    path = place.incoming / f"vda.{OPERATION}"
    if kind == "symlink":
        path.symlink_to(secret)
    elif kind == "hardlink":
        path.hardlink_to(secret)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    place.transfer()
    with contextlib.suppress(errors.Error):
        place.local.incoming.refresh()
    # libvirt may not even list it.
    reasons = ["is no plain file", f"no volume vda.{OPERATION}", "nothing is left"]
    reasons.append("bytes and not 8192")
    refuse_all(place, path.name, reasons, size=8192)
    refuse_all(place, path.name, reasons[:3])
    assert secret.read_bytes() == TILE[:4096]
    assert not list((place.root / "other/incoming").iterdir())


@pytest.mark.parametrize("state", [s for s in TransferState if s.value != "reserved"])
def test_transfer_that_is_not_open(place: Place, state: TransferState) -> None:
    place.transfer(state=state)
    place.put(TILE)
    place.post(job(size=len(TILE)))
    place.post(job(number=1, verb=Verb.RELEASE))
    assert place.receiver.look() == 2
    answers = place.answer(job()), place.answer(job(number=1))
    assert [a.state for a in answers if a] == [State.FAILED, State.DONE]
    assert state.value in answers[0].reason  # type: ignore[union-attr]


def test_no_transfer(place: Place) -> None:
    with pytest.raises(errors.RequestRefused, match="no such transfer"):
        place.ask(Verb.RELEASE)


def test_transfer_of_another_name(place: Place) -> None:
    """A record that says it is of another operation is none of this one."""
    place.transfer(volume(f"vda.{OTHER}"), operation=OTHER)
    stored = place.here.mailbox.transfers.read(OTHER)
    place.here.mailbox.transfers.publish(OPERATION, stored.body)
    with pytest.raises(errors.RequestRefused, match="no such transfer"):
        place.ask(Verb.RELEASE)


def test_backend_that_is_not_there(place: Place) -> None:
    place.transfer()
    place.put(TILE)
    with pytest.raises(errors.RequestRefused, match="no such backend"):
        place.ask(Verb.RECLAIM, size=1, backend="nowhere")


SPOILT: dict[str, Callable[[Path, Path], object]] = {
    "oversized": lambda asked, _: os.truncate(asked, 8 * MiB),
    "undersized": lambda asked, _: os.truncate(asked, 4095),
    "empty": lambda asked, _: asked.write_bytes(b""),
    "garbage": lambda asked, _: asked.write_bytes(os.urandom(4096)),
    "unwritten": lambda asked, _: asked.write_bytes(bytes(4096)),
    "torn": lambda asked, _: asked.write_bytes(
        asked.read_bytes()[:60].ljust(4096, b"\0")
    ),
    "of another name": lambda asked, _: asked.write_bytes(
        request.encode(job(number=8))
    ),
    "answer missing": lambda _, answer: answer.unlink(),
    "answer too small": lambda _, answer: os.truncate(answer, 4096),
    "answer too large": lambda _, answer: os.truncate(answer, TiB),
    "number too high": lambda asked, _: asked.rename(
        asked.with_name(f"{OPERATION}.64.request")
    ),
    "dots in its name": lambda asked, _: asked.rename(
        asked.with_name(f"..{OPERATION}.7.request")
    ),
}


@pytest.mark.parametrize("how", SPOILT)
def test_bad_request_beside_good_ones(place: Place, how: str) -> None:
    place.transfer()
    place.put(bytes(4096))
    place.post(job(number=7))
    asked, answer_file = (
        place.files / f"{OPERATION}.7.{kind}" for kind in ("request", "answer")
    )
    SPOILT[how](asked, answer_file)
    before = {p.name: p.stat().st_mtime_ns for p in place.files.glob("*.answer")}
    place.post(job(number=9))
    assert place.receiver.look() == 1
    answer = place.answer(job(number=9))
    assert answer is not None and answer.state is State.DONE
    assert place.receiver.look() == 0
    for name, changed in before.items():
        assert (place.files / name).stat().st_mtime_ns == changed


def test_request_of_a_newer_release(place: Place) -> None:
    place.transfer()
    data = place.post(job())
    path = place.files / f"{OPERATION}.0.request"
    path.write_bytes(newer(data))
    assert place.receiver.look() == 1
    answer = place.answer(job())
    assert answer is not None and answer.state is State.FAILED
    assert "version 2" in answer.reason


def newer(data: bytes) -> bytes:
    text = data.rstrip(b"\0")[:-66].replace(b"-request 1 ", b"-request 2 ", 1)
    sealed = text + b"\n" + blake3.blake3(text).hexdigest().encode() + b"\n"
    return sealed.ljust(4096, b"\0")


def test_flood(place: Place) -> None:
    """Requests by the hundred, of one operation and of none: others are served."""
    place.transfer()
    place.put(bytes(4096))
    for number in range(40):
        place.post(job(number=number, size=4096))
    for stranger in range(100):
        place.post(job(operation=f"{stranger:016x}"))
    place.transfer(volume(f"vda.{OTHER}"), operation=OTHER)
    place.put(bytes(4096), f"vda.{OTHER}")
    place.receiver.start()
    began = time.monotonic()
    asker = place.asker(operation=OTHER)
    assert asker.ask(job(volume=f"vda.{OTHER}"))[0].state is State.DONE
    assert time.monotonic() - began < 9
    until(
        lambda: all(
            (answer := place.answer(job(number=n))) and answer.state is State.DONE
            for n in range(40)
        )
    )


def test_no_more_than_so_many_at_once(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver, "_TAKEN", 5)
    going = threading.Event()
    monkeypatch.setattr(os, "fsync", lambda _fd: going.wait(SECONDS))
    place.transfer()
    place.put(bytes(4096))
    for number in range(9):
        place.post(job(number=number))
    place.receiver.start()
    until(lambda: len(place.receiver._desk._jobs) == 5)
    time.sleep(0.2)
    jobs = list(place.receiver._desk._jobs.values())
    assert len(jobs) == 5 and sum(each.is_running for each in jobs) == 2
    going.set()
    until(
        lambda: all(
            (answer := place.answer(job(number=n))) and answer.state is State.DONE
            for n in range(9)
        )
    )


def test_strangers_are_refused_a_few_at_a_time(place: Place) -> None:
    for stranger in range(30):
        place.post(job(operation=f"{stranger:016x}"))
    assert place.receiver.look() == 8


def test_orphans_go(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver, "_ORPHAN_AGE", 0.0)
    place.transfer()
    place.post(job(verb=Verb.RELEASE))
    place.post(job(verb=Verb.RELEASE, operation=OTHER))
    place.receiver.look()
    time.sleep(0.01)
    place.receiver.look()
    assert [n for n in place.letters() if OTHER in n] == []
    assert len(place.letters()) == 2


# The other verbs


@pytest.mark.parametrize("access", ACCESS, indirect=True)
def test_grow(access: str, place: Place) -> None:
    place.transfer(volume(size=3 * MiB))
    path = place.put(b"data" * 1024)
    for size in (3 * MiB, 3 * MiB, MiB):
        place.ask(Verb.GROW, volume=path.name, size=size)
        assert path.read_bytes() == (b"data" * 1024).ljust(3 * MiB, b"\0")
    with pytest.raises(errors.RequestRefused, match="smaller"):
        place.ask(Verb.GROW, volume=path.name, size=3 * MiB + 1)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life come often, so that a busy machine does not make them late."""
    monkeypatch.setattr(receiver, "_PULSE", 0.3)


@pytest.fixture
def other(place: Place, monkeypatch: pytest.MonkeyPatch) -> base.Backend:
    """A backend that takes pieces, as one of Ceph does; see test_kinds for that."""
    found = place.here.backends["other"]
    poor = dataclasses.replace(found.capabilities, streams=False)
    monkeypatch.setattr(found, "capabilities", poor)
    return found


@pytest.mark.parametrize("access", ACCESS, indirect=True)
def test_import(access: str, place: Place, other: base.Backend) -> None:
    """Pieces, files in the area for them, become a volume of another backend."""
    data = content()
    place.transfer(volume(size=len(data), backend="other"))
    other.incoming.create_raw(f"vda.{OPERATION}", len(data))
    arrived = place.root / "other/incoming" / f"vda.{OPERATION}"
    piece = request.piece_name(arrived.name, 3)
    for start in range(0, len(data), MiB):
        part = data[start : start + MiB]
        place.put(part, piece, size=2 * MiB).write_bytes(part.ljust(2 * MiB, b"o"))
        wanted: dict[str, Any] = {"volume": arrived.name, "piece": piece}
        # Again, as after a death before the answer.
        for _ in range(2):
            place.ask(Verb.IMPORT, offset=start, size=len(part), **wanted)
        place.local.incoming.delete(piece)
    assert arrived.read_bytes() == data
    assert place.verify(len(data)).root() == told(data).root()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"piece": f"vda.{OPERATION}"}, "none of this volume's"),
        ({"piece": f"vda-p16.{OPERATION}"}, "none of this volume's"),
        ({"piece": f"vdb-p0.{OPERATION}"}, "none of this volume's"),
        ({"piece": ""}, "none of this volume's"),
        ({"offset": MiB - len(TILE) + 1}, "smaller"),
        ({"offset": 2**62}, "smaller"),
        ({"size": len(TILE) + 1}, "only"),
        ({"size": 64 * MiB + 1}, "at most|smaller"),
    ],
)
def test_import_of_what_may_not_be(
    place: Place, other: base.Backend, fields: dict[str, Any], reason: str
) -> None:
    place.transfer(volume(size=MiB, backend="other"))
    other.incoming.create_raw(f"vda.{OPERATION}", MiB)
    piece = f"vda-p0.{OPERATION}"
    place.put(TILE, piece)
    wanted = {"volume": f"vda.{OPERATION}", "piece": piece, "size": len(TILE)}
    with pytest.raises(errors.RequestRefused, match=reason):
        place.ask(Verb.IMPORT, **{**wanted, **fields})
    assert other.incoming.read(f"vda.{OPERATION}", limit=MiB) == bytes(MiB)


def test_import_of_a_piece_that_leads_elsewhere(
    place: Place, other: base.Backend
) -> None:
    secret = place.root / "secret"
    secret.write_bytes(TILE)
    place.transfer(volume(size=MiB, backend="other"))
    other.incoming.create_raw(f"vda.{OPERATION}", MiB)
    piece = place.incoming / f"vda-p0.{OPERATION}"
    for make in (piece.symlink_to, piece.hardlink_to):
        make(secret)
        with pytest.raises(errors.RequestRefused):
            place.ask(
                Verb.IMPORT,
                volume=f"vda.{OPERATION}",
                piece=piece.name,
                size=len(TILE),
            )
        piece.unlink()
    assert other.incoming.read(f"vda.{OPERATION}", limit=MiB) == bytes(MiB)


def test_grow_that_libvirt_forgets(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = place.put(b"data")
    monkeypatch.setattr(place.local.incoming, "write", lambda *_, **__: None)
    with pytest.raises(errors.ShortTransfer, match="after it grew"):
        base.Backend.grow(place.local, path.name, MiB)


def hold_of(found: manifest.Manifest) -> dict[str, Any]:
    return {
        "root": found.root(),
        "format": DiskFormat.RAW,
        "size": found.size,
        "backend": "local",
    }


def test_hold_and_release(place: Place) -> None:
    body, found = place.keep(
        "image", TILE, role=Role.IMAGE, state=VolumeState.USABLE, owner="cache"
    )
    place.transfer()
    place.transfer(volume(f"vda.{OTHER}"), operation=OTHER)
    old = Hold(operation="0" * 16, until=time.time() - 1)
    place.local.update(msgspec.structs.replace(body, holds=(old,)))
    for lease in (60.0, 1e9):
        answer, _ = place.ask(Verb.HOLD, **hold_of(found), lease=lease)
        assert answer.name == "image"
    place.ask(Verb.HOLD, operation=OTHER, **hold_of(found), lease=5.0)
    holds = place.local.volumes.read("image").body.holds
    assert [hold.operation for hold in holds] == [OPERATION, OTHER]
    assert 6.9 * 86400 < holds[0].until - time.time() <= 7 * 86400
    place.ask(Verb.RELEASE)
    place.ask(Verb.RELEASE)
    holds = place.local.volumes.read("image").body.holds
    assert [hold.operation for hold in holds] == [OTHER]


def test_an_image_has_no_more_leases_than_256(place: Place) -> None:
    end = time.time() + 60
    others = [Hold(operation=f"{i:016x}", until=end) for i in range(255)]
    body, found = place.keep(
        "image", TILE, role=Role.IMAGE, state=VolumeState.USABLE, holds=tuple(others)
    )
    place.transfer()
    place.transfer(volume(f"vda.{OTHER}"), operation=OTHER)
    place.ask(Verb.HOLD, **hold_of(found), lease=60.0)
    with pytest.raises(errors.RequestRefused, match="once more"):
        place.ask(Verb.HOLD, operation=OTHER, **hold_of(found), lease=60.0)
    # One that it has is renewed.
    place.ask(Verb.HOLD, **hold_of(found), lease=90.0)
    holds = place.local.volumes.read(body.name).body.holds
    assert len(holds) == 256 and holds[-1].until > end + 20


@pytest.mark.parametrize(
    "fields",
    [
        {"role": Role.ROOT},
        {"state": VolumeState.INCOMPLETE},
        {"proof": Proof.SAMPLED},
        {"digest": None},
        {"format": DiskFormat.QCOW2},
        {"size": len(TILE) + 1},
        {"backing": "another"},
    ],
    ids=[
        "no image",
        "incomplete",
        "sampled",
        "no digest",
        "of another format",
        "of another size",
        "on another",
    ],
)
def test_hold_of_what_is_not_proven(place: Place, fields: dict[str, object]) -> None:
    proven = {"role": Role.IMAGE, "state": VolumeState.USABLE, "owner": "cache"}
    place.keep("image", TILE, **{**proven, **fields})
    place.transfer()
    wanted = hold_of(told(TILE))
    for each in (wanted, {**wanted, "root": ""}, {**wanted, "format": None}):
        with pytest.raises(errors.RequestRefused, match="no such image"):
            place.ask(Verb.HOLD, **each, lease=60.0)
    assert place.local.volumes.read("image").body.holds == ()


@pytest.mark.parametrize("access", ["unreadable", "remote"], indirect=True)
def test_reuse_where_nothing_can_be_renamed(access: str, place: Place) -> None:
    body, _ = place.keep("vda.old", content())
    place.transfer()
    with pytest.raises(errors.RequestRefused, match="cannot rename"):
        place.ask(Verb.REUSE, volume=f"vda.{OPERATION}", size=MiB)
    assert Path(body.path).read_bytes()
    assert not list(place.incoming.iterdir())


@pytest.mark.parametrize("size", [3 * MiB, 5 * MiB, MiB + 5, 4 * MiB + 4])
def test_reuse(place: Place, size: int) -> None:
    data = content()
    place.keep("vda.old", data)
    place.keep("vdb.old", TILE)
    place.transfer()
    answer, found = place.ask(Verb.REUSE, volume=f"vda.{OPERATION}", size=size)
    assert found is not None and answer.state is State.DONE
    expected = told(data[:size].ljust(size, b"\0"))
    (path,) = place.incoming.iterdir()
    assert path.name == f"vda.{OPERATION}" and path.stat().st_nlink == 1
    assert path.read_bytes() == data[:size].ljust(size, b"\0")
    for index in range(found.count):
        assert found[index] in (expected[index], manifest.UNKNOWN)
    assert sum(found[i] == manifest.UNKNOWN for i in range(found.count)) <= 1
    until(lambda: place.local.volumes.find("vda.old") is None)
    assert not (place.root / "local/disks/vda.old").exists()
    assert place.local.manifest("vdb.old") is not None
    with pytest.raises(errors.RequestRefused, match="nothing is left"):
        place.ask(Verb.REUSE, volume=f"vda.{OPERATION}", size=size)


@pytest.mark.parametrize("is_written_to", [False, True], ids=["", "written to"])
def test_reuse_killed_before_the_answer(
    place: Place, is_written_to: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is found again, and what is said of it is what it holds now."""
    data = content()
    place.keep("vda.old", data)
    place.transfer()
    wanted = job(verb=Verb.REUSE, size=len(data))
    place.post(wanted)
    real = place.receiver._desk._write

    def die(name: str, answer: Answer, payload: bytes = b"") -> None:
        if answer.state is State.DONE:
            raise errors.Cancelled
        real(name, answer, payload)

    monkeypatch.setattr(place.receiver._desk, "_write", die)
    assert place.receiver.look() >= 1
    assert place.local.volumes.find("vda.old") is not None
    if is_written_to:
        path = place.incoming / f"vda.{OPERATION}"
        data = b"new" + data[3:]
        path.write_bytes(data)
    place.fresh().look()
    answer = place.answer(wanted)
    assert answer is not None and answer.state is State.DONE
    assert answer.digest == told(data).digest()
    assert place.local.volumes.find("vda.old") is None


@pytest.mark.parametrize(
    "fields",
    [
        {"state": VolumeState.USABLE},
        {"owner": "somebody"},
        {"format": DiskFormat.QCOW2},
        {"proof": Proof.SAMPLED},
        {"digest": told(b"other").digest()},
    ],
    ids=["in use", "of another", "of another format", "sampled", "digests changed"],
)
def test_reuse_of_what_may_not_be(place: Place, fields: dict[str, object]) -> None:
    body, _ = place.keep("vda.old", content(), **fields)
    place.keep("vda-1.old", content())
    place.transfer()
    with pytest.raises(errors.RequestRefused, match="nothing is left"):
        place.ask(Verb.REUSE, volume=f"vda.{OPERATION}", size=MiB)
    assert Path(body.path).read_bytes()
    assert place.local.volumes.read("vda.old").body == body
    assert not list(place.incoming.iterdir())


def test_reclaim(place: Place) -> None:
    for name, owner in (("vda.1", INSTANCE), ("vda.2", "b"), ("vda.3", "c")):
        place.keep(name, TILE, owner=owner)
        # libvirt says whole seconds and parts of them: the order has to show.
        time.sleep(0.02)
    place.keep("vda.4", TILE, state=VolumeState.USABLE)
    place.transfer()
    size = (place.root / "local/disks/vda.2").stat().st_blocks * 512
    answer, _ = place.ask(Verb.RECLAIM, backend="local", size=1)
    assert answer.size == size

    def left() -> list[str]:
        return sorted(path.name for path in (place.root / "local/disks").iterdir())

    assert left() == ["vda.1", "vda.3", "vda.4"]
    answer, _ = place.ask(Verb.RECLAIM, backend="local", size=TiB)
    assert answer.size == 2 * size and left() == ["vda.4"]
    records = sorted(p.name for p in (place.root / "local/records").iterdir())
    assert records == ["vda.4.manifest", "vda.4.rec.1", f"{layout.NAME}.rec.1"]


def test_retired_is_what_its_record_says_now(place: Place) -> None:
    """A name may come again, at the same generation, for something else."""
    body, _ = place.keep("vda.1", TILE, owner="b")
    assert [each.name for each in place.local.retired()] == ["vda.1"]
    place.local.remove("vda.1")
    place.keep("vda.1", TILE, state=VolumeState.USABLE)
    assert place.local.retired() == []
    assert place.local.reclaim(lambda _: False) == 0
    assert Path(body.path).exists()


def test_reclaim_no_more_than_the_transfer_needs(place: Place) -> None:
    place.keep("vda.1", TILE, owner="b")
    place.transfer(volume(size=0))
    answer, _ = place.ask(Verb.RECLAIM, backend="local", size=TiB)
    assert answer.size == 0
    assert place.local.volumes.find("vda.1") is not None


# Manifests beside records


def test_manifest_is_believed_only_if_it_is_the_records(place: Place) -> None:
    body, found = place.keep("vda.old", content())
    kept = place.local.manifest("vda.old")
    assert kept is not None and kept.digests() == found.digests()
    path = place.root / "local/records/vda.old.manifest"
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    assert place.local.manifest("vda.old") is None
    path.write_bytes(data + b"x")
    assert place.local.manifest("vda.old") is None
    place.local.keep_manifest("vda.old", found)
    assert place.local.manifest("vda.old") is not None
    place.local.update(msgspec.structs.replace(body, proof=Proof.NONE))
    assert place.local.manifest("vda.old") is None
    place.local.remove("vda.old")
    assert not path.exists()
    assert place.local.manifest("vda.old") is None
