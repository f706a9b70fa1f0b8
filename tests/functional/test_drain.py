# SPDX-License-Identifier: Apache-2.0
"""Hosts that are emptied: by the command, between two real hosts."""

import json
import signal
import subprocess
import time
from collections.abc import Iterator
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
        lines = "drain_memory_reserve_mib = 0\nretry_timeout = 0\nsend_ahead = false"
        text = self.file.read_text().replace("[virtmigrate]", f"[virtmigrate]\n{lines}")
        self.file.write_text(text)

    def drain(self, *words: str, code: int = DONE) -> dict[str, Any]:
        """Return the rows by the name of the instance."""
        rows = self.json("host", "drain", *words, code=code)
        return {row["name"]: row for row in rows}

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


def test_drain_of_every_kind_and_the_way_back(
    world: World, command: Draining, tmp_path: Path
) -> None:
    """Twelve guests: each ends where its policy wants it, and the report says so."""
    cold = [small(world, "cold") for _ in range(4)]
    fallen = small(world, "live", "cold")
    off = small(world)
    world.a.driver.power_off(off)
    paused = small(world, "cold")
    world.a.driver.pause(paused)
    live_only = small(world)
    stopped, left = small(world, "stop"), small(world, "leave")
    owned = small(world, "cold", owner="nova")
    transient = small(world, "cold")
    with world.a.libvirt() as conn:
        conn.lookupByUUIDString(transient.uuid).undefine()
    before = {each.uuid: digest(world.a.disk(each)) for each in (*cold, fallen, off)}

    plan = command.drain("--to", "beta", "--dry-run", code=FAILED)
    assert len(plan) == 12
    assert plan[cold[0].name]["target"] == "beta" and plan[cold[0].name]["bytes"] > 0
    assert plan[off.name]["way"] == "offline" and plan[off.name]["downtime"] == 0
    assert plan[fallen.name]["way"] == "cold"
    assert "live" in plan[live_only.name]["blocked"]
    assert "belongs to nova" in plan[owned.name]["blocked"]
    assert "no persistent configuration" in plan[transient.name]["blocked"]
    assert not draining.is_draining(world.a.driver.node.mailbox)
    assert world.b.driver.list_instances() == []

    back, file = tmp_path / "back.json", tmp_path / "report.json"
    words = ("--return-plan", str(back), "--report", str(file))
    rows = command.drain("--to", "beta", *words, code=FAILED)
    moved = (*cold, fallen, off, paused)
    assert {rows[each.name]["outcome"] for each in moved} == {"moved"}
    assert {rows[e.name]["outcome"] for e in (live_only, owned, transient)} == {
        "stayed"
    }
    assert rows[stopped.name]["outcome"] == "stopped"
    assert rows[left.name]["outcome"] == "left"
    assert rows[cold[0].name]["downtime"] > 0 and rows[off.name]["downtime"] is None
    for each in (*cold, fallen):
        assert world.b.state_of(each) == "running" and world.a.state_of(each) is None
    assert (world.b.state_of(off), world.b.state_of(paused)) == ("shutoff", "paused")
    assert world.a.state_of(stopped) == "shutoff"
    assert {world.a.state_of(e) for e in (live_only, left, owned, transient)} == {
        "running"
    }
    for each in (*cold, fallen, off):
        assert digest(world.b.disk(each)) == before[each.uuid]
    report = json.loads(file.read_text())
    staying = sorted(e.name for e in (live_only, left, owned, transient))
    assert report["leftovers"]["running"] == staying
    assert report["leftovers"]["domains"] == sorted([*staying, stopped.name])
    assert len(report["leftovers"]["processes"]) == len(staying)

    # The host takes nothing new, neither by spawn nor by a move.
    with pytest.raises(errors.HostDraining):
        small(world)
    there = command.other(world)
    refused = there.drain("--return", str(back), code=FAILED)
    assert "is drained since" in refused[off.name]["reason"]
    command.run("host", "drain", "--stop")
    rows = there.drain("--return", str(back))
    assert sorted(rows) == sorted(each.name for each in moved)
    for each in (*cold, fallen):
        assert world.a.state_of(each) == "running" and world.b.state_of(each) is None
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


@pytest.mark.parametrize("phase", ["copying", "verifying"])
def test_second_signal_puts_back(world: World, command: Draining, phase: str) -> None:
    """What runs is put back, what waits is not begun, and all of it is told."""
    guests = [small(world, "cold") for _ in range(3)]
    argv = command.argv("host", "drain", "--to", "beta", "-f", "json")
    text = command.file.read_text()
    slow = "[virtmigrate]\nbandwidth_mib = 1\ndrain_concurrency = 1"
    command.file.write_text(text.replace("[virtmigrate]", slow, 1))
    out = subprocess.PIPE
    with subprocess.Popen(argv, stdout=out, stderr=out, text=True) as child:
        wait_for_stop(world, guests, child)
        child.send_signal(signal.SIGINT)
        assert child.stderr is not None
        for line in child.stderr:
            if "no more moves begin" in line:
                break
        child.send_signal(signal.SIGINT)
        shown, _ = child.communicate(timeout=TIMEOUT)
    rows = json.loads(shown)
    assert child.returncode in (CANCELLED, DONE)
    outcomes = [row["outcome"] for row in rows]
    assert outcomes.count("cancelled") >= 2
    for row in rows:
        on = world.b if row["outcome"] == "moved" else world.a
        (guest,) = (each for each in guests if each.uuid == row["uuid"])
        assert on.state_of(guest) == "running"


def test_killed_drain_goes_on(world: World, command: Draining) -> None:
    guests = [small(world, "cold") for _ in range(3)]
    before = {each.uuid: digest(world.a.disk(each)) for each in guests}
    with subprocess.Popen(
        command.argv("host", "drain", "--to", "beta"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as child:
        wait_for_stop(world, guests, child)
        child.kill()
    rows = command.drain("--to", "beta")
    assert {row["outcome"] for row in rows.values()} == {"moved"}
    assert len(rows) == 3
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


def wait_for_stop(
    world: World, guests: list[Any], child: "subprocess.Popen[Any]"
) -> None:
    """Wait until a move has stopped one of the guests."""
    deadline = time.monotonic() + TIMEOUT
    while all(world.a.state_of(each) == "running" for each in guests):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
