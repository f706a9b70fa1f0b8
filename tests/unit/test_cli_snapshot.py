# SPDX-License-Identifier: Apache-2.0
"""`virtmigrate snapshot …`: what is asked for, and what is shown."""

import argparse

import pytest

from virtmigrate.cli import snapshot, snapshots, tree
from virtmigrate.instance import Power
from virtmigrate.snapshot import Kind, Memory, Place
from virtmigrate.snapshottree import (
    Consistency,
    FrozenDisk,
    Snapshot,
    Snapshots,
    Taken,
)


def a_snapshot(name: str, parent: str | None = None, created: float = 0.0) -> Snapshot:
    return Snapshot(
        id=f"id-{name}",
        name=name,
        kind=Kind.DISK,
        disks=(
            FrozenDisk(
                target="vda",
                backend="local",
                volume=f"root.{name}",
                place=Place.EXTERNAL,
                size=1,
            ),
        ),
        memory=Memory.NONE,
        taken=Taken.OFF,
        consistency=Consistency.CRASH,
        domain_xml="<domain/>",
        created=created,
        by="somebody",
        parent=f"id-{parent}" if parent else None,
    )


def a_tree(*pairs: tuple[str, str | None]) -> Snapshots:
    return tuple(
        a_snapshot(name, parent, number) for number, (name, parent) in enumerate(pairs)
    )


def drawn(found: Snapshots, current: str | None, marks: tree.Marks) -> list[str]:
    return [line for line, _ in tree.lines(found, current, marks)]


# The picture


def test_a_row_of_snapshots_is_not_indented() -> None:
    found = a_tree(("a", None), ("b", "a"), ("c", "b"))
    assert drawn(found, "id-c", tree.FINE) == ["○ a", "○ b", "○ c", "● (now)"]


def test_branches_are_indented() -> None:
    found = a_tree(("a", None), ("b", "a"), ("c", "a"), ("d", "b"), ("e", "b"))
    assert drawn(found, "id-d", tree.FINE) == [
        "○ a",
        "├─○ b",
        "│ ├─○ d",
        "│ │ ● (now)",
        "│ └─○ e",
        "└─○ c",
    ]


def test_now_stands_beside_what_was_taken_after_its_snapshot() -> None:
    found = a_tree(("a", None), ("b", "a"))
    assert drawn(found, "id-a", tree.PLAIN) == ["o a", "|-o b", "`-* (now)"]


def test_several_roots() -> None:
    found = a_tree(("a", None), ("b", None), ("c", "b"))
    assert drawn(found, None, tree.PLAIN) == ["|-o a", "|-o b", "| o c", "`-* (now)"]


def test_long_rows_are_drawn() -> None:
    names = [f"s{number}" for number in range(1000)]
    pairs = zip(names, [None, *names], strict=False)
    lines = drawn(a_tree(*pairs), "id-s999", tree.FINE)
    assert len(lines) == 1001 and lines[-2] == "○ s999"


@pytest.mark.parametrize(
    ("encoding", "marks"),
    [
        ("utf-8", tree.FINE),
        ("ascii", tree.PLAIN),
        ("latin-1", tree.PLAIN),
        (None, tree.PLAIN),
        ("unknown", tree.PLAIN),
    ],
)
def test_marks_that_the_terminal_can_show(
    encoding: str | None, marks: tree.Marks
) -> None:
    assert tree.marks_for(encoding) is marks


# Rows


def test_rows_name_the_parent_and_the_current_one() -> None:
    found = a_tree(("a", None), ("b", "a"))
    columns = (*snapshots.COLUMNS, *snapshots.MORE)
    rows = [
        dict(zip(columns, row, strict=True)) for row in snapshots.rows(found, "id-b")
    ]
    assert [(row["name"], row["parent"], row["current"]) for row in rows] == [
        ("a", None, False),
        ("b", "a", True),
    ]
    assert rows[0]["disks"] == "vda external"
    assert rows[0]["created"] == "1970-01-01 00:00:00Z"


