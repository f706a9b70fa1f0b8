# SPDX-License-Identifier: Apache-2.0
"""The tools that are measured, each in the way its manual recommends.

A tool is made ready (the target made, daemons and programs started that stay
anyway), then transfers. Only the transfer is measured.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks import errors
from benchmarks.disks import Disk
from benchmarks.place import Place, Pool
from sandbox import process

TIMEOUT = 300.0
"""Seconds that one transfer may take."""

Transfer = Callable[[], None]


@dataclass(frozen=True)
class Work:
    """What is to be moved from the source's pool to one of the peer's."""

    disks: tuple[Disk, ...]
    target: Pool
    is_fresh: bool = True
    """False: the target holds an older copy, that a tool may make use of."""
    base: Disk | None = None
    """The image below the disks; the peer has it."""
    also: tuple[str, ...] = ()
    """Names of volumes that a tool makes beside those of the disks."""


class Tool(ABC):
    """One way to move disks."""

    name: str

    @abstractmethod
    def ready(
        self, place: Place, work: Work
    ) -> contextlib.AbstractContextManager[Transfer]:
        """Prepare; the yielded function transfers, and raises BenchmarkError."""

    def moved(self, work: Work) -> tuple[Disk, ...]:
        """Return the disks that are at the peer afterwards."""
        return work.disks


class VirshUpload(Tool):
    """`virsh vol-upload` of the file; where it has holes, these are left out."""

    name = "virsh-upload"

    @contextlib.contextmanager
    def ready(self, place: Place, work: Work) -> Iterator[Transfer]:
        _fresh_volumes(place, work)
        yield lambda: one_by_one(
            self._upload_command(work.target, disk) for disk in work.disks
        )

    # Private

    def _upload_command(self, pool: Pool, disk: Disk) -> list[str]:
        argv = ["vol-upload", "--pool", pool.name, disk.name]
        if disk.is_sparse:
            argv.append("--sparse")
        return pool.virsh(*argv, str(disk.path), local=False)


class VirshPipe(Tool):
    """`virsh vol-download | virsh vol-upload`; a pipe has no holes."""

    name = "virsh-pipe"

    @contextlib.contextmanager
    def ready(self, place: Place, work: Work) -> Iterator[Transfer]:
        _fresh_volumes(place, work)
        place.source.serve()
        yield lambda: self._pipes(place, work)

    # Private

    def _pipes(self, place: Place, work: Work) -> None:
        for disk in work.disks:
            download = ["vol-download", "--pool", place.source.name, disk.name]
            upload = ["vol-upload", "--pool", work.target.name, disk.name]
            pipeline(
                place.source.virsh(*download, "/dev/stdout"),
                work.target.virsh(*upload, "/dev/stdin", local=False),
            )


class Scp(Tool):
    """scp with its default ciphers."""

    name = "scp"

    @contextlib.contextmanager
    def ready(self, place: Place, work: Work) -> Iterator[Transfer]:
        argv = ["scp", "-q", "-F", str(place.ssh), *_paths(work), _directory(work)]
        with place.sshd():
            yield lambda: pipeline(argv)


class Rsync(Tool):
    """rsync -S over ssh with its default ciphers; to an older copy, its delta.

    Arguments:
        inplace: write into the older copy: faster, and half of either when it ends
            early. It took 4.8 s for 41 MiB of 4 GiB where -S took 12.6, and both
            together 6.8.
    """

    def __init__(self, *, inplace: bool = False) -> None:
        self.name = "rsync-inplace" if inplace else "rsync"
        self._way = "--inplace" if inplace else "--sparse"

    @contextlib.contextmanager
    def ready(self, place: Place, work: Work) -> Iterator[Transfer]:
        argv = ["rsync", "--ignore-times", self._way, "-e", f"ssh -F {place.ssh}"]
        with place.sshd():
            yield lambda: pipeline([*argv, *_paths(work), _directory(work)])


class Nbdcopy(Tool):
    """nbdcopy to qemu-nbd over TLS, told that the file it writes to is new."""

    name = "nbdcopy"

    @contextlib.contextmanager
    def ready(self, place: Place, work: Work) -> Iterator[Transfer]:
        with contextlib.ExitStack() as stack:
            commands = []
            for number, disk in enumerate(work.disks):
                copy = work.target.file(disk.name)
                with copy.open("xb") as file:
                    file.truncate(disk.size)
                uri = stack.enter_context(place.qemu_nbd(copy, number))
                argv = ["nbdcopy", "--destination-is-zero", str(disk.path), uri]
                commands.append(argv)
            yield lambda: one_by_one(commands)


def one_by_one(commands: Iterable[Sequence[str]]) -> None:
    """Run commands, each when the one before it has ended."""
    for argv in commands:
        pipeline(argv)


def pipeline(*commands: Sequence[str]) -> None:
    """Run commands, each one's output into the next; raise if any of them fails."""
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(tempfile.TemporaryFile("w+"))
        children: list[subprocess.Popen[bytes]] = []
        feed: int | None = subprocess.DEVNULL
        for number, argv in enumerate(commands):
            last = number == len(commands) - 1
            child = subprocess.Popen(
                argv,
                stdin=children[-1].stdout if children else feed,
                stdout=log if last else subprocess.PIPE,
                stderr=log,
                env=environment(),
            )
            stack.callback(_end, child)
            if children and children[-1].stdout:
                children[-1].stdout.close()
            children.append(child)
        for argv, child in zip(commands, children, strict=True):
            if wait(child):
                log.seek(0)
                raise errors.BenchmarkError(
                    f"{' '.join(argv)}: status {child.returncode}: {log.read()}"
                )


def wait(child: subprocess.Popen[bytes]) -> int:
    """Return a child's exit code as soon as it ends.

    Popen.wait() with a timeout looks every 50 ms, which would be added to what the
    tool takes.
    """
    fd = os.pidfd_open(child.pid)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if not poll.poll(TIMEOUT * 1000):
            raise errors.BenchmarkError(f"no end after {TIMEOUT} s: {child.args!r}")
    finally:
        os.close(fd)
    return child.wait()


def environment() -> dict[str, str]:
    return {**os.environ, "PATH": process.search_path(), "LC_ALL": "C.UTF-8"}


# Private


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.kill()
    child.wait()


def _fresh_volumes(place: Place, work: Work) -> None:
    place.fresh_libvirtd()
    pool = work.target
    pool.serve()
    for disk in work.disks:
        create = ["vol-create-as", pool.name, disk.name, f"{disk.size}b"]
        process.run(pool.virsh(*create, "--format", "raw", "--allocation", "0"))


def _paths(work: Work) -> list[str]:
    return [str(disk.path) for disk in work.disks]


def _directory(work: Work) -> str:
    return f"{work.target.host.name}:{work.target.path}/"
