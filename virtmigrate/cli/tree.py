# SPDX-License-Identifier: Apache-2.0
"""The tree of an instance's snapshots as a picture of lines.

What follows alone stands below, in the same column; only branches are indented, so
that a long row of snapshots stays narrow.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from virtmigrate import snapshottree
from virtmigrate.snapshottree import Snapshot

NOW = "(now)"
"""Stands where the disks have gone on to; no snapshot can have this name."""


@dataclass(frozen=True)
class Marks:
    """What lines are drawn with; the first four have two characters each."""

    branch: str
    last: str
    beside: str
    nothing: str
    snapshot: str
    now: str


FINE = Marks("├─", "└─", "│ ", "  ", "○", "●")
PLAIN = Marks("|-", "`-", "| ", "  ", "o", "*")

Line = tuple[str, Snapshot | None]
"""A line of the picture and what it is of; None: of what there is now."""


def lines(
    snapshots: snapshottree.Snapshots, current: str | None, marks: Marks = FINE
) -> Iterator[Line]:
    """Yield the picture from its roots on, each snapshot before those after it."""
    waiting = _fanned(_after(snapshots, current, None), "", marks)
    while waiting:
        each, head, indent = waiting.pop(0)
        if each is None:
            yield f"{head}{marks.now} {NOW}", None
            continue
        yield f"{head}{marks.snapshot} {each.name}", each
        waiting = _fanned(_after(snapshots, current, each.id), indent, marks) + waiting


def marks_for(encoding: str | None) -> Marks:
    """Return what an output of this encoding can show."""
    try:
        "".join(vars(FINE).values()).encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return PLAIN
    return FINE


# Private

_Node = tuple[Snapshot | None, str, str]
"""One, what stands before its mark, and what before the marks of those after it."""


def _after(
    snapshots: snapshottree.Snapshots, current: str | None, parent: str | None
) -> list[Snapshot | None]:
    """Return what was taken after one; what there is now comes last."""
    now = [None] if current == parent else []
    return [*snapshottree.children(snapshots, parent), *now]


def _fanned(nodes: list[Snapshot | None], indent: str, marks: Marks) -> list[_Node]:
    if len(nodes) == 1:
        return [(nodes[0], indent, indent)]
    last = len(nodes) - 1
    return [
        (each, indent + marks.last, indent + marks.nothing)
        if number == last
        else (each, indent + marks.branch, indent + marks.beside)
        for number, each in enumerate(nodes)
    ]
