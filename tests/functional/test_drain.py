# SPDX-License-Identifier: Apache-2.0
"""Hosts that are emptied: by the command, between two real hosts."""

import contextlib
import json
import random
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.functional.conftest import World, digest
from tests.functional.test_cli import (
    CANCELLED,
    DONE,
    FAILED,
    TIMEOUT,
    USAGE,
    Command,
)
from virtmigrate import draining, errors
from virtmigrate.units import MiB


class Draining(Command):
    """Runs `virtmigrate` on the first host, with little time for its guests."""

    def __init__(self, world: World, directory: Path) -> None:
        super().__init__(world, directory)
        lines = "drain_memory_reserve_mib = 0\ndrain_target_concurrency = 2"
        text = self.file.read_text().replace("[virtmigrate]", f"[virtmigrate]\n{lines}")
        self.file.write_text(text)

    def drain(self, *words: str, code: int = DONE) -> dict[str, Any]:
        """Return the rows by the name of the instance."""
        rows = self.json("host", "drain", *words, code=code)
        return {row["name"]: row for row in rows}

    def slow(self) -> None:
        """Let a megabyte take a second, and one instance leave at once."""
        text = self.file.read_text()
        slow = "[virtmigrate]\nbandwidth_mib = 1\ndrain_concurrency = 1"
        self.file.write_text(text.replace("[virtmigrate]", slow, 1))

    def other(self, world: World) -> "Draining":
        """Return the same on the second host, whose peer is the first."""
        here, there = world.a, world.b
        world.a, world.b = there, here
        try:
            return Draining(world, self.file.parent / "other")
        finally:
            world.a, world.b = here, there


@pytest.fixture
def command(world: World, tmp_path: Path) -> Iterator[Draining]:
    yield Draining(world, tmp_path / "etc")


def small(world: World, *policy: str, **changes: Any) -> Any:
    """Make a guest on the first host that stops at once; it boots nothing."""
    instance = world.spawn(world.a, world.image(2 * MiB), memory_mb=32)
    if policy or changes:
        here = world.a.driver.node
        record = here.instances.read(instance.uuid).body
        changes = {"policy": policy, **changes}
        here.publish_instance(msgspec.structs.replace(record, **changes))
    return instance


@contextlib.contextmanager
def undefined(world: World, instance: Any) -> Iterator[Any]:
    """Let libvirt forget a guest as soon as it ends."""
    with world.a.libvirt() as conn:
        domain = conn.lookupByUUIDString(instance.uuid)
        domain.undefine()
        try:
            yield instance
        finally:
            domain.destroy()


def test_drain_of_every_kind_and_the_way_back(
    world: World, command: Draining, tmp_path: Path
) -> None:
    """Twelve guests: each ends where its policy wants it, and the report says so."""
    with undefined(world, small(world, "cold")) as transient:
        drain_all(world, command, tmp_path, transient)


def drain_all(world: World, command: Draining, tmp_path: Path, transient: Any) -> None:
    cold = [small(world, "cold") for _ in range(4)]
    fallen = small(world, "postcopy", "cold")
    off = small(world)
    world.a.driver.power_off(off)
    paused = small(world, "cold")
    world.a.driver.pause(paused)
    stuck = small(world, "postcopy")
    stopped, left = small(world, "stop"), small(world, "leave")
    owned = small(world, "cold", owner="nova")
    before = {each.uuid: digest(world.a.disk(each)) for each in (*cold, fallen, off)}

    plan = command.drain("--to", "beta", "--dry-run", code=FAILED)
    assert len(plan) == 12
    assert plan[cold[0].name]["target"] == "beta" and plan[cold[0].name]["bytes"] > 0
    assert plan[off.name]["way"] == "offline" and plan[off.name]["downtime"] == 0
    assert plan[fallen.name]["way"] == "cold"
    assert "postcopy" in plan[stuck.name]["blocked"]
    assert "belongs to nova" in plan[owned.name]["blocked"]
    assert "no persistent configuration" in plan[transient.name]["blocked"]
    assert not draining.is_draining(world.a.driver.node.mailbox)
    assert world.b.driver.list_instances() == []

    back, file = tmp_path / "back.json", tmp_path / "report.json"
    words = ("--return-plan", str(back), "--report", str(file))
    rows = command.drain("--to", "beta", *words, code=FAILED)
    moved = (*cold, fallen, off, paused)
    assert {rows[each.name]["outcome"] for each in moved} == {"moved"}
    assert {rows[e.name]["outcome"] for e in (stuck, owned, transient)} == {"stayed"}
    assert rows[stopped.name]["outcome"] == "stopped"
    assert rows[left.name]["outcome"] == "left"
    assert rows[cold[0].name]["downtime"] > 0 and rows[off.name]["downtime"] is None
    for each in (*cold, fallen):
        assert world.b.state_of(each) == "running" and world.a.state_of(each) is None
    # A guest that is paused loses its memory by a cold move: it is started anew.
    assert (world.b.state_of(off), world.b.state_of(paused)) == ("shutoff", "running")
    assert world.a.state_of(stopped) == "shutoff"
    assert {world.a.state_of(e) for e in (stuck, left, owned, transient)} == {"running"}
    for each in (*cold, fallen, off):
        assert digest(world.b.disk(each)) == before[each.uuid]
    expect_left(file, stopped, stuck, left, owned, transient)
    return_all(world, command, back, moved, before)


