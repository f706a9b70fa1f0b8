# SPDX-License-Identifier: Apache-2.0
"""Letting the unprivileged user reach a checkout below a closed directory.

A clone in /root cannot be entered by anybody else. In the client's mount
namespace, and nowhere else, each closed directory above the checkout is covered
by a read-only overlay that others may pass through (not list); the checkout lies
in it, writable, as before.
"""

from __future__ import annotations

import stat
from pathlib import Path


def mounts(checkout: Path, workspace: Path) -> list[list[str]]:
    """Return arguments for mount; none when the checkout can be reached.

    Arguments:
      checkout: absolute path.
      workspace: an absent directory for mount points and the top layer.
    """
    closed = [path for path in reversed(checkout.parents) if not passable(path)]
    if not closed:
        return []
    door, aside = workspace / "door", workspace / "checkout"
    for directory in (workspace, door, aside):
        directory.mkdir(mode=0o711)
    return [
        ["--bind", str(checkout), str(aside)],
        *(overlay(door, path) for path in closed),
        ["--bind", str(aside), str(checkout)],
    ]


def passable(path: Path) -> bool:
    """Return whether everybody may go through a directory."""
    return bool(path.stat().st_mode & stat.S_IXOTH)


def overlay(top: Path, path: Path) -> list[str]:
    """Return the mount that gives a directory the rights of another one."""
    layers = f"lowerdir={top}:{path}"
    return ["-t", "overlay", "-o", layers, "overlay", str(path)]
