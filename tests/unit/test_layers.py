# SPDX-License-Identifier: Apache-2.0
"""Imports run downstairs: never up, never in a circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent.parent / "virtmigrate"

FLOORS = {
    # What knows nothing of libvirt hosts, and the words that all use.
    "errors": 1,
    "units": 1,
    "formats": 1,
    "qcow2": 1,
    "address": 1,
    "certificate": 1,
    "certificates": 1,
    "sockets": 1,
    "watchdog": 1,
    "translation": 1,
    "conf": 1,
    "xml": 1,
    "model": 1,
    "schema": 1,
    "snapshottree": 1,
    "manifest": 1,
    "progress": 1,
    "limit": 1,
    "account": 1,
    "periodic": 1,
    # A host, what lies in its pools, and what is kept of it.
    "domainxml": 2,
    "connection": 2,
    "host": 2,
    "wire": 2,
    "poolxml": 2,
    "nearby": 2,
    "poolcalls": 2,
    "storagepool": 2,
    "record": 2,
    # Images that come in: how they are looked at, and where they come from.
    "door": 2,
    "sources": 2,
    "locks": 2,
    "backends": 3,
    "journal": 3,
    "rollback": 3,
    # One volume, one instance, one host with all that it has.
    "known": 2,
    "reading": 3,
    "live": 3,
    "nbdserver": 3,
    "guestview": 3,
    "writing": 3,
    "crew": 3,
    "stream": 3,
    "instance": 4,
    "domainstate": 4,
    "merging": 4,
    "agent": 4,
    "card": 4,
    "rights": 2,
    "saveimage": 2,
    "tenure": 4,
    "mailbox": 3,
    "node": 4,
    "events": 4,
    "inventory": 4,
    "needs": 3,
    "peer": 5,
    "peers": 6,
    "ownhost": 5,
    "pieces": 4,
    "placement": 5,
    # What a source asks of a peer, and who answers it there.
    "request": 2,
    "notice": 3,
    "asking": 5,
    "assistance": 5,
    "reservation": 5,
    "errand": 5,
    "desk": 5,
    "receiver": 5,
    # What is done with instances.
    "migration": 6,
    "snapshot": 6,
    "adopt": 6,
    "upgrade": 6,
    "takeover": 7,
    "consistency": 6,
    "lending": 4,
    "filling": 5,
    "slots": 5,
    "shelf": 5,
    "staging": 5,
    "identity": 5,
    "neighbours": 6,
    "fetching": 6,
    "imagecache": 6,
    "spawning": 7,
    "mapping": 7,
    "clone": 7,
    # Faces.
    "face": 8,
    "driver": 8,
    "check": 9,
    "cli": 9,
}
"""The floor of each module or package; see docs/architecture.md."""


def modules() -> dict[str, Path]:
    """Return all modules by their dotted name below the package."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts).removesuffix("__init__").rstrip(".")
        if name:
            found[name] = path
    return found


def imported(name: str, path: Path) -> Iterator[str]:
    """Yield the modules of the package that a module imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from _from(name, path, node)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("virtmigrate."):
                    yield alias.name.removeprefix("virtmigrate.")


def _from(name: str, path: Path, node: ast.ImportFrom) -> Iterator[str]:
    base = (node.module or "").split(".")
    if node.level:
        package = (
            name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        )
        up = len(package) - node.level + 1
        base = ["virtmigrate", *package[:up], *filter(None, base)]
    if base[0] != "virtmigrate":
        return
    for alias in node.names:
        whole = ".".join([*base[1:], alias.name])
        found = whole if whole in modules() else ".".join(base[1:])
        if found and found != name:
            yield found


GRAPH = {name: set(imported(name, path)) for name, path in modules().items()}


def room(name: str) -> str:
    return name.partition(".")[0]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return a circle, or nothing when there is none."""
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for following in sorted(graph.get(name, ())):
            if found := walk(following, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := walk(name, []))), [])


def test_every_module_has_a_floor() -> None:
    assert {room(name) for name in GRAPH} <= set(FLOORS)


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_imports_run_downstairs(name: str) -> None:
    floor = FLOORS[room(name)]
    up = {other for other in GRAPH[name] if FLOORS[room(other)] > floor}
    assert not up, f"{name} is on floor {floor}"


def test_no_module_is_in_a_circle() -> None:
    assert not circle(GRAPH)


def test_no_room_is_in_a_circle() -> None:
    rooms: dict[str, set[str]] = {}
    for name, others in GRAPH.items():
        rooms.setdefault(room(name), set()).update(
            room(other) for other in others if room(other) != room(name)
        )
    assert not circle(rooms)


def test_a_circle_is_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set[str]()}
    assert circle(graph) == ["b", "c", "b"]
    assert not circle({"a": {"b", "c"}, "b": {"c"}})


STARTS_PROGRAMS = {"backends.lvmtools", "door.confined", "nbdserver"}
"""LVM's own commands, and what reads images and layers: lists of arguments, by no
shell."""

BELOW_THE_FACE = [name for name in sorted(GRAPH) if FLOORS.get(room(name), 9) < 9]


@pytest.mark.parametrize("name", BELOW_THE_FACE)
def test_no_shell_and_no_nova(name: str) -> None:
    """Nothing below the faces starts a program or needs a compute service."""
    tree = ast.parse(modules()[name].read_text())
    found = {
        alias.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {
        (node.module or "").partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and not node.level
    }
    refused = {"subprocess", "nova", "paramiko", "asyncssh"}
    if name in STARTS_PROGRAMS:
        refused.remove("subprocess")
        assert "shell" not in {
            each.arg for each in ast.walk(tree) if isinstance(each, ast.keyword)
        }
    assert not found & refused


def test_driver_knows_neither_libvirt_nor_xml() -> None:
    text = (PACKAGE / "driver.py").read_text()
    tree = ast.parse(text)
    names = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert not names & {"libvirt", "lxml", "etree", "xml", "domainxml"}
