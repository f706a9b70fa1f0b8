# SPDX-License-Identifier: Apache-2.0
"""What the docs print of the rules is what the code asks."""

from pathlib import Path

import pytest

from virtmigrate.snapshot import rules, table
from virtmigrate.snapshottree import Taken

PAGE = Path(__file__).parent.parent.parent / "docs/snapshots.md"


def test_page_is_current() -> None:
    page = PAGE.read_text()
    assert table.insert(page) == page, (
        "run .venv/bin/python -m virtmigrate.snapshot.table docs/snapshots.md"
    )


def test_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="there are no lines"):
        table.insert("# Snapshots\n")


def test_file_is_written(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    table.main([str(page)])
    written = page.read_text()
    assert written.startswith(f"before\n{table.BEGIN}\n\n### ")
    assert written.endswith(f"{table.END}\nafter\n") and "old" not in written
    assert table.insert(written) == written


@pytest.mark.parametrize("taken", Taken)
def test_every_outcome_has_a_line(taken: Taken) -> None:
    lines = table.text().split("### ")
    (part,) = (each for each in lines if each.startswith(f"Taken {_words(taken)}"))
    for case in rules.cases():
        if case.taken is taken:
            assert rules.create(case).said in part, case


@pytest.mark.parametrize("name", sorted(set(table.NAMES.values())))
def test_every_named_case_has_a_line(name: str) -> None:
    assert name in table.text()


def test_lines_with_one_outcome_are_one() -> None:
    for part in table.text().split("| disks | memory | called | how |")[1:]:
        rows = [line.split(" | ") for line in part.partition("\n\n")[0].splitlines()]
        found = [(row[1], row[3]) for row in rows if len(row) == 4]
        assert found and len(set(found)) == len(found)


def _words(taken: Taken) -> str:
    return "of a guest that is off" if taken is Taken.OFF else f"of a {taken.value}"
