# SPDX-License-Identifier: Apache-2.0
"""What a drain has done, so that one that was killed goes on.

Steps in its journal:

    begun       when it began
    instance    one move begins, to which host and by which way; once more with how it
                ended
"""

import threading
from pathlib import Path
from typing import Self

import msgspec

from virtmigrate import journal
from virtmigrate.drain.values import Outcome, Result, Way
from virtmigrate.schema import Struct

DIRECTORY = "drain"


class Move(Struct, frozen=True):
    """A move that was begun."""

    uuid: str
    target: str
    way: Way


class Diary:
    """The journal of one drain. Safe to share between threads.

    Arguments:
        written: its journal; `open_in` finds or makes one.
    """

    def __init__(self, written: journal.Journal) -> None:
        self._journal = written
        self._lock = threading.Lock()

    @classmethod
    def open_in(cls, state: Path, operation: str, **facts: object) -> Self:
        """Return the diary of the drain that is not over, or begin one.

        Arguments:
            state: the host's state_path.
            operation: of the new one, if one begins.
        """
        directory = state / DIRECTORY
        found = journal.load_all(directory) if directory.exists() else []
        if found:
            return cls(found[0])
        return cls(journal.Journal.create(directory, operation, **facts))

    def began(self) -> float:
        """Return when the drain began, in seconds since the epoch."""
        return float((self._journal.facts("begun") or {}).get("time", 0.0))

    def moving(self, uuid: str, target: str, way: Way) -> None:
        """Note that a move begins; before its first step."""
        self._note(uuid, target, way.value, "")

    def ended(self, result: Result) -> None:
        """Note how it went with an instance."""
        text = msgspec.json.encode(result).decode()
        way = result.way.value if result.way else ""
        self._note(result.uuid, result.target, way, text)

    def results(self) -> list[Result]:
        """Return the newest result of each instance that is not here any more."""
        found = [self._result(entry) for entry in self._newest().values()]
        return [each for each in found if each and each.outcome is Outcome.MOVED]

    def open_moves(self) -> list[Move]:
        """Return the newest move of each instance that has not come to an end.

        Also of those that ended between two hosts, or could not be confirmed.
        """
        moves = []
        for uuid, entry in self._newest().items():
            result = self._result(entry)
            is_open = result is None or result.outcome in _HALF
            if is_open and entry["target"]:
                way = Way(entry["way"])
                moves.append(Move(uuid=uuid, target=entry["target"], way=way))
        return moves

    def close(self) -> None:
        """The drain is over, and its report is written."""
        with self._lock:
            self._journal.close()

    # Private

    def _note(self, uuid: str, target: str, way: str, result: str) -> None:
        with self._lock:
            self._journal.done(
                "instance", uuid=uuid, target=target, way=way, result=result
            )

    def _newest(self) -> dict[str, dict[str, str]]:
        """Return what was noted last of each instance."""
        with self._lock:
            return {entry["uuid"]: entry for entry in self._journal.all("instance")}

    @staticmethod
    def _result(entry: dict[str, str]) -> Result | None:
        if not entry["result"]:
            return None
        return msgspec.json.decode(entry["result"], type=Result)


# Private

_HALF = (Outcome.UNDECIDED, Outcome.ARRIVED)
