# SPDX-License-Identifier: Apache-2.0
"""The guest's side: what is asked of it, by whatever reaches into it."""

import time
from collections.abc import Sequence
from typing import Protocol

import msgspec

from virtmigrate import errors

OUTPUT = 256 * 1024
"""Bytes that a command may write; the rest is an error."""


class Result(msgspec.Struct, frozen=True):
    """How a command in the guest ended."""

    code: int  # exit status; 128 + N when signal N ended it
    out: bytes
    err: bytes


class System(msgspec.Struct, frozen=True):
    """What runs in the guest, by its own word."""

    id: str  # "debian", "mswindows"; "" when nobody knows
    version: str  # "12"
    machine: str  # "x86_64"
    name: str = ""  # for people


class Guest(Protocol):
    """A running guest that can be asked. What it answers is not to be believed.

    All of it raises GuestFailed: the guest does not answer in time, or not in its
    protocol. What it was asked to do may still be done.
    """

    @property
    def instance(self) -> str:
        """The instance's UUID."""
        ...

    @property
    def host(self) -> str:
        """The host's name, for errors."""
        ...

    def system(self, *, timeout: float) -> System:
        """Ask what runs in it."""
        ...

    def run(self, argv: Sequence[str], *, data: bytes = b"", timeout: float) -> Result:
        """Run a command to its end, and kill it after `timeout` seconds."""
        ...

    def read(self, path: str, limit: int, *, timeout: float = 10.0) -> bytes | None:
        """Return a file of at most `limit` bytes, None when there is none."""
        ...

    def write(
        self, path: str, data: bytes, mode: int, *, timeout: float = 10.0
    ) -> None:
        """Have a file with this content and mode, whole or not at all."""
        ...


class Files:
    """read() and write() of a guest that has a POSIX shell, by its run().

    By commands, which can be killed: an agent that opens a FIFO itself would wait
    for ever, and answer nothing any more.
    """

    instance: str
    host: str

    def run(self, argv: Sequence[str], *, data: bytes = b"", timeout: float) -> Result:
        raise NotImplementedError

    def read(self, path: str, limit: int, *, timeout: float = 10.0) -> bytes | None:
        """Return a file of at most `limit` bytes, None when there is none."""
        script = '[ -e "$1" ] || exit 44; head -c "$2" "$1"'
        argv = ["/bin/sh", "-c", script, "read", path, str(limit + 1)]
        result = self.run(argv, timeout=timeout)
        if result.code == _ABSENT:
            return None
        if result.code or len(result.out) > limit:
            raise self._wrong(f"reading {path}", result, f"more than {limit} bytes")
        return result.out

    def write(
        self, path: str, data: bytes, mode: int, *, timeout: float = 10.0
    ) -> None:
        """Have a file with this content and mode, whole or not at all."""
        script = (
            'new=$1.virtmigrate; umask 077; cat >"$new" && '
            '[ "$(wc -c <"$new")" -eq "$3" ] && chmod "$2" "$new" && mv -f "$new" "$1"'
        )
        argv = ["/bin/sh", "-c", script, "write", path, f"{mode:o}", str(len(data))]
        result = self.run(argv, data=data, timeout=timeout)
        if result.code:
            raise self._wrong(f"writing {path}", result, "?")

    def _wrong(self, doing: str, result: Result, other: str) -> errors.GuestFailed:
        reason = told(result) if result.code else other
        return errors.GuestFailed(
            instance=self.instance, host=self.host, doing=doing, reason=reason
        )


_ABSENT = 44


def told(result: Result) -> str:
    """Return what a command that failed said, fit for an error of ours."""
    text = result.err.decode(errors="replace").strip() or f"exit status {result.code}"
    return "".join(c if c.isprintable() else " " for c in text[-300:])


class Timed:
    """A guest, asked under one deadline. Belongs to one thread."""

    def __init__(self, guest: Guest, seconds: float) -> None:
        self.guest = guest
        self.seconds = seconds
        self._until = time.monotonic() + seconds

    def run(self, argv: Sequence[str], data: bytes = b"") -> Result:
        """Run a command; GuestFailed when the time is over."""
        return self.guest.run(argv, data=data, timeout=self.left(argv[0]))

    def left(self, doing: str) -> float:
        """Return how many seconds are left; GuestFailed when none are."""
        left = self._until - time.monotonic()
        if left <= 0:
            raise self.failed(doing, f"not done within {self.seconds:g} s")
        return left

    def failed(self, doing: str, reason: str) -> errors.GuestFailed:
        """Return the error that says what the guest did not do."""
        return errors.GuestFailed(
            instance=self.guest.instance,
            host=self.guest.host,
            doing=doing,
            reason=reason,
        )
