# SPDX-License-Identifier: Apache-2.0
"""Having an image looked at by a process with limits."""

import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from oslo_concurrency import processutils
from oslo_log import log as logging

from virtmigrate import errors
from virtmigrate.door import answer, confined
from virtmigrate.door.terms import Found, Limits, Refusal

LOG = logging.getLogger(__name__)


def inspect(
    path: Path,
    declared: str,
    limits: Limits,
    check: Callable[[], object] = lambda: None,
) -> Found:
    """Return what an image is, when it is what was declared and safe to use.

    Arguments:
        declared: raw, iso, qcow2, vmdk, vdi, vhd or vhdx.
        check: raises what ends the work, as Progress.check does.

    Raises ImageRefused, also when the look crashes, takes too long, or needs more than
    it may; ConfigurationError when a program is missing. The file is as it was.
    """
    try:
        if declared not in limits.formats:
            raise Refusal(f"images of format {declared!r} are not taken: image_formats")
        with _opened(path) as image:
            size = _ask(image, declared, limits, check)
    except Refusal as e:
        raise errors.ImageRefused(image=path, reason=answer.plain(str(e))) from e
    LOG.debug("image=%s format=%s virtual_size=%d comes in", path, declared, size)
    return Found(declared, size)


def recheck(
    path: Path,
    declared: str,
    limits: Limits,
    check: Callable[[], object] = lambda: None,
) -> Found:
    """Look again, by the rules of today, whose version is in Found; see inspect()."""
    return inspect(path, declared, limits, check)


# Private

_STACK = 8 << 20
_FILES = 64


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        # Opening a pipe or a device must neither wait nor do anything.
        image = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as e:
        raise Refusal(f"cannot be opened: {e.strerror}") from e
    try:
        if not stat.S_ISREG(os.fstat(image).st_mode):
            raise Refusal("is no regular file")
        yield image
    finally:
        os.close(image)


def _ask(image: int, declared: str, limits: Limits, check: Callable[[], object]) -> int:
    ended = confined.run(
        # -P: no module is taken from the directory that it starts in.
        [sys.executable, "-P", "-s", "-m", __package__, declared, str(limits.max_size)],
        limits=processutils.ProcessLimits(
            address_space=limits.memory,
            core_file_size=0,
            cpu_time=limits.look_seconds,
            file_size=0,
            number_files=_FILES,
            stack_size=_STACK,
        ),
        seconds=2 * limits.look_seconds,
        check=check,
        stdin=image,
    )
    if ended.problem:
        LOG.warning("A look at an image failed: %s", _told(ended))
        raise Refusal(f"the look at it failed: {ended.problem}")
    return answer.understood(ended.output, declared, limits)


def _told(ended: confined.Ended) -> str:
    return answer.plain(ended.errors[-250:].decode("ascii", "replace"))