def test_the_picture_has_as_many_columns_as_it_says() -> None:
    found = a_tree(("a", None))
    rows = snapshots.drawn(found, "id-a", tree.FINE)
    assert [len(row) for row in rows] == [len(snapshots.COLUMNS)] * 2
    assert snapshots.drawn((), None, tree.FINE) == []


# Words


def asked(command: type[snapshot._Change], *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(object.__new__(command), parser)
    return parser.parse_args(words)


def test_a_disk_snapshot_is_the_default() -> None:
    found = snapshot.wanted(asked(snapshot.Create, "s"), Power.RUNNING)
    assert (found.name, found.kind, found.memory) == ("s", Kind.DISK, Memory.NONE)
    assert (dict(found.places), found.left_out) == ({}, frozenset())
    assert found.by


@pytest.mark.parametrize(
    ("words", "power", "memory"),
    [
        ((), Power.RUNNING, Memory.EXTERNAL),
        ((), Power.PAUSED, Memory.EXTERNAL),
        ((), Power.OFF, Memory.NONE),
        (("--place", "vda=internal"), Power.RUNNING, Memory.INTERNAL),
        (("--place", "vda=internal"), Power.OFF, Memory.NONE),
        (("--memory", "none"), Power.RUNNING, Memory.NONE),
        (
            ("--place", "vda=internal", "--memory", "external"),
            Power.RUNNING,
            Memory.EXTERNAL,
        ),
    ],
)
def test_memory_of_a_checkpoint(
    words: tuple[str, ...], power: Power, memory: Memory
) -> None:
    args = asked(snapshot.Create, "s", "--checkpoint", *words)
    found = snapshot.wanted(args, power)
    assert (found.kind, found.memory) == (Kind.CHECKPOINT, memory)


def test_memory_makes_a_checkpoint() -> None:
    args = asked(snapshot.Create, "s", "--memory", "external")
    assert snapshot.wanted(args, Power.RUNNING).kind is Kind.CHECKPOINT


def test_disks_are_said_one_by_one() -> None:
    words = ("--place", "vda=external", "--place", "vdb=own", "--leave-out", "vdc")
    found = snapshot.wanted(asked(snapshot.Create, "s", *words), Power.OFF)
    assert found.places == {"vda": Place.EXTERNAL, "vdb": Place.OWN}
    assert found.left_out == {"vdc"}


@pytest.mark.parametrize("text", ["vda", "=own", "vda=", "vda=inside"])
def test_no_place(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="write TARGET=PLACE"):
        snapshot.placed(text)


@pytest.mark.parametrize(
    ("words", "configuration"),
    [
        ((), None),
        (("--configuration",), True),
        (("--no-configuration",), False),
    ],
)
def test_configuration_of_a_way_back(
    words: tuple[str, ...], configuration: bool | None
) -> None:
    found = snapshot.back(asked(snapshot.Revert, "s", *words))
    assert found.configuration is configuration
    assert (found.snapshot, found.keep, found.delete_children) == ("s", "", False)


def test_a_branch_keeps_what_there_is() -> None:
    found = snapshot.back(asked(snapshot.Branch, "s", "--layer", "b"))
    assert found.keep.startswith("kept-") and found.layer == "b"
    assert snapshot.back(asked(snapshot.Branch, "s", "--keep", "k")).keep == "k"


@pytest.mark.parametrize(
    ("words", "doomed"),
    [
        ((), {"children": False, "itself": True}),
        (("--children",), {"children": True, "itself": True}),
        (("--only-children",), {"children": True, "itself": False}),
    ],
)
def test_what_is_deleted(words: tuple[str, ...], doomed: dict[str, bool]) -> None:
    assert snapshot.doomed(asked(snapshot.Delete, "s", *words)) == doomed
