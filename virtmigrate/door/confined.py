# SPDX-License-Identifier: Apache-2.0
"""Running a program that reads what strangers wrote: with limits, and to its end.

The limits hold before the program starts: util-linux sets them. The program gains no
rights, has no network where that can be had, ends with the thread that started it, and
is niced: guests come first. Its output is read up to a bound and no further kept.
"""

import functools
import os
import selectors
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from oslo_concurrency import processutils
from oslo_log import log as logging

from virtmigrate import errors
from virtmigrate.units import KiB

LOG = logging.getLogger(__name__)

KEPT = 16 * KiB
"""Bytes of each output that are kept; what follows is read and dropped."""
_LOOK = 0.1
"""Seconds between two looks at whether the work was cancelled."""
_NICE = 10

Check = Callable[[], object]


@dataclass(frozen=True)
class Ended:
    """How a program ended."""

    code: int
    """Its exit code; negative for a signal."""
    output: bytes
    errors: bytes
    is_late: bool = False
    """It was ended because its time was over."""

    @property
    def problem(self) -> str | None:
        """What went wrong, in words; None if nothing did."""
        if self.is_late:
            return "it took too long"
        if self.code < 0:
            return f"the process that read it was ended by signal {-self.code}"
        if self.code:
            return f"the process that read it ended with {self.code}"
        return None


def run(
    argv: Sequence[str],
    *,
    limits: processutils.ProcessLimits,
    seconds: float,
    check: Check,
    stdin: int = subprocess.DEVNULL,
) -> Ended:
    """Run a program and return how it ended.

    Arguments:
        seconds: by the clock; then it is killed.
        check: raises what ends the work, as Progress.check does; called some ten
            times a second. The program is killed then.
        stdin: a file descriptor that it reads.

    Raises ConfigurationError when one of the programs needed is not installed. After
    any error the program has ended.
    """
    with _started([*_confinement(limits), *argv], stdin) as program:
        kept, is_late = _watch(program, time.monotonic() + seconds, check)
        if is_late:
            program.kill()
        code = program.wait()
    return Ended(code, kept[0], kept[1], is_late)


def require(program: str) -> str:
    """Return the path of a program. Raises ConfigurationError."""
    path = shutil.which(program)
    if path is None:
        raise errors.ConfigurationError(
            reason=f"the program {program} is not installed"
        )
    return path


# Private


def _confinement(limits: processutils.ProcessLimits) -> list[str]:
    return [
        *_without_network(),
        *(require("setpriv"), "--no-new-privs", "--pdeathsig", "KILL"),
        *(require("nice"), "-n", str(_NICE)),
        *(require("prlimit"), *limits.prlimit_args(), "--"),
    ]


@functools.cache
def _without_network() -> tuple[str, ...]:
    """Return what takes the network away: root may, others by a user namespace."""
    unshare = require("unshare")
    ways = [(unshare, "--net"), (unshare, "--user", "--net")]
    for way in ways[0 if os.geteuid() == 0 else 1 :]:
        probe = [*way, require("true")]
        if subprocess.run(probe, capture_output=True, timeout=30).returncode == 0:
            return way
    LOG.warning(
        "This kernel gives no namespace without network to uid=%d: what reads images "
        "keeps the network",
        os.geteuid(),
    )
    return ()


@contextmanager
def _started(argv: Sequence[str], stdin: int) -> Iterator[subprocess.Popen[bytes]]:
    program = subprocess.Popen(
        argv,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/",
        # One arena of malloc: each takes 64 MiB of address space.
        env={**os.environ, "LC_ALL": "C", "MALLOC_ARENA_MAX": "1"},
        start_new_session=True,
    )
    with program:
        try:
            yield program
        finally:
            program.kill()


def _watch(
    program: subprocess.Popen[bytes], deadline: float, check: Check
) -> tuple[list[bytes], bool]:
    """Return what the program wrote when it has ended, and whether it is late."""
    kept = [bytearray(), bytearray()]
    with selectors.DefaultSelector() as selector:
        for number, pipe in enumerate((program.stdout, program.stderr)):
            assert pipe is not None
            selector.register(pipe, selectors.EVENT_READ, kept[number])
        while selector.get_map() or program.poll() is None:
            check()
            if time.monotonic() > deadline:
                return [bytes(each) for each in kept], True
            _take(selector)
    return [bytes(each) for each in kept], False


def _take(selector: selectors.BaseSelector) -> None:
    # Without any pipe left, select() only waits.
    for key, _ in selector.select(_LOOK):
        pipe: IO[bytes] = key.fileobj  # type: ignore[assignment]
        data = os.read(pipe.fileno(), KEPT)
        if not data:
            selector.unregister(pipe)
        key.data.extend(data[: KEPT - len(key.data)])
