# SPDX-License-Identifier: Apache-2.0
"""The rules as the docs print them.

    python -m virtmigrate.snapshot.table [FILE]

prints the tables, or puts them into FILE between its two marks. Lines with the same
outcome are one.
"""

import dataclasses
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from virtmigrate import backends
from virtmigrate.snapshot import rules
from virtmigrate.snapshot.rules import Case, Verdict
from virtmigrate.snapshottree import Memory, Place, Taken

BEGIN = "<!-- Made by python -m virtmigrate.snapshot.table: change the rules. -->"
END = "<!-- The end of what is made. -->"

_INSIDE, _OUTSIDE = frozenset({Place.INTERNAL}), frozenset({Place.EXTERNAL})
NAMES = {
    (_INSIDE, Memory.NONE): "(disk, internal)",
    (_OUTSIDE, Memory.NONE): "(disk, external)",
    (_INSIDE, Memory.INTERNAL): "(checkpoint, internal, internal)",
    (_OUTSIDE, Memory.EXTERNAL): "(checkpoint, external disks, external memory)",
    (_INSIDE, Memory.EXTERNAL): "(checkpoint, internal disks, external memory)",
    (frozenset[Place](), Memory.INTERNAL): "VM state alone",
    (frozenset[Place](), Memory.EXTERNAL): "VM state alone",
}
"""What the proposal of 2011 calls a case, by the places of disks and memory."""

_Places = frozenset[Place]
_Row = tuple[str, ...]
_T = TypeVar("_T")
_K = TypeVar("_K", bound=Hashable)


def text() -> str:
    """Return all tables, in Markdown."""
    return "\n".join(
        [
            "### Where a disk's state is kept",
            "",
            *_table(("backend", "format", *_values(Place), "default"), _places()),
            *(line for taken in Taken for line in _creation(taken)),
            "### Going back, branching, deleting",
            "",
            *_table(("disks", "memory", "taken", "going back"), _ways_back()),
            *_table(("disks", "branching", "deleting"), _others()),
        ]
    )


def insert(page: str) -> str:
    """Return a page with the tables between its marks; ValueError: it has none."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"there are no lines {BEGIN!r} and {END!r}")
    return f"{head}{BEGIN}\n\n{text()}\n{END}{tail}"


def main(argv: Sequence[str]) -> None:
    """Print the tables, or put them into a file."""
    if not argv:
        print(text())
        return
    path = Path(argv[0])
    path.write_text(insert(path.read_text()))


# Private


def _places() -> Iterator[_Row]:
    for name, kind in backends.KINDS.items():
        can = kind.capabilities
        for fmt in can.formats:
            found = [_cell(rules.place(can, fmt, each)) for each in Place]
            default = rules.default_place(can)
            is_kept = rules.place(can, fmt, default).possible
            yield name, fmt.value, *found, default.value if is_kept else "none"


def _creation(taken: Taken) -> Iterator[str]:
    """Yield the lines on guests that do this."""
    found = [
        each for each in rules.cases() if each.taken is taken and not each.quiesced
    ]
    yield from (f"### Taken {_WORDS[taken]}", "")
    yield from _table(("disks", "memory", "called", "how"), _created(found))
    quiesced = [_quiesced(each) for each in found]
    if any(each.possible for each in map(rules.create, quiesced)):
        yield "Quiesced, where that is possible:"
        yield ""
        rows = [each for each in quiesced if rules.create(each).possible]
        yield from _table(("disks", "memory", "called", "how"), _created(rows))
    yield from _refused("Quiesced", found, _quiesced)
    yield from _refused("With UEFI variables", found, _with_variables)
    yield from _refused("With a disk left out", found, _with_left_out)


def _created(cases: Iterable[Case]) -> Iterator[_Row]:
    """Yield a row for each outcome, what is possible first."""
    by_outcome = _grouped(cases, rules.create)
    for verdict in sorted(by_outcome, key=lambda each: not each.possible):
        by_places = _grouped(by_outcome[verdict], lambda case: case.places)
        memories = {
            places: tuple(case.memory for case in group)
            for places, group in by_places.items()
        }
        for kept, sets in _grouped(memories, memories.__getitem__).items():
            names = [NAMES.get((each, memory)) for each in sets for memory in kept]
            called = "; ".join(dict.fromkeys(filter(None, names)))
            yield _disks(sets), _memories(kept), called, _cell(verdict)


def _refused(
    what: str, cases: Iterable[Case], changed: Callable[[Case], Case]
) -> Iterator[str]:
    """Yield why cases that are possible are not when they are changed."""
    possible = [each for each in cases if rules.create(each).possible]
    found = [(each, rules.create(changed(each))) for each in possible]
    refused = [(each, verdict) for each, verdict in found if not verdict.possible]
    for said, group in _grouped(refused, lambda each: each[1].said).items():
        sets = list(dict.fromkeys(each.places for each, _ in group))
        kept = list(dict.fromkeys(each.memory for each, _ in group))
        which = f" disks {_disks(sets)}, memory {_memories(kept)}:"
        if len(refused) == len(possible) == len(group):
            which = ""
        yield f"{what}, **no**:{which} {said}."
        yield ""


def _ways_back() -> Iterator[_Row]:
    cases = [each for each in rules.cases() if rules.create(each).possible]
    alike = _grouped(
        [each for each in cases if not each.quiesced],
        lambda each: (
            each.places,
            each.memory,
            rules.revert(each.places, each.memory, each.taken),
        ),
    )
    for (places, memory, verdict), group in alike.items():
        taken = ", ".join(each.taken.value for each in group)
        yield _disks([places]), memory.value, taken, _cell(verdict)


def _others() -> Iterator[_Row]:
    cases = [each for each in rules.cases() if rules.create(each).possible]
    for places in dict.fromkeys(each.places for each in cases):
        branch, delete = rules.branch(places), rules.delete(places)
        yield _disks([places]), _cell(branch), _cell(delete)


def _table(head: Sequence[str], rows: Iterable[_Row]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def _grouped(found: Iterable[_T], key: Callable[[_T], _K]) -> dict[_K, list[_T]]:
    groups: dict[_K, list[_T]] = {}
    for each in found:
        groups.setdefault(key(each), []).append(each)
    return groups


def _cell(verdict: Verdict) -> str:
    return verdict.said if verdict.possible else f"**no**: {verdict.said}"


def _disks(sets: Iterable[_Places]) -> str:
    found = list(sets)
    every = {each.places for each in rules.cases()}
    if set(found) >= every - {frozenset()}:
        return "any"
    return "; ".join(_together(each) for each in found)


def _together(places: _Places) -> str:
    return " and ".join(each.value for each in Place if each in places) or "none"


def _memories(found: Sequence[Memory]) -> str:
    return "any" if set(found) == set(Memory) else " or ".join(_values(found))


def _values(found: Iterable[Place] | Iterable[Memory]) -> list[str]:
    return [str(each.value) for each in found]


def _quiesced(case: Case) -> Case:
    return dataclasses.replace(case, quiesced=True)


def _with_variables(case: Case) -> Case:
    return dataclasses.replace(case, variables=True)


def _with_left_out(case: Case) -> Case:
    return dataclasses.replace(case, left_out=True)


_WORDS = {
    Taken.OFF: "of a guest that is off",
    Taken.PAUSED: "of a paused guest",
    Taken.RUNNING: "of a running guest",
}

if __name__ == "__main__":
    main(sys.argv[1:])
