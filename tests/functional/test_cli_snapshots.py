# SPDX-License-Identifier: Apache-2.0
"""`virtmigrate snapshot …`, on a guest without a system."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.functional import (
    guestdisk,
    test_cli,
    test_snapshot_findings,
    test_snapshot_limits,
    test_snapshots,
)
from tests.functional.conftest import World
from virtmigrate import merging
from virtmigrate.cli import main
from virtmigrate.units import KiB, MiB

DONE, FAILED = range(2)


class Snapshot:
    """Runs `virtmigrate snapshot` on an instance of the first host."""

    def __init__(
        self, world: World, file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.world = world
        self.instance = world.spawn(world.a)
        self._capsys = capsys
        self._file = file
        file.write_text(test_cli.configuration(world))

    def configure(self, line: str) -> None:
        text = self._file.read_text()
        self._file.write_text(text.replace("[local]", f"{line}\n[local]"))

    def run(self, verb: str, *words: str, code: int = DONE) -> tuple[str, str]:
        options = ["--config-file", str(self._file)]
        argv = [*options, "snapshot", verb, self.instance.name, *words]
        found = main.main(argv)
        said = self._capsys.readouterr()
        assert found == code, said.out + said.err
        return said.out, said.err

    def settle(self) -> None:
        argv = ["--config-file", str(self._file), "host", "settle", "-f", "json"]
        assert main.main(argv) == DONE
        self._capsys.readouterr()

    def json(self, verb: str, *words: str) -> Any:
        return json.loads(self.run(verb, *words, "-f", "json")[0])

    def tree(self, verb: str, *words: str) -> list[str]:
        """Run it and return the lines of the picture."""
        lines = self.run(verb, *words)[0].splitlines()[3:-1]
        return [line.split("|")[1].strip() for line in lines]

    def steps(self, verb: str, *words: str) -> list[tuple[str, str]]:
        rows = self.json(verb, *words, "--dry-run")
        return [(row["step"], row["of"].partition(".")[0]) for row in rows]

    def write(self, byte: int) -> None:
        guestdisk.write(self.world.a, self.instance, byte)

    @property
    def byte(self) -> int:
        return guestdisk.byte(self.world, self.instance)

    @property
    def state(self) -> str | None:
        return self.world.a.state_of(self.instance)


@pytest.fixture
def command(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[Snapshot]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield Snapshot(world, tmp_path / "virtmigrate.conf", capsys)
    root.handlers, root.level = handlers, level


def test_a_tree_from_root_to_nothing(world: World, command: Snapshot) -> None:
    assert command.run("list") == ("\n", "")
    command.write(1)
    before = world.a.files()
    assert command.steps("create", "base", "--layer", "new") == [
        ("freeze", "base"),
        ("external", "vda"),
        ("layer", "new-vda"),
    ]
    assert world.a.files() == before
    assert command.tree("create", "base", "--layer", "new") == ["○ base", "● (now)"]
    assert Path(world.a.disk(command.instance)).name.startswith("new-vda.")
    command.write(2)
    command.tree("create", "next", "--description", "two")
    command.write(3)
    assert command.tree("branch", "base", "--keep", "third", "--layer", "b") == [
        "○ base",
        "├─○ next",
        "│ ○ third",
        "└─● (now)",
    ]
    assert Path(world.a.disk(command.instance)).name.startswith("b-vda.")
    assert command.byte == 1
    assert command.tree("revert", "next", "--power", "paused") == [
        "○ base",
        "○ next",
        "├─○ third",
        "└─● (now)",
    ]
    assert (command.byte, command.state) == (2, "paused")
    rows = {row["name"]: row for row in command.json("list")}
    assert [rows[name]["parent"] for name in rows] == [None, "base", "next"]
    assert [name for name in rows if rows[name]["current"]] == ["next"]
    assert rows["next"]["description"] == "two"
    assert command.tree("delete", "base", "--only-children") == ["○ base", "● (now)"]
    assert command.tree("delete", "base") == []
    assert (command.byte, command.state) == (2, "paused")
    test_snapshots.expect_volumes(world.a, command.instance, 1)


def test_dry_runs_change_nothing(world: World, command: Snapshot) -> None:
    for number in (1, 2):
        command.write(number)
        command.run("create", f"s{number}")
    command.write(3)
    before, tree = world.a.files(), command.tree("list")
    steps = command.steps("revert", "s1", "--delete-children", "--power", "off")
    assert ("delete", "s2") in steps and ("power", "guest") in steps
    keep, *steps = command.steps("branch", "s1")
    # Its name has the time in it.
    assert (keep[0], keep[1][:5]) == ("keep", "kept-")
    assert steps[:2] == [("restore", "s1"), ("layer", "vda")]
    assert command.steps("delete", "s1", "--children")[:2] == [
        ("delete", "s2"),
        ("delete", "s1"),
    ]
    assert (world.a.files(), command.tree("list")) == (before, tree)
    assert command.byte == 3


def test_checkpoint_is_shown(world: World, command: Snapshot) -> None:
    command.run("create", "there", "--checkpoint")
    found = command.json("show", "there")
    (disk,) = found["disks"]
    assert (found["kind"], found["memory"]) == ("checkpoint", "external")
    assert (found["consistency"], found["taken"]) == ("memory", "running")
    assert (disk["target"], disk["place"], disk["size"]) == ("vda", "external", 8 * MiB)
    assert 0 < disk["takes"] <= disk["size"] + MiB
    assert found["memory file"]["size"] > 64 * 1024
    assert (found["parent"], found["children"], found["current"]) == (None, [], True)
    shown, _ = command.run("show", found["id"])
    assert "vda external: " in shown and ", takes " in shown
    # Off it has no memory, and nobody has to say so.
    world.a.driver.power_off(command.instance)
    command.run("create", "offline", "--checkpoint")
    found = command.json("show", "offline")
    assert (found["kind"], found["memory"]) == ("checkpoint", "none")
    assert (found["parent"], found["memory file"]) == ("there", None)
    command.run("revert", "there")
    assert command.state == "running"


@pytest.mark.parametrize("state", ["running", "shutoff"])
def test_branch_from_inside_of_a_volume(
    world: World, command: Snapshot, state: str
) -> None:
    """What is kept first is kept inside, too: a layer would freeze the volume."""
    command.run("create", "layer")
    command.write(1)
    if state == "shutoff":
        world.a.driver.power_off(command.instance)
    command.run("create", "inside", "--checkpoint", "--place", "vda=internal")
    if state == "shutoff":
        world.a.driver.power_on(None, command.instance, None)
    command.write(2)
    if state == "shutoff":
        world.a.driver.power_off(command.instance)
    tree = ["○ layer", "○ inside", "├─○ kept", "└─● (now)"]
    assert command.tree("branch", "inside", "--keep", "kept") == tree
    assert (command.byte, command.state) == (1, state)
    command.run("revert", "kept")
    assert (command.byte, command.state) == (2, state)


def test_delete_waits_for_a_guest_that_gave_its_disks_up(
    world: World, command: Snapshot
) -> None:
    """QEMU does so when the memory of a paused guest was written."""
    a, instance = world.a, command.instance
    a.driver.pause(instance)
    command.run("create", "there", "--checkpoint")
    command.run("delete", "there", code=FAILED)
    assert (command.tree("list"), command.state) == ([], "paused")
    said = command.run("create", "next", code=FAILED)[1]
    assert "virtmigrate host settle" in said
    a.driver.unpause(instance)
    assert a.driver.settle() == []
    test_snapshots.expect_volumes(a, instance, 1)
    command.write(1)
    assert command.byte == 1


def test_children_stay_when_nothing_can_be_kept(
    world: World, command: Snapshot
) -> None:
    command.run("create", "base")
    command.run("create", "child")
    tree = command.tree("list")
    for name, reason in (("no name", "is no name"), ("base", "has a snapshot base")):
        words = ("revert", "base", "--delete-children", "--keep", name)
        assert reason in command.run(*words, "--dry-run", code=FAILED)[1]
        assert reason in command.run(*words, code=FAILED)[1]
        assert command.tree("list") == tree


def test_refusals_say_what_to_do(world: World, command: Snapshot) -> None:
    for words, reason in (
        (("create", "x", "--place", "vda=internal"), "only a qcow2 volume"),
        (("create", "x", "--leave-out", "vdz"), "no disk vdz"),
        (("show", "x"), "has no snapshot x"),
        (("delete", "x"), "has no snapshot x"),
        (("revert", "x", "--dry-run"), "has no snapshot x"),
    ):
        said = command.run(*words, code=FAILED)[1]
        assert reason in said and "Traceback" not in said
    command.run("create", "x")
    assert "has a snapshot x already" in command.run("create", "x", code=FAILED)[1]
    set_owner(world, command.instance, "nova")
    said = command.run("create", "y", code=FAILED)[1]
    assert "belongs to nova" in said and "--unmanaged-override" in said
    command.run("create", "y", "--dry-run")
    assert command.tree("create", "y", "--unmanaged-override") == [
        "○ x",
        "○ y",
        "● (now)",
    ]


def set_owner(world: World, instance: Any, owner: str) -> None:
    here = world.a.driver.node
    found = here.entitled(instance.uuid)
    here.publish_instance(msgspec.structs.replace(found, owner=owner))


def test_disks_that_were_detached(world: World, command: Snapshot) -> None:
    command.instance = test_snapshot_findings.with_detached(world)
    override = "--unmanaged-override"
    (row,) = command.json("detached")
    assert (row["target"], row["backend"]) == ("vdb", "local")
    said = command.run("detached", "--remove", "vdz", override, code=FAILED)[1]
    assert "vdz names 0 of the disks" in said
    assert command.json("detached", "--remove", row["volume"], override) == []
    assert command.json("detached") == []
    assert not [name for name in world.a.files() if row["volume"] in name]


def test_a_slow_chain_is_named_and_made_shorter(command: Snapshot) -> None:
    command.write(1)
    command.run("create", "s1")
    assert "warn_chain" not in command.run("list")[1]
    command.configure("warn_chain = 2")
    said = command.run("create", "s2", "--automatic", "-f", "json")[1]
    assert "vda stands on 3 layers" in said
    assert "vda stands on 3 layers" in command.run("list")[1]
    assert command.json("show", "s2")["automatic"] is True
    command.configure("flatten_chain = 2")
    command.settle()
    assert [row["name"] for row in command.json("list")] == ["s1"]
    assert command.byte == 1


def test_deleting_shows_how_far_it_is(
    command: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    command.write(1)
    command.run("create", "s1")
    for offset in range(8):
        guestdisk.write(command.world.a, command.instance, 2, offset * 512 * KiB)
    monkeypatch.setattr(merging, "_commit", test_snapshot_limits.slowly)
    said = command.run("delete", "s1")[1]
    assert "merging a layer of vda: " in said
    assert " of " in said
    assert "deleting" in said
