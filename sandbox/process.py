# SPDX-License-Identifier: Apache-2.0
"""Processes: run one, remember one, find and end those that are remembered.

A process is known by pid, start time and boot id, never by its name: a pid alone
may be somebody else's by now.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from sandbox import errors

PROC = Path("/proc")
POLL_INTERVAL = 0.01


@dataclasses.dataclass(frozen=True)
class Record:
    """A process that can be told from a later one with the same pid."""

    pid: int
    start: int  # clock ticks since boot, from /proc/PID/stat
    boot: str  # the machine's boot id

    @classmethod
    def of(cls, pid: int) -> Record:
        """Return the record of a living process."""
        stat = read_stat(pid)
        if stat is None:
            raise errors.SandboxError(f"process {pid} is gone")
        return cls(pid, stat[1], boot_id())

    @classmethod
    def load(cls, path: Path) -> Record | None:
        """Return the record in a file, or None when there is no usable one."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def save(self, path: Path) -> None:
        """Write the record in one atomic step."""
        new = path.with_suffix(".new")
        new.write_text(json.dumps(dataclasses.asdict(self)))
        new.rename(path)

    def is_alive(self) -> bool:
        """Return whether this very process still runs (a zombie does not)."""
        stat = read_stat(self.pid)
        return (
            stat is not None
            and stat[0] not in "ZX"
            and stat[1] == self.start
            and boot_id() == self.boot
        )


def run(
    argv: Sequence[str | os.PathLike[str]],
    *,
    timeout: float = 30.0,
    stdin: str = "",
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return it with its output.

    Raises SandboxError when it cannot be started, takes longer than timeout
    seconds, or (with check) fails.
    """
    command = " ".join(str(word) for word in argv)
    try:
        done = subprocess.run(
            [str(word) for word in argv],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "PATH": search_path()},
        )
    except FileNotFoundError as error:
        raise errors.SandboxError(f"cannot start {command}: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise errors.SandboxError(f"no end after {timeout} s: {command}") from error
    if check and done.returncode != 0:
        text = (done.stderr or done.stdout).strip()[-2000:]
        raise errors.SandboxError(f"{command}: status {done.returncode}: {text}")
    return done


def search_path() -> str:
    """Return PATH with the directories that only root's has."""
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def wait_until(condition: Callable[[], bool], timeout: float, what: str) -> None:
    """Wait for a condition that nothing announces.

    Raises SandboxError naming what was awaited after timeout seconds.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise errors.SandboxError(f"after {timeout} s still waiting for {what}")
        time.sleep(POLL_INTERVAL)


def end(records: Iterable[Record], timeout: float = 10.0) -> None:
    """Kill processes and wait until each is gone."""
    for record in list(records):
        if record.is_alive():
            kill_one(record, timeout)


def kill_one(record: Record, timeout: float) -> None:
    """Kill a process by a descriptor, so that its pid cannot be reused meanwhile."""
    try:
        fd = os.pidfd_open(record.pid)
    except ProcessLookupError:
        return
    try:
        if record.is_alive():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            wait_exit(fd, record, timeout)
    finally:
        os.close(fd)


def wait_exit(fd: int, record: Record, timeout: float) -> None:
    """Wait until the process behind a descriptor has ended."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if not poll.poll(timeout * 1000):
        raise errors.SandboxError(f"process {record.pid} does not end")
    with contextlib.suppress(ChildProcessError):
        os.waitpid(record.pid, os.WNOHANG)


def in_namespace(kind: str, pid: int) -> list[Record]:
    """Return the processes that share a namespace (net, pid…) with a process."""
    wanted = namespace_of(kind, pid)
    if wanted is None:
        return []
    found = []
    for other in all_pids():
        if namespace_of(kind, other) == wanted:
            with contextlib.suppress(errors.SandboxError):
                found.append(Record.of(other))
    return found


def namespace_of(kind: str, pid: int) -> str | None:
    """Return what identifies a process's namespace, or None when it is gone."""
    try:
        return str((PROC / str(pid) / "ns" / kind).readlink())
    except OSError:
        return None


def all_pids() -> list[int]:
    """Return the pids visible here."""
    return [int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()]


def inner_pid(pid: int) -> int | None:
    """Return a process's pid in the innermost PID namespace it lives in."""
    try:
        status = (PROC / str(pid) / "status").read_text()
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("NSpid:"):
            return int(line.split()[-1])
    return None


def name_of(pid: int) -> str:
    """Return the file name of the program that a process runs."""
    try:
        return (PROC / str(pid) / "exe").readlink().name
    except OSError:
        return ""


def read_stat(pid: int) -> tuple[str, int] | None:
    """Return state and start time of a process, or None when it is gone."""
    try:
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])


def boot_id() -> str:
    """Return the id of this boot of the machine."""
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


def ancestors() -> set[int]:
    """Return this process's pid and those of its parents."""
    found: set[int] = set()
    pid = os.getpid()
    while pid > 0 and pid not in found:
        found.add(pid)
        pid = parent_of(pid)
    return found


def parent_of(pid: int) -> int:
    """Return the parent's pid, 0 when there is none."""
    try:
        return int((PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
