# SPDX-License-Identifier: Apache-2.0
"""The steps of an operation that are done, fsynced, to resume or undo it.

One file per operation in `state_path`/journal: a line of JSON per step, each
with its own digest. A torn last line is a step that was not done. The file goes
when the operation is over and owes nothing.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import blake3
from oslo_log import log as logging

from virtmigrate import errors

LOG = logging.getLogger(__name__)

SCHEMA = 1


class Journal:
    """The journal of one operation. Not safe to share between threads.

    Arguments:
        path: its file; `create` or `load` make one.
    """

    def __init__(self, path: Path, steps: list[dict[str, Any]]) -> None:
        self.path = path
        self._length = sum(len(_line(step)) for step in steps)
        self._steps: list[dict[str, Any]] = []
        for step in steps:
            self._add(step)

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

        The file stays as it is; the next step overwrites a torn last line.

        Raises JournalBroken when a line before the last is damaged, or a newer
        release wrote it.
        """
        with path.open("rb") as file:
            steps = list(_steps(path, file.readlines()))
        if not steps:
            return None
        if steps[0].get("schema") != SCHEMA:
            raise errors.JournalBroken(
                path=path, reason=f"schema {steps[0].get('schema')} is not known"
            )
        return cls(path, steps)

    def begin_again(self, **facts: object) -> None:
        """Let the operation begin anew: the steps until now count no more."""
        self.done("begun", schema=SCHEMA, operation=self.operation, **facts)

    def beside(self, name: str) -> Path:
        """Return the path of a file that goes with the journal."""
        return self.path.with_name(f"{self.operation}.{name}.known")

    @property
    def operation(self) -> str:
        return str(self._steps[0]["operation"])

    def done(self, step: str, **facts: object) -> None:
        """Record a step as done; it is on disk when this returns.

        On failure the step is not done; a part of its line may stay, and the next
        one overwrites it. Raises JournalBroken when another process wrote to it.
        """
        line = _line({"step": step, **facts})
        with self.path.open("r+b") as file:
            self._expect_ours(file)
            file.truncate(self._length)
            file.seek(self._length)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._length += len(line)
        self._add(json.loads(_text(line)))

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
        for path in self.path.parent.glob(f"{self.operation}.*.known"):
            path.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        _fsync_directory(self.path.parent)

    # Private

    def _add(self, entry: dict[str, Any]) -> None:
        if entry["step"] == "begun":
            self._steps = []
        self._steps.append(entry)

    def _expect_ours(self, file: BinaryIO) -> None:
        """Nothing may follow what we know of but a torn line of ours."""
        file.seek(self._length)
        more = any(_text(line) for line in file)
        if more or os.fstat(file.fileno()).st_size < self._length:
            raise errors.JournalBroken(
                path=self.path, reason="another process changed it"
            )


def load_all(directory: Path) -> list[Journal]:
    """Return the journals of all operations that are not over, oldest first.

    A journal without a first step is of an operation that did nothing: it goes.
    One that is damaged is logged and stays, and the others count.
    """
    found = []
    for changed, path in _by_age(directory):
        with contextlib.suppress(FileNotFoundError):
            try:
                journal = Journal.load(path)
            except errors.JournalBroken as e:
                LOG.error("passed over: %s", e)
                continue
            if journal is not None:
                found.append(journal)
            elif time.time() - changed > _BEGINNING:
                path.unlink()
    return found


# Private

_BEGINNING = 60.0
"""Seconds that another process has from making a journal to its first step."""


def _by_age(directory: Path) -> list[tuple[float, Path]]:
    found = []
    for path in directory.glob("*.journal"):
        # Another process may end its operation meanwhile.
        with contextlib.suppress(FileNotFoundError):
            found.append((path.stat().st_mtime, path))
    return sorted(found)


def _line(entry: dict[str, object]) -> bytes:
    text = json.dumps(entry, sort_keys=True).encode()
    return text + b" " + _digest(text) + b"\n"


def _text(line: bytes) -> bytes:
    """Return what a line says; nothing when it is torn or damaged."""
    text, _, digest = line.removesuffix(b"\n").rpartition(b" ")
    return text if line.endswith(b"\n") and digest == _digest(text) else b""


def _digest(text: bytes) -> bytes:
    return blake3.blake3(text).hexdigest()[:16].encode()


def _steps(path: Path, lines: list[bytes]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        text = _text(line)
        if text:
            yield json.loads(text)
        elif number < len(lines):
            raise errors.JournalBroken(path=path, reason=f"line {number} is damaged")


def _fsync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
