# SPDX-License-Identifier: Apache-2.0
"""Ourselves as one of the tools: a process that waits, transfers when told, and waits.

A service has its imports behind it when a disk is to be moved, so time and memory
count from there. The process stays until its memory has been looked at.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import IO

import msgspec

from benchmarks import errors, ours, stock, tools
from benchmarks.disks import Disk
from benchmarks.place import Place
from benchmarks.tools import Tool, Transfer, Work
from virtmigrate import model

START_TIMEOUT = 30.0


class Virtmigrate(Tool):
    """This package's engine, run by ours.py.

    Arguments:
        verb: a key of ours.VERBS.
        name: what the table calls it.
        instead: another disk to move, for comparison.
    """

    def __init__(
        self,
        verb: str = "copy",
        name: str = "virtmigrate",
        instead: Disk | None = None,
    ) -> None:
        self.name = name
        self._verb = verb
        self._instead = instead

    @contextlib.contextmanager
    def ready(self, place: Place, work: Work) -> Iterator[Transfer]:
        place.fresh_libvirtd()
        work.target.serve()
        with self._child(self._task(place, work)) as child:
            child.expect(ours.READY, START_TIMEOUT)
            yield lambda: child.order(ours.DONE, tools.TIMEOUT)

    def moved(self, work: Work) -> tuple[Disk, ...]:
        return (self._instead,) if self._instead else work.disks

    # Private

    def _task(
        self, place: Place, work: Work, digest: model.Digest | None = None
    ) -> ours.Task:
        return ours.Task(
            verb=self._verb,
            peer_uri=place.beta.uri,
            pool=work.target.name,
            disks=[str(disk.path) for disk in self.moved(work)],
            operation=secrets.token_hex(8),
            base=str(work.base.path) if work.base else None,
            digest=msgspec.to_builtins(digest) if digest else None,
        )

    @contextlib.contextmanager
    def _child(self, task: ours.Task) -> Iterator[_Child]:
        argv = [sys.executable, "-m", "benchmarks.ours", json.dumps(task.__dict__)]
        with tempfile.TemporaryFile("w+") as log:
            popen = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=tools.environment(),
            )
            try:
                yield _Child(popen, log)
                popen.communicate(timeout=START_TIMEOUT)
            finally:
                if popen.poll() is None:
                    popen.kill()
                popen.wait()


class Moving(Virtmigrate):
    """The same with a receiver at the peer, and with what the peer has already."""

    def __init__(self) -> None:
        super().__init__("move")

    @contextlib.contextmanager
    def ready(self, place: Place, work: Work) -> Iterator[Transfer]:
        place.fresh_libvirtd()
        peer = stock.Stock(place)
        with contextlib.ExitStack() as stack:
            stack.enter_context(peer.receiver())
            digest = None
            if work.base is not None:
                base = work.target.file(work.base.name)
                digest = stack.enter_context(peer.image(base))
            if not work.is_fresh:
                for disk in work.disks:
                    copy = work.target.file(disk.name)
                    stack.enter_context(peer.retired(copy))
            task = self._task(place, work, digest)
            child = stack.enter_context(self._child(task))
            child.expect(ours.READY, START_TIMEOUT)
            yield lambda: self._move(child, peer, task, work)

    # Private

    def _move(
        self, child: _Child, peer: stock.Stock, task: ours.Task, work: Work
    ) -> None:
        child.order(ours.DONE, tools.TIMEOUT)
        # Where every tool's copy is looked for, and removed.
        for disk in work.disks:
            copy = peer.incoming(disk, task.operation)
            copy.rename(work.target.file(disk.name))


class _Child:
    """The process, spoken to in lines."""

    def __init__(self, popen: subprocess.Popen[bytes], log: IO[str]) -> None:
        assert popen.stdin is not None and popen.stdout is not None
        self._stdin, self._stdout = popen.stdin, popen.stdout
        self._log = log

    def order(self, answer: str, timeout: float) -> None:
        """Say go, and wait for the answer."""
        self._stdin.write(b"go\n")
        self._stdin.flush()
        self.expect(answer, timeout)

    def expect(self, answer: str, timeout: float) -> None:
        readable, _, _ = select.select([self._stdout], [], [], timeout)
        line = self._stdout.readline().decode() if readable else "nothing"
        if line.strip() != answer:
            self._log.seek(0)
            raise errors.BenchmarkError(
                f"virtmigrate said {line!r} instead of {answer}: {self._log.read()}"
            )
