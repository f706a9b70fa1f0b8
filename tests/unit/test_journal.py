# SPDX-License-Identifier: Apache-2.0
"""Journals: what was done survives a crash, what was torn was not done."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virtmigrate import errors, journal


def made(directory: Path, *steps: str) -> journal.Journal:
    begun = journal.Journal.create(directory, "op1", instance="i1", number=7)
    for number, step in enumerate(steps):
        begun.done(step, number=number)
    return begun


def loaded(path: Path) -> journal.Journal:
    found = journal.Journal.load(path)
    assert found is not None
    return found


def test_steps_survive(tmp_path: Path) -> None:
    path = made(tmp_path, "copy", "give", "copy").path
    found = loaded(path)
    assert found.operation == "op1"
    assert found.steps() == ["begun", "copy", "give", "copy"]
    assert found.facts("begun") == {
        "step": "begun",
        "schema": journal.SCHEMA,
        "operation": "op1",
        "instance": "i1",
        "number": 7,
    }
    assert found.facts("copy") == {"step": "copy", "number": 2}
    assert [facts["number"] for facts in found.all("copy")] == [0, 2]
    assert found.has("give") and not found.has("confirm")
    assert found.facts("confirm") is None


def test_facts_are_the_same_before_and_after_a_restart(tmp_path: Path) -> None:
    mine = made(tmp_path)
    mine.done("step", pair=(1, 2), names={"ä": None}, text="a\nb\x85c\u2028d")
    assert loaded(mine.path).facts("step") == mine.facts("step")


def test_restarted_journal_goes_on(tmp_path: Path) -> None:
    path = made(tmp_path, "one").path
    loaded(path).done("two")
    assert loaded(path).steps() == ["begun", "one", "two"]


def test_two_journals_of_one_operation(tmp_path: Path) -> None:
    made(tmp_path)
    with pytest.raises(FileExistsError):
        made(tmp_path)


def test_close_removes(tmp_path: Path) -> None:
    mine = made(tmp_path, "one")
    mine.close()
    mine.close()
    assert not list(tmp_path.iterdir())


def test_only_its_owner_may_read(tmp_path: Path) -> None:
    assert made(tmp_path).path.stat().st_mode & 0o777 == 0o600


# Crashes


@given(cut=st.integers(1, 70))
@settings(max_examples=70, deadline=None)
def test_torn_last_line_was_not_done(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = made(tmp_path_factory.mktemp("journal"), "one", "two").path
    whole = path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    torn = whole[: -min(cut, last)]
    path.write_bytes(torn)
    found = loaded(path)
    assert found.steps() == ["begun", "one"]
    assert path.read_bytes() == torn, "looking at a journal changes nothing"
    found.done("three")
    assert loaded(path).steps() == ["begun", "one", "three"]


def test_last_line_of_garbage_was_not_done(tmp_path: Path) -> None:
    path = made(tmp_path, "one", "two").path
    lines = path.read_bytes().splitlines(keepends=True)
    # As a file system leaves it that wrote the size and not the blocks.
    path.write_bytes(b"".join(lines[:-1]) + b"\0\r" * 20 + b"\n")
    found = loaded(path)
    assert found.steps() == ["begun", "one"]
    found.done("three")
    assert loaded(path).steps() == ["begun", "one", "three"]


@pytest.mark.parametrize("line", [0, 1, 2], ids=["first", "middle", "before-last"])
def test_damaged_line_before_the_last(tmp_path: Path, line: int) -> None:
    path = made(tmp_path, "one", "two", "three").path
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line] = lines[line].replace(b'"', b"'", 1)
    path.write_bytes(b"".join(lines))
    before = path.read_bytes()
    with pytest.raises(errors.JournalBroken, match=f"line {line + 1} is damaged"):
        journal.Journal.load(path)
    assert journal.load_all(tmp_path) == []
    assert path.read_bytes() == before


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_damaged_byte_is_found(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = made(tmp_path_factory.mktemp("journal"), "one", "two").path
    whole = bytearray(path.read_bytes())
    # Two last lines that lost the newline between them look like one torn line.
    places = [place for place, byte in enumerate(whole) if byte != ord("\n")]
    whole[data.draw(st.sampled_from(places))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    try:
        steps = loaded(path).steps()
    except errors.JournalBroken:
        return
    assert steps == ["begun", "one"], "only the last line may count as torn"


def test_newer_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(journal, "SCHEMA", 2)
        path = made(tmp_path).path
    before = path.read_bytes()
    with pytest.raises(errors.JournalBroken, match="schema 2"):
        journal.Journal.load(path)
    assert path.read_bytes() == before


def test_step_that_failed_half_way_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = made(tmp_path, "one")

    def fail(fd: int) -> None:
        os.ftruncate(fd, os.fstat(fd).st_size - 10)
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="no space"):
            mine.done("two")
    assert mine.steps() == ["begun", "one"]
    mine.done("undone")
    assert loaded(mine.path).steps() == ["begun", "one", "undone"]


def test_step_of_another_process_is_not_overwritten(tmp_path: Path) -> None:
    mine = made(tmp_path, "one")
    loaded(mine.path).done("of another process")
    with pytest.raises(errors.JournalBroken, match="another process"):
        mine.done("two")
    assert loaded(mine.path).steps() == ["begun", "one", "of another process"]


def test_step_of_a_journal_that_is_over(tmp_path: Path) -> None:
    mine = made(tmp_path, "one")
    loaded(mine.path).close()
    with pytest.raises(FileNotFoundError):
        mine.done("two")
    assert not list(tmp_path.iterdir())


# Durability


def test_step_is_fsynced_before_done_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = made(tmp_path)
    log: list[tuple[int, bytes]] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        log.append((os.fstat(fd).st_ino, mine.path.read_bytes()))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    mine.done("one")
    assert log == [(mine.path.stat().st_ino, mine.path.read_bytes())]
    assert b'"one"' in log[0][1]


def test_new_and_closed_journals_are_fsynced_in_their_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[tuple[int, bool]] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        log.append((os.fstat(fd).st_ino, (tmp_path / "op1.journal").exists()))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    mine = made(tmp_path)
    directory = tmp_path.stat().st_ino
    assert log == [(directory, True), (mine.path.stat().st_ino, True)]
    mine.close()
    assert log[2:] == [(directory, False)]


# All of a host


def test_load_all_oldest_first(tmp_path: Path) -> None:
    for age, operation in ((20, "b"), (10, "a"), (30, "c")):
        path = journal.Journal.create(tmp_path, operation).path
        os.utime(path, (1000 - age, 1000 - age))
    (tmp_path / "notes.txt").write_text("not a journal")
    assert [found.operation for found in journal.load_all(tmp_path)] == ["c", "b", "a"]


def test_load_all_of_no_directory(tmp_path: Path) -> None:
    assert journal.load_all(tmp_path / "none") == []


@pytest.mark.parametrize("content", [b"", b'{"step": "beg'], ids=["empty", "torn"])
def test_journal_that_never_began_goes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "op.journal"
    path.write_bytes(content)
    assert journal.load_all(tmp_path) == []
    assert path.exists(), "another process may be about to begin it"
    os.utime(path, (1000, 1000))
    assert journal.load_all(tmp_path) == []
    assert not path.exists()


def test_journal_that_is_closed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path)
    real = journal.Journal.load

    def close_first(path: Path) -> journal.Journal | None:
        path.unlink()
        return real(path)

    monkeypatch.setattr(journal.Journal, "load", close_first)
    assert journal.load_all(tmp_path) == []
