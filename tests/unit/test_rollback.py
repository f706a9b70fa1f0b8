# SPDX-License-Identifier: Apache-2.0
"""Undo: newest first, all of it, and the first error is the one that is seen."""

from collections.abc import Callable

import pytest

from virtmigrate import errors, rollback


class Work:
    """Notes what was undone; steps named in `failing` cannot be."""

    def __init__(self, *failing: str) -> None:
        self.undone: list[str] = []
        self._failing = failing

    def undo(self, step: str) -> Callable[[], None]:
        def undo() -> None:
            self.undone.append(step)
            if step in self._failing:
                raise OSError(f"{step} is stuck")

        return undo

    def run(self, error: BaseException | None) -> rollback.Rollback:
        with rollback.Rollback() as undo:
            for step in ("one", "two", "three"):
                undo.add(step, self.undo(step))
            if error is not None:
                raise error
            undo.commit()
        return undo


@pytest.mark.parametrize(
    "error",
    [OSError("first"), errors.Cancelled(), KeyboardInterrupt(), SystemExit(1)],
    ids=["error", "cancelled", "interrupted", "exit"],
)
def test_newest_first(error: BaseException) -> None:
    work = Work()
    with pytest.raises(type(error)) as caught:
        work.run(error)
    assert caught.value is error
    assert work.undone == ["three", "two", "one"]


def test_committed_stays() -> None:
    work = Work()
    assert work.run(None).failed == []
    assert work.undone == []


def test_leaving_without_error_undoes_nothing() -> None:
    work = Work()
    with rollback.Rollback() as undo:
        undo.add("one", work.undo("one"))
    assert work.undone == []


def test_failing_undo_hides_nothing(caplog: pytest.LogCaptureFixture) -> None:
    work, first = Work("three", "one"), ValueError("first")
    with pytest.raises(ValueError, match="first"), rollback.Rollback() as undo:
        for step in ("one", "two", "three"):
            undo.add(step, work.undo(step))
        raise first
    assert work.undone == ["three", "two", "one"]
    assert undo.failed == ["three: three is stuck", "one: one is stuck"]
    assert "undo failed: three" in caplog.text


def test_what_was_committed_is_not_undone_by_a_later_error() -> None:
    work = Work()
    with pytest.raises(OSError), rollback.Rollback() as undo:
        undo.add("one", work.undo("one"))
        undo.commit()
        undo.add("two", work.undo("two"))
        raise OSError
    assert work.undone == ["two"]


def test_run_twice_undoes_once() -> None:
    work = Work()
    undo = rollback.Rollback()
    undo.add("one", work.undo("one"))
    undo.run()
    undo.run()
    assert work.undone == ["one"]