def expect_left(file: Path, stopped: Any, *running: Any) -> None:
    """The report names what the host still has, as libvirt and the kernel see it."""
    report = json.loads(file.read_text())
    staying = sorted(each.name for each in running)
    assert report["leftovers"]["running"] == staying
    assert report["leftovers"]["domains"] == sorted([*staying, stopped.name])
    assert len(report["leftovers"]["processes"]) == len(staying)


def return_all(
    world: World,
    command: Draining,
    back: Path,
    moved: Sequence[Any],
    before: dict[str, str],
) -> None:
    """The host takes nothing new, by spawn or by a move, until it is opened."""
    with pytest.raises(errors.HostDraining):
        small(world)
    there = command.other(world)
    refused = there.drain("--return", str(back), code=FAILED)
    assert "is drained since" in refused[moved[0].name]["reason"]
    command.run("host", "drain", "--stop")
    rows = there.drain("--return", str(back))
    assert sorted(rows) == sorted(each.name for each in moved)
    for each in moved:
        assert world.b.state_of(each) is None
        if each.uuid in before:
            assert digest(world.a.disk(each)) == before[each.uuid]
    assert world.b.files() == []


def test_empty_host_is_proven_empty(world: World, command: Draining) -> None:
    guests = [small(world, "cold") for _ in range(2)]
    done = command.run("host", "drain", "--to", "beta", "-f", "json")
    assert "is empty" in done.stderr
    assert {row["outcome"] for row in json.loads(done.stdout)} == {"moved"}
    assert {world.b.state_of(each) for each in guests} == {"running"}
    assert world.a.driver.list_instances() == []
    assert [n for n in world.a.files() if not n.startswith("mailbox/")] == []
    # Nothing is left to do, and it stays closed.
    assert command.drain("--to", "beta") == {}
    resources = world.a.driver.get_available_resource("alpha")
    assert resources["draining"]
    assert resources["reserved"]["MEMORY_MB"] == resources["memory_mb"] > 0
    assert resources["disk_available_least"] == 0
    command.run("host", "drain", "--stop")
    assert not world.a.driver.get_available_resource("alpha")["draining"]
    assert world.a.files() == []


def test_peer_without_room(world: World, command: Draining) -> None:
    instance = small(world, "cold")
    text = command.file.read_text()
    reserve = "drain_memory_reserve_mib = 99999999"
    command.file.write_text(text.replace("drain_memory_reserve_mib = 0", reserve))
    rows = command.drain("--to", "beta", code=FAILED)
    assert "bytes of memory too little" in rows[instance.name]["reason"]
    assert world.a.state_of(instance) == "running"


def test_members_of_a_group_stay_apart(world: World, command: Draining) -> None:
    pair = [small(world, "cold") for _ in range(2)]
    for each in pair:
        words = ("instance", "policy", each.uuid, "cold", "--apart", "db")
        shown = command.json(*words)
        assert (shown["policy"], shown["of"], shown["apart"]) == (
            "cold",
            "the instance",
            "db",
        )
    rows = command.drain("--to", "beta", code=FAILED)
    assert sorted(row["outcome"] for row in rows.values()) == ["moved", "stayed"]
    (stayed,) = (row for row in rows.values() if row["outcome"] == "stayed")
    assert "it has a member of group db" in stayed["reason"]
    # Also of those that were there before.
    again = command.drain("--to", "beta", code=FAILED)
    assert "it has a member of group db" in again[stayed["name"]]["reason"]


def test_unreachable_target_is_told(world: World, command: Draining) -> None:
    instance = small(world, "cold")
    refused = command.run("host", "drain", "--to", "nowhere", code=FAILED)
    assert "nowhere cannot be reached" in refused.stderr
    assert world.a.state_of(instance) == "running"
    assert not draining.is_draining(world.a.driver.node.mailbox)
    refused = command.run("host", "drain", "--to", "alpha", code=FAILED)
    assert "cannot be emptied to itself" in refused.stderr
    command.run("host", "drain", code=USAGE)
    command.run("instance", "policy", instance.uuid, "fly", code=USAGE)


def test_second_signal_puts_back(world: World, command: Draining) -> None:
    """What runs is put back, what waits is not begun, and all of it is told."""
    guests = [large(world) for _ in range(3)]
    command.slow()
    argv = command.argv("host", "drain", "--to", "beta", "-f", "json")
    out = subprocess.PIPE
    with subprocess.Popen(argv, stdout=out, stderr=out, text=True) as child:
        wait_for_transfer(world, child)
        child.send_signal(signal.SIGINT)
        assert child.stderr is not None
        for line in child.stderr:
            if "no more moves begin" in line:
                break
        child.send_signal(signal.SIGINT)
        shown, _ = child.communicate(timeout=TIMEOUT)
    rows = json.loads(shown)
    assert child.returncode == CANCELLED
    assert [row["outcome"] for row in rows] == ["cancelled"] * 3
    assert {world.a.state_of(guest) for guest in guests} == {"running"}
    assert world.b.files() == []
    assert draining.is_draining(world.a.driver.node.mailbox)


