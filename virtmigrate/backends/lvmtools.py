# SPDX-License-Identifier: Apache-2.0
"""LVM's own commands: the one place where programs are started, and by no shell."""

import os
import shutil
import subprocess

_TIMEOUT = 120.0
"""Seconds that a command may take."""


class Failed(Exception):
    """A command failed, or did not end in time."""


def are_usable() -> bool:
    """Tell whether this process may use them: they are there, and it is root."""
    return os.geteuid() == 0 and shutil.which("lvs") is not None


def run(*argv: str) -> str:
    """Run a command and return what it prints. Raises Failed."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise Failed(f"{' '.join(argv)}: {e}") from e
    if done.returncode:
        raise Failed(f"{' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout
