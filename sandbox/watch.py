# SPDX-License-Identifier: Apache-2.0
"""Which programs some processes and their descendants start, told by the kernel.

The kernel's trace points for fork and exec cost a watched QEMU nothing, where
strace would stop it at every system call.
"""

import contextlib
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from sandbox import errors, process

EVENTS = ("sched_process_fork", "sched_process_exec")
_FORK = re.compile(r"sched_process_fork: .*?\bpid=(\d+) .*child_pid=(\d+)")
_EXEC = re.compile(r"sched_process_exec: filename=(\S+) pid=(\d+) old_pid=(\d+)")


class Programs:
    """What was started; filled when watching ends."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    @property
    def names(self) -> set[str]:
        return {Path(path).name for path in self.paths}


@contextlib.contextmanager
def programs(pids: Iterable[int]) -> Iterator[Programs]:
    """Watch these processes and all that they start.

    Arguments:
        pids: as seen from the first PID namespace.
    """
    watched, found = set(_threads(pids)), Programs()
    with _instance() as instance:
        _switch(instance, "1")
        try:
            yield found
        finally:
            _switch(instance, "0")
            text = (instance / "trace").read_text()
    found.paths = _started(text, watched)


def _threads(pids: Iterable[int]) -> Iterator[int]:
    for pid in pids:
        yield from (int(each.name) for each in Path(f"/proc/{pid}/task").iterdir())


def _started(text: str, watched: set[int]) -> list[str]:
    paths = []
    for line in text.splitlines():
        if fork := _FORK.search(line):
            if int(fork[1]) in watched:
                watched.add(int(fork[2]))
        elif (executed := _EXEC.search(line)) and int(executed[3]) in watched:
            watched.add(int(executed[2]))
            paths.append(executed[1])
    return paths


@contextlib.contextmanager
def _instance() -> Iterator[Path]:
    """A trace buffer of our own, in a mount that only this process's place sees."""
    mount = Path(tempfile.mkdtemp(prefix="sandbox-trace-"))
    with contextlib.ExitStack() as stack:
        stack.callback(mount.rmdir)
        try:
            process.run(["mount", "-t", "tracefs", "tracefs", mount])
        except errors.SandboxError as e:
            raise errors.SandboxError(f"no tracefs to watch programs with: {e}") from e
        stack.callback(process.run, ["umount", mount])
        instance = mount / "instances" / mount.name
        instance.mkdir()
        stack.callback(instance.rmdir)
        yield instance


def _switch(instance: Path, value: str) -> None:
    for event in EVENTS:
        (instance / f"events/sched/{event}/enable").write_text(value)