def test_killed_drain_goes_on(world: World, command: Draining) -> None:
    guests = [large(world) for _ in range(2)]
    before = {each.uuid: digest(world.a.disk(each)) for each in guests}
    text = command.file.read_text()
    command.slow()
    with subprocess.Popen(
        command.argv("host", "drain", "--to", "beta"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as child:
        wait_for_transfer(world, child)
        child.kill()
    command.file.write_text(text)
    rows = command.drain("--to", "beta")
    assert {row["outcome"] for row in rows.values()} == {"moved"}
    assert len(rows) == len(guests)
    for each in guests:
        assert world.b.state_of(each) == "running"
        assert digest(world.b.disk(each)) == before[each.uuid]
    assert [n for n in world.a.files() if not n.startswith("mailbox/")] == []


def test_round_stops_for_the_operator(world: World, command: Draining) -> None:
    """Alpha goes to beta, the spare; gamma has to wait until alpha is open again."""
    instance = small(world, "cold")
    words = ("--rolling", "alpha", "gamma", "--spare", "beta")
    rows = command.drain(*words)
    assert rows[instance.name]["target"] == "beta"
    note = draining.noted(world.a.driver.node.mailbox)
    assert note is not None and note.draining and note.rolling
    command.run("host", "drain", "--stop")
    note = draining.noted(world.a.driver.node.mailbox)
    assert note is not None and not note.draining and note.rolling
    small(world)

    # Beta has its turn in another round only after alpha, which had none there.
    there = command.other(world)
    wrong = ("--rolling", "alpha", "beta", "--spare", "gamma")
    refused = there.run("host", "drain", *wrong, code=FAILED)
    assert "alpha had no turn yet" in refused.stderr


def test_the_target_does_its_half_itself(world: World, command: Draining) -> None:
    """Its own driver, asked through its receiver."""
    world.b.overrides = {"accept_moves": True}
    world.b.new_driver()
    guests = [small(world, "cold") for _ in range(2)]
    rows = command.drain("--to", "beta")
    assert {row["outcome"] for row in rows.values()} == {"moved"}
    for each in guests:
        assert world.b.state_of(each) == "running"
        there = world.b.driver.node.entitled(each.uuid)
        assert there.policy == ("cold",)
    assert not (world.a.state / "peers").exists()


def test_rehearsal_leaves_nothing(world: World, command: Draining) -> None:
    instance = small(world, "cold")
    before = world.a.files()
    for _ in range(2):
        rows = command.json("host", "drain", "--to", "beta", "--rehearse")
        assert [(row["target"], row["way"], row["failed"]) for row in rows] == [
            ("beta", "cold", "")
        ]
    assert world.a.files() == before
    # As after any revert, the target remembers that it gave one instance back.
    records = {name.partition(".rec.")[0] for name in world.b.files()}
    assert len(records) == 1 and all(n.startswith("instances/") for n in records)
    assert world.a.driver.list_instance_uuids() == [instance.uuid]
    assert world.a.state_of(instance) == "running"
    assert not world.a.driver.is_draining()


def test_rehearsal_finds_what_does_not_work(world: World, command: Draining) -> None:
    """The target plans well, and cannot start anything: its firmware is gone."""
    small(world, "cold")
    world.b.overrides = {"accept_moves": True}
    world.b.new_driver()
    world.b.driver.cleanup_host("beta")
    rows = command.json("host", "drain", "--to", "beta", "--rehearse", code=FAILED)
    assert "no receiver answered" in rows[0]["failed"]
    # What could not be put back at once is removed by the next one.
    world.b.new_driver()
    rows = command.json("host", "drain", "--to", "beta", "--rehearse")
    assert rows[0]["failed"] == ""
    assert len(world.a.driver.list_instance_uuids()) == 1


def test_list_names_the_qemu_of_each_guest(world: World, command: Draining) -> None:
    small(world)
    (row,) = command.json("instance", "list")
    assert row["qemu"] == row["installed"] != ""
    rows = command.json("host", "check")
    (found,) = (row for row in rows if row["check"] == "QEMU")
    assert found["result"] == "works" and row["installed"] in found["detail"]


def large(world: World) -> Any:
    """Make a guest whose disk takes half a minute, once the command is slow."""
    file = world.tmp / "large.raw"
    file.write_bytes(random.Random(1).randbytes(32 * MiB))
    instance = world.spawn(world.a, file, memory_mb=32)
    here = world.a.driver.node
    record = here.instances.read(instance.uuid).body
    here.publish_instance(msgspec.structs.replace(record, policy=("cold",)))
    return instance


def wait_for_transfer(world: World, child: "subprocess.Popen[Any]") -> None:
    """Wait until a move has begun to send."""
    deadline = time.monotonic() + TIMEOUT
    while not any((world.b.path / "incoming").glob("vda.*")):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
