# SPDX-License-Identifier: Apache-2.0
"""A receiver that is late, or beside which somebody left what nobody can read."""

import dataclasses
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.functional.conftest import World, digest
from tests.functional.test_delta import change, keeping, move, spawn
from tests.functional.test_receiver import (
    OPERATION,
    OTHER,
    TILE,
    Place,
    alpha,
    job,
    place,
    told,
    until,
    volume,
)
from virtmigrate import desk, errand, errors, model, receiver, request
from virtmigrate.backends import dir as dirs
from virtmigrate.backends import terms
from virtmigrate.request import Answer, Request, State, Verb

__all__ = ["alpha", "keeping", "place"]

REUSE = job(verb=Verb.REUSE, size=len(TILE))


class Slow:
    """Makes a method of a class wait for `go`, first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: type, name: str) -> None:
        self.go, self.begun, self.done = (threading.Event() for _ in range(3))
        real = getattr(kind, name)

        def slow(*args: Any, **named: Any) -> object:
            self.begun.set()
            self.go.wait(60)
            try:
                return real(*args, **named)
            finally:
                self.done.set()

        monkeypatch.setattr(kind, name, slow)


def asked(place: Place, wanted: Request) -> Answer:
    """Post a request, let it be worked on, return the answer."""
    place.post(wanted)
    place.receiver.look()
    answer = place.answer(wanted)
    assert answer is not None
    return answer


def make_directory(place: Place, name: str) -> Path:
    """A directory that libvirt made: it lists it as a volume."""
    xml = (
        f"<volume><name>{name}</name><capacity>0</capacity>"
        "<target><format type='dir'/></target></volume>"
    )
    with place.source.session("making a directory") as session:
        pool = session.conn.storagePoolLookupByName("virtmigrate-mailbox")
        pool.createXML(xml, 0)
    return place.files / name


# Late reuses


def test_late_reuse_of_what_was_sent_meanwhile(
    keeping: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source stopped waiting, and the copy that it made anew is proven."""
    world = keeping
    instance = spawn(world)
    move(world, instance, world.a, world.b)
    expected = change(world.b, instance, 3)
    # Stands for storage that hangs longer than the hour that counts as life.
    monkeypatch.setattr(desk, "_PATIENCE", 0.5)
    world.b.overrides["call_timeout"] = 3.0
    world.b.new_driver()
    slow = Slow(monkeypatch, dirs.DirBackend, "set_aside")
    ticket = world.b.driver.migrate_disk_and_power_off(
        None, instance, world.a.host.name, None, None
    )
    (path,) = (world.a.path / "incoming").glob("vda.*")
    assert digest(path) == expected
    slow.go.set()
    assert slow.done.wait(60)
    until(lambda: len(list((world.a.path / "incoming").glob("vda*"))) == 1)
    world.a.driver.finish_migration(None, None, instance, ticket, None, power_on=False)
    assert digest(world.a.disk(instance)) == expected


def test_late_reuse_replaces_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes between the receiver's last look and its last step."""
    place.keep("vda.old", TILE)
    place.transfer()
    real = dirs.DirBackend.switch

    def late(self: dirs.DirBackend, aside: str, name: str) -> None:
        place.put(b"newer", name)
        real(self, aside, name)

    monkeypatch.setattr(dirs.DirBackend, "switch", late)
    answer = asked(place, REUSE)
    assert answer.state is State.FAILED and "already has" in answer.reason
    (left,) = place.incoming.iterdir()
    assert left.read_bytes() == b"newer"


