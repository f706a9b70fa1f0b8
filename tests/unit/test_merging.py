# SPDX-License-Identifier: Apache-2.0
"""A merge that does not come to its end is given up: QEMU is played here."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from virtmigrate import errors, merging, progress


class Stuck(merging.Merges):
    """Its job is ready, and never ends; its guest writes on, or stands still."""

    def __init__(self, is_writing: bool) -> None:
        self.is_writing = is_writing
        self.looks = 0

    def pause(self, uuid: str) -> None:
        pass

    def _chain(self, uuid: str, target: str) -> list[str]:
        return ["top", "base"]

    def _job_of(self, uuid: str, target: str) -> dict[str, int]:
        self.looks += 1
        # The second look of each round is at what the guest wrote meanwhile.
        done = 1 if self.is_writing and self.looks % 2 == 0 else 2
        return {"cur": done, "end": 2}

    @contextlib.contextmanager
    def _domain(self, *_: object, **__: object) -> Iterator[Any]:
        yield None


@pytest.mark.parametrize("is_writing", [True, False])
def test_one_that_is_never_over_ends(
    is_writing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.setattr(merging, "_pivot", lambda *_: None)
    told: list[bool] = []
    stuck = Stuck(is_writing)
    assert not stuck.merge("uuid", "vda", "top", "base", lambda: told.append(True))
    # It waited each time, and nobody was told twice.
    assert len(waits) == merging._READY
    assert len(told) == (0 if is_writing else 1)


class Busy(merging.Merges):
    """Its job is half done, and is ended when that is asked for."""

    def __init__(self) -> None:
        self.ended: list[tuple[str, int]] = []

    def _chain(self, uuid: str, target: str) -> list[str]:
        return ["top", "middle", "base"]

    def _job_of(self, uuid: str, target: str) -> dict[str, int]:
        return {"cur": 1, "end": 2}

    @contextlib.contextmanager
    def _domain(self, *_: object, **__: object) -> Iterator[Any]:
        yield self

    def blockJobAbort(self, target: str, flags: int) -> None:
        self.ended.append((target, flags))


@pytest.mark.parametrize("what", ["merge", "pull"])
def test_one_that_is_cancelled_is_ended(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy, mine = Busy(), progress.Progress()
    monkeypatch.setattr("time.sleep", lambda _: mine.cancel())
    with pytest.raises(errors.Cancelled):
        if what == "merge":
            busy.merge("uuid", "vda", "middle", "base", progress=mine)
        else:
            busy.pull("uuid", "vda", "top", None, mine)
    assert busy.ended == [("vda", 0)]
    report = mine.report()
    assert (report.done, report.total) == (1, 2)
