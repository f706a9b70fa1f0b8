# SPDX-License-Identifier: Apache-2.0
"""The lock of the directory that all sandboxes lie in."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from sandbox import errors


@contextlib.contextmanager
def held(root: Path) -> Iterator[None]:
    """Keep other processes from making or removing sandboxes meanwhile."""
    fd = open_locked(root)
    try:
        yield
    finally:
        os.close(fd)


def open_locked(root: Path) -> int:
    """Make the directory, unless it is there, and return it locked."""
    while True:
        root.mkdir(mode=0o755, parents=True, exist_ok=True)
        fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        if os.fstat(fd).st_uid != os.geteuid():
            os.close(fd)
            raise errors.SandboxError(f"{root} belongs to somebody else")
        fcntl.flock(fd, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if root.stat().st_ino == os.fstat(fd).st_ino:
                return fd
        os.close(fd)
