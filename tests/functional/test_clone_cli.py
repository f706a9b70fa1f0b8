# SPDX-License-Identifier: Apache-2.0
"""`virtmigrate clone …`, on guests without a system."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.functional import cloneworld, test_cli
from tests.functional.cloneworld import RISK
from tests.functional.conftest import World
from virtmigrate.cli import clone, main

COMMANDS: dict[str, Any] = {
    "clone create": clone.Create,
    "clone list": clone.List,
    "clone report": clone.Report,
    "clone detach": clone.Detach,
}


class Command:
    """Runs `virtmigrate clone`."""

    def __init__(self, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._file = file
        self._capsys = capsys

    def run(self, verb: str, *words: str, code: int = 0) -> tuple[str, str]:
        app = main.App()
        for name, found in COMMANDS.items():
            app.command_manager.add_command(name, found)
        argv = ["--config-file", str(self._file), "clone", verb, *words]
        result = app.run(argv)
        said = self._capsys.readouterr()
        assert result == code, said.out + said.err
        return said.out, said.err

    def json(self, verb: str, *words: str) -> Any:
        return json.loads(self.run(verb, *words, "-f", "json")[0])


@pytest.fixture
def command(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    file = tmp_path / "virtmigrate.conf"
    text = test_cli.configuration(world)
    file.write_text(
        text.replace("[virtmigrate]", "[virtmigrate]\nenable_live_clone = true", 1)
    )
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield Command(file, capsys)
    root.handlers, root.level = handlers, level


def test_clones(world: World, command: Command) -> None:
    source = cloneworld.dummy(world, mac=cloneworld.MAC)
    assert command.json("list") == []
    _, said = command.run("create", source.name, "one", code=1)
    assert "agent" in said
    risk = ("--risk", RISK[0])
    made = command.json("create", source.name, "one", "two", *risk)
    assert [(each["name"], each["state"]) for each in made] == [
        ("one", "apart"),
        ("two", "apart"),
    ]
    rows = command.json("list")
    assert [(r["name"], r["source"], r["kind"], r["power"]) for r in rows] == [
        ("one", source.name, "live", "running"),
        ("two", source.name, "live", "running"),
    ]
    report = command.json("report", "one")
    assert report["state"] == "apart"
    assert report["not unique"] == "agent"
    assert report["source"] == source.uuid
    _, said = command.run("report", source.name, code=1)
    assert "it is no clone" in said
    command.run("detach", "one")
    lenders = world.a.driver.clones.lenders
    found = {row["name"]: row["uuid"] for row in rows}
    assert lenders(found["one"]) == set()
    assert lenders(found["two"]) == {source.uuid}


def test_cold(world: World, command: Command) -> None:
    source = cloneworld.dummy(world)
    world.a.driver.power_off(source)
    (made,) = command.json("create", source.name, "one")
    assert made["state"] == "ready"
    (row,) = command.json("list")
    assert (row["kind"], row["power"]) == ("off", "off")
    # Its name is taken now.
    _, said = command.run("create", source.name, "one", code=1)
    assert "called one" in said
