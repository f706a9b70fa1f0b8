# SPDX-License-Identifier: Apache-2.0
"""qemu-nbd, serving what a guest sees of a chain of files to this process alone.

It runs as this process's user, may only read, and never probes: the format of every
layer, and where the chain ends, is told. Nobody else reaches it: its socket lies in a
directory of this user, which is gone as soon as all connections are open. It ends with
the last of them (the kernel closes those of a process that is killed), with the thread
that started it, or by close(), whichever comes first. The directory is locked while it
is needed; sweep() removes that of a process that was killed.
"""

import contextlib
import fcntl
import importlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Self

import tenacity
from oslo_log import log as logging

from virtmigrate import domainxml
from virtmigrate.formats import DiskFormat
from virtmigrate.units import GiB, MiB

LOG = logging.getLogger(__name__)

PROGRAMS = ("qemu-nbd", "prlimit", "setpriv")
EXTENTS = "base:allocation"
"""The NBD context that tells data from zeros."""

_SOCKET = "--socket="
_PREFIX = "virtmigrate-nbd-"
"""What the private directories are called."""
_MAKING = 60.0
"""Seconds that a process has from making its directory to locking it."""

_STARTING = 30.0
_ENDING = 10.0
"""Seconds that it may take to serve, and to end by itself."""
_ANSWER = 60.0
"""Seconds without anything from it after which it is given up."""

_LIMITS = {"as": 4 * GiB, "fsize": MiB, "core": 0}
"""Bytes of memory, of what it prints, and of a core, whatever a header makes it do."""


class Failed(Exception):
    """It did not start, did not answer in time, or said that it cannot read."""


def lacking() -> list[str]:
    """Return what of it this host does not have."""
    found = [name for name in PROGRAMS if shutil.which(name) is None]
    try:
        _nbd()
    except ImportError:
        found.append("python3-libnbd")
    return found


def sweep() -> None:
    """Remove the private directories of processes that were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), _locked(path) as found:
            # Anybody may make one of this name there.
            is_ours = found.st_uid == os.geteuid()
            if is_ours and time.time() - found.st_mtime > _MAKING:
                _end(path)
                shutil.rmtree(path)
                LOG.info("%s, which a killed process left, is removed", path)


class Server:
    """One process, and the connections to it: each serves one thread at a time.

    Runs as long as `with`. Entering it raises Failed; then nothing of it is left.

    Arguments:
        layers: the chain, top first: files, with the formats that records give them.
        count: how many connections.
    """

    def __init__(self, layers: Sequence[domainxml.Layer], count: int) -> None:
        self.connections: list[Connection] = []
        self._layers = layers
        self._count = count

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            said = stack.enter_context(tempfile.TemporaryFile())
            private = stack.enter_context(tempfile.TemporaryDirectory(prefix=_PREFIX))
            stack.enter_context(_locked(Path(private)))
            socket = Path(private, "socket")
            self._process = _start(_argv(self._layers, socket, self._count), said)
            stack.push(self._end_after_errors)
            for _ in range(self._count):
                self.connections.append(self._connected(socket, said))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        while self.connections:
            self.connections.pop().close()
        self._process.terminate()
        try:
            self._process.wait(_ENDING)
        except subprocess.TimeoutExpired:
            LOG.warning("qemu-nbd (pid %d) is killed", self._process.pid)
            self._process.kill()
            self._process.wait()

    # Private

    def _end_after_errors(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if kind is not None:
            self.__exit__(kind, error, trace)

    def _connected(self, socket: Path, said: IO[bytes]) -> "Connection":
        """Return a connection, as soon as it serves."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(
                lambda e: isinstance(e, Failed) and self._process.poll() is None
            ),
            wait=tenacity.wait_fixed(0.02),
            stop=tenacity.stop_after_delay(_STARTING),
            reraise=True,
        )
        try:
            return retrying(Connection, socket)
        except Failed as e:
            said.seek(0)
            complaint = said.read(2000).decode(errors="replace").strip()
            raise Failed(complaint or str(e)) from e


