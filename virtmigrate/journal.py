# SPDX-License-Identifier: Apache-2.0
"""The steps of an operation that are done, fsynced, to resume or undo it.

One file per operation in `state_path`/journal: a line of JSON per step, each
with its own digest. A torn last line is a step that was not done. The file goes
when the operation is over and owes nothing.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import blake3

from virtmigrate import errors

SCHEMA = 1


class Journal:
    """The journal of one operation. Not safe to share between threads.

    Arguments:
        path: its file; `create` or `load` make one.
    """

    def __init__(self, path: Path, steps: list[dict[str, Any]]) -> None:
        self.path = path
        self._steps = steps

    @classmethod
    def create(cls, directory: Path, operation: str, **facts: object) -> "Journal":
        """Begin the journal of a new operation; its first step is "begun"."""
        directory.mkdir(parents=True, exist_ok=True)
        journal = cls(directory / f"{operation}.journal", [])
        journal.path.touch(mode=0o600, exist_ok=False)
        _fsync_directory(directory)
        journal.done("begun", schema=SCHEMA, operation=operation, **facts)
        return journal

    @classmethod
    def load(cls, path: Path) -> "Journal | None":
        """Read a journal; None when not even its first step was done.

        Raises JournalBroken when a line before the last is damaged, or a newer
        release wrote it.
        """
        lines = path.read_bytes().split(b"\n")
        steps = list(_steps(path, lines))
        if not steps:
            return None
        if steps[0].get("schema") != SCHEMA:
            raise errors.JournalBroken(
                path=path, reason=f"schema {steps[0].get('schema')} is not known"
            )
        _cut(path, steps)
        return cls(path, steps)

    @property
    def operation(self) -> str:
        return str(self._steps[0]["operation"])

    def done(self, step: str, **facts: object) -> None:
        """Record a step as done; it is on disk when this returns."""
        entry = {"step": step, **facts}
        with self.path.open("ab") as file:
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())
        self._steps.append(json.loads(json.dumps(entry)))

    def facts(self, step: str) -> dict[str, Any] | None:
        """Return what was recorded with the newest step of this name, or None."""
        found = self.all(step)
        return found[-1] if found else None

    def has(self, step: str) -> bool:
        """Tell whether a step of this name was done."""
        return self.facts(step) is not None

    def all(self, step: str) -> list[dict[str, Any]]:
        """Return what was recorded with each step of this name, oldest first."""
        return [entry for entry in self._steps if entry["step"] == step]

    def steps(self) -> list[str]:
        """Return the names of all steps done, oldest first."""
        return [str(entry["step"]) for entry in self._steps]

    def close(self) -> None:
        """Remove the journal: the operation is over and owes nothing."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        _fsync_directory(self.path.parent)


def load_all(directory: Path) -> list[Journal]:
    """Return the journals of all operations that are not over, oldest first.

    A journal without a first step is of an operation that did nothing: it goes.
    """
    found = []
    paths = sorted(directory.glob("*.journal"), key=lambda p: p.stat().st_mtime)
    for path in paths:
        journal = Journal.load(path)
        if journal is None:
            path.unlink()
        else:
            found.append(journal)
    return found


# Private


def _line(entry: dict[str, object]) -> bytes:
    text = json.dumps(entry, sort_keys=True).encode()
    return text + b" " + blake3.blake3(text).hexdigest()[:16].encode() + b"\n"


def _steps(path: Path, lines: list[bytes]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines):
        text, _, digest = line.rpartition(b" ")
        if text and blake3.blake3(text).hexdigest()[:16].encode() == digest:
            yield json.loads(text)
        elif any(lines[number + 1 :]):
            raise errors.JournalBroken(
                path=path, reason=f"line {number + 1} is damaged"
            )


def _cut(path: Path, steps: list[dict[str, Any]]) -> None:
    """Cut a torn last line off, so that the next step begins a line."""
    size = sum(len(_line(step)) for step in steps)
    if path.stat().st_size != size:
        with path.open("r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())


def _fsync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