def test_reuse_that_nobody_asks_for_any_more(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.keep("vda.old", TILE)
    place.transfer()
    real = dirs.DirBackend.set_aside

    def forgotten(*args: Any) -> terms.Reuse:
        found = real(*args)
        place.post(msgspec.structs.replace(REUSE, nonce="01", verb=Verb.RELEASE))
        return found

    monkeypatch.setattr(dirs.DirBackend, "set_aside", forgotten)
    place.post(REUSE)
    place.receiver.look()
    assert not list(place.incoming.iterdir())


def test_grow_that_nobody_asks_for_any_more(place: Place) -> None:
    place.transfer()
    path = place.put(b"data")
    wanted = job(verb=Verb.GROW, size=9)
    place.post(msgspec.structs.replace(wanted, nonce="01"))
    late = desk.Job("late", wanted, "00")
    with pytest.raises(errors.Cancelled):
        place.receiver._errands.perform(wanted, late)
    assert path.read_bytes() == b"data"


@pytest.mark.parametrize("where", ["_demand_asked", "unlink"])
def test_reuse_killed_in_the_middle(
    place: Place, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was set aside, or half switched, is found again."""
    place.keep("vda.old", TILE)
    place.transfer()
    place.post(REUSE)
    calls: list[object] = []
    kind, dies = (Path, 1) if where == "unlink" else (errand.Errands, 2)
    real = getattr(kind, where)

    def die(*args: Any, **named: Any) -> object:
        calls.append(args)
        if len(calls) == dies:
            raise errors.Cancelled
        return real(*args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(kind, where, die)
        # It begins again at once when it was left: that is a kill here.
        patch.setattr(receiver.Receiver, "_has_rest", False, raising=False)
        place.receiver.look()
    assert len(calls) >= dies
    aside = place.incoming / errand.aside_name(REUSE)
    assert aside.exists() and not (place.root / "local/disks/vda.old").exists()
    place.fresh().look()
    answer = place.answer(REUSE)
    assert answer is not None and answer.digest == told(TILE).digest()
    (path,) = place.incoming.iterdir()
    assert path.name == f"vda.{OPERATION}" and path.stat().st_nlink == 1


def test_what_was_set_aside_goes_with_its_transfer(place: Place) -> None:
    place.transfer()
    names = [errand.aside_name(REUSE), f"vda-r0123abcd.{OTHER}", f"vda.{OTHER}"]
    for name in [*names, f"-r0123abcd.{OTHER}", f"vda-r0123abcx.{OTHER}"]:
        place.put(b"data", name)
    place.keep(f"vdb-r0123abcd.{OTHER}", b"data", pool=place.local.incoming.name)
    place.fresh().look()
    left = {path.name for path in place.incoming.iterdir()}
    assert f"vda-r0123abcd.{OTHER}" not in left and len(left) == 5


def test_what_another_host_set_aside_stays(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On storage that hosts share: its transfers are in a mailbox of its own."""
    shared = dataclasses.replace(place.local.capabilities, shared=True)
    monkeypatch.setattr(place.local, "capabilities", shared)
    place.transfer()
    path = place.put(b"data", errand.aside_name(REUSE).replace(OPERATION, OTHER))
    place.fresh().look()
    assert path.exists()


def test_a_sweep_that_fails_holds_up_nobody(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> list[str]:
        raise errors.StorageError(host="x", pool="x", reason="x")

    place.transfer()
    place.put(bytes(4096))
    monkeypatch.setattr(place.here.backends["other"].incoming, "names", broken)
    assert asked(place, job()).state is State.DONE


# Beside what nobody can read


def spoil_request(place: Place) -> Path:
    return make_directory(place, f"{OPERATION}.7.request")


def spoil_answer(place: Place) -> Path:
    wanted = job(number=7, verb=Verb.RELEASE)
    place.post(wanted)
    name = request.answer_name(request.request_name(OPERATION, 7))
    (place.files / name).unlink()
    return make_directory(place, name)


def spoil_orphan(place: Place) -> Path:
    made = make_directory(place, f"{OTHER}.7.answer")
    (made / "inside").write_bytes(b"")
    return made


@pytest.mark.parametrize("spoil", [spoil_request, spoil_answer, spoil_orphan])
def test_a_directory_beside_good_requests(
    place: Place,
    spoil: Callable[[Place], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(receiver, "_ORPHAN_AGE", -1.0)
    place.transfer()
    place.put(bytes(4096))
    path = spoil(place)
    for number in (5, 9):
        place.post(job(number=number))
    place.receiver.look()
    place.receiver.look()
    for number in (5, 9):
        answer = place.answer(job(number=number))
        assert answer is not None and answer.state is State.DONE
    said = [r for r in caplog.records if path.name[:18] in r.getMessage()]
    assert len([r for r in said if "passed over" in r.getMessage()]) == 1


@pytest.mark.parametrize("how", ["read", "write"])
def test_an_entry_that_fails_beside_good_requests(
    place: Place, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request cannot be read, or its answer not be written."""
    place.transfer()
    place.put(bytes(4096))
    for number in (5, 7, 9):
        place.post(job(number=number))
    pool = place.here.mailbox.pool
    real = getattr(pool, how)

    def broken(name: str, *args: Any, **named: Any) -> object:
        if ".7." in name:
            raise errors.StorageError(host="x", pool="x", reason="x")
        return real(name, *args, **named)

    monkeypatch.setattr(pool, how, broken)
    assert place.receiver.look() == 2
    for number in (5, 9):
        answer = place.answer(job(number=number))
        assert answer is not None and answer.state is State.DONE


def test_an_answer_that_cannot_be_written_any_more(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others get their signs of life all the same."""
    place.transfer()
    going, told_of = threading.Event(), []
    monkeypatch.setattr(os, "fsync", lambda _fd: going.wait(20))
    place.put(bytes(4096))
    real = place.receiver._desk._write

    def write(name: str, answer: Answer, payload: bytes = b"") -> None:
        if answer.beat > 1:
            told_of.append(name)
            if name == told_of[0]:
                raise errors.StorageError(host="x", pool="x", reason="x")
        real(name, answer, payload)

    monkeypatch.setattr(place.receiver._desk, "_write", write)
    for number in (1, 2):
        place.post(job(number=number))
    place.receiver.start()
    until(lambda: len(set(told_of)) == 2)
    going.set()


def test_signs_of_life_while_nothing_can_be_listed(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.transfer()
    place.put(bytes(4096))
    reached, going = threading.Event(), threading.Event()

    def stuck(_: int) -> None:
        reached.set()
        going.wait(60)

    monkeypatch.setattr(os, "fsync", stuck)
    place.post(job())
    place.receiver.start()
    # Until there it needs the listing itself.
    assert reached.wait(20)

    def broken(*_: object) -> list[str]:
        raise errors.StorageError(host="x", pool="x", reason="x")

    monkeypatch.setattr(place.here.mailbox.pool, "names", broken)
    (place.files / f"{OPERATION}.9.request").write_bytes(b"")

    def beat() -> int:
        answer = place.answer(job())
        return answer.beat if answer else 0

    before = beat()
    until(lambda: beat() > before + 1, 30)
    going.set()


# Proofs beside what is slow


def test_proofs_do_not_wait_for_reuses(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch, dirs.DirBackend, "set_aside")
    for number in range(1, 5):
        operation, owner = f"{number:016x}", str(uuid.uuid4())
        place.keep(f"vda.old{number}", TILE, owner=owner)
        body = model.Transfer(
            operation=operation,
            request="r",
            instance=owner,
            source="beta",
            peer=place.here.name,
            state=model.TransferState.RESERVED,
            generation=0,
            volumes=(volume(f"vda.{operation}", size=len(TILE)),),
            created=time.time(),
        )
        place.here.mailbox.transfers.publish(operation, body)
        wanted = {"operation": operation, "volume": f"vda.{operation}"}
        place.post(job(verb=Verb.REUSE, size=len(TILE), **wanted))
    place.receiver.start()
    try:
        assert slow.begun.wait(20)
        place.transfer()
        place.put(bytes(4096))
        place.post(job(number=9))
        until(
            lambda: (
                (answer := place.answer(job(number=9))) and answer.state is State.DONE
            ),
            20,
        )
    finally:
        slow.go.set()


def test_what_is_used_is_not_reclaimed(place: Place) -> None:
    for name in ("vda.1", "vda.2"):
        place.keep(name, TILE)
    claims = place.local.claims
    with claims.of("vda.1") as first, claims.of("vda.1") as second:
        assert (first, second) == (True, False)
        place.local.reclaim(lambda _: False)
    assert [each.name for each in place.local.retired()] == ["vda.1"]
    place.local.reclaim(lambda _: False)
    assert place.local.retired() == []