class Connection:
    """One connection to a server. Belongs to one thread at a time.

    Whoever finds that it failed finds so again: it is not used any more.
    """

    def __init__(self, socket: Path) -> None:
        nbd = _nbd()
        self._buffer = nbd.Buffer
        self._error = nbd.Error
        self._handle = nbd.NBD()
        with self._translated():
            self._handle.add_meta_context(EXTENTS)
            self._handle.aio_connect_unix(str(socket))
            while not self._handle.aio_is_ready():
                self._turn()
            self.size: int = self._handle.get_size()

    def close(self) -> None:
        """Close it; can be called once."""
        # The binding closes what nobody refers to, and has no other way.
        del self._handle

    def read(self, start: int, end: int) -> bytes:
        """Return a range. Raises Failed."""
        with self._translated():
            buffer = self._buffer(end - start)
            self._await(self._handle.aio_pread(buffer, start))
            return bytes(buffer.to_bytearray())

    def data(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return where a range holds data, as (start, end). Raises Failed."""
        found: list[tuple[int, int]] = []
        while start < end:
            for length, is_zero in self._extents(start, end):
                if not is_zero:
                    found.append((start, min(start + length, end)))
                start += length
        return found

    # Private

    def _extents(self, start: int, end: int) -> list[tuple[int, bool]]:
        """Return at least the first extent of a range: its length, and if it is
        zeros."""
        told: list[int] = []

        def tell(context: str, _: int, entries: list[int], error: object) -> int:
            if context == EXTENTS:
                told.extend(entries)
            return 0

        with self._translated():
            self._await(self._handle.aio_block_status(end - start, start, tell))
        if not any(told[::2]):
            raise Failed("qemu-nbd does not tell where data is")
        pairs = zip(told[::2], told[1::2], strict=True)
        return [(length, bool(flags & _ZERO)) for length, flags in pairs]

    def _await(self, cookie: int) -> None:
        while not self._handle.aio_command_completed(cookie):
            self._turn()

    def _turn(self) -> None:
        if self._handle.poll(int(_ANSWER * 1000)) == 0:
            raise Failed(f"qemu-nbd did not answer within {_ANSWER:g} s")

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except self._error as e:
            raise Failed(str(e)) from e


def described(layers: Sequence[domainxml.Layer]) -> dict[str, Any]:
    """Return the chain as QEMU is told of it: to its end, so that it looks nowhere."""
    below: dict[str, Any] | None = None
    for layer in reversed(layers):
        described: dict[str, Any] = {
            "driver": layer.fmt.value,
            "file": {"driver": "file", "filename": layer.source},
        }
        if layer.fmt is DiskFormat.QCOW2:
            described["backing"] = below
        below = described
    assert below is not None
    return below


# Private


_ZERO = 2
"""NBD_STATE_ZERO: an extent reads as zeros."""


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[os.stat_result]:
    """Hold a directory, and tell what it is; BlockingIOError while somebody has it."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield os.fstat(fd)
    finally:
        os.close(fd)


def _end(private: Path) -> None:
    """End a server whose process was killed before it could ask to go with it."""
    wanted = os.fsencode(f"{_SOCKET}{private}/")
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if any(word.startswith(wanted) for word in each.read_bytes().split(b"\0")):
                os.kill(int(each.parent.name), signal.SIGKILL)


def _start(argv: Sequence[str], said: IO[bytes]) -> "subprocess.Popen[bytes]":
    """Start a program that tells what went wrong in a file."""
    try:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            # One arena of malloc: each takes 64 MiB of address space.
            env={**os.environ, "LC_ALL": "C", "MALLOC_ARENA_MAX": "1"},
        )
    except OSError as e:
        raise Failed(f"{argv[0]}: {e}") from e


def _argv(layers: Sequence[domainxml.Layer], socket: Path, count: int) -> list[str]:
    limits = [f"--{name}={limit}" for name, limit in _LIMITS.items()]
    return [
        *("setpriv", "--no-new-privs", "--pdeathsig", "KILL", "--"),
        *("prlimit", *limits, "--"),
        *("qemu-nbd", "--read-only", f"--shared={count}", f"{_SOCKET}{socket}"),
        f"json:{json.dumps(described(layers))}",
    ]


def _nbd() -> "types.ModuleType":
    return importlib.import_module("nbd")
