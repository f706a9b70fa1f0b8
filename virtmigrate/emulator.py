# SPDX-License-Identifier: Apache-2.0
"""Which QEMU each guest runs on, beside the one that is installed.

Asked of the kernel, on the host itself: libvirt tells only the installed one, and a
question to QEMU's monitor would taint the guest in libvirt's eyes. An update replaces
the program on disk; a guest goes on with the old one until it moves or is started anew.
"""

import contextlib
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from virtmigrate import node

_PROC = Path("/proc")
_TIMEOUT = 10.0
_DELETED = " (deleted)"
_VERSION = re.compile(r"version (\d+(?:\.\d+)+)")

_File = tuple[int, int]
"""Device and inode."""


@dataclass(frozen=True)
class Emulator:
    """The program that runs a guest."""

    version: str
    """ "" where it cannot be told."""
    replaced: bool
    """Another one is installed in its place since."""

    def __str__(self) -> str:
        return f"{self.version or '?'}{' (replaced)' if self.replaced else ''}"


def running(proc: Path = _PROC) -> dict[str, Emulator]:
    """Return the emulators of this machine's guests, by the guests' UUIDs.

    Without root only those of the same user.
    """
    versions: dict[_File, str] = {}
    found = {}
    for process in proc.glob("[0-9]*"):
        # It may end while it is looked at, or be another user's.
        with contextlib.suppress(OSError):
            uuid = _uuid((process / "cmdline").read_bytes())
            if uuid:
                found[uuid] = _emulator(process, versions)
    return found


def installed(here: node.Node) -> str:
    """Return the version of the QEMU that the next guest is started with."""
    with here.host.session("asking for its QEMU") as session:
        number = session.conn.getVersion()
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"


def is_older(found: Emulator, version: str) -> bool:
    """Tell whether a guest's emulator is not the one that is installed."""
    if found.replaced or not found.version:
        return found.replaced
    return _numbers(found.version) < _numbers(version)


# Private


def _uuid(cmdline: bytes) -> str:
    """Return the UUID of the guest that a command line runs, "" if it runs none."""
    words = cmdline.split(b"\0")
    if b"-uuid" not in words[:-1]:
        return ""
    return words[words.index(b"-uuid") + 1].decode(errors="replace")


def _emulator(process: Path, versions: dict[_File, str]) -> Emulator:
    program = process / "exe"
    path = str(program.readlink())
    stat = program.stat()
    file = stat.st_dev, stat.st_ino
    if file not in versions:
        versions[file] = _version(program)
    replaced = path.endswith(_DELETED) or _file(process, path) not in (None, file)
    return Emulator(versions[file], replaced)


def _file(process: Path, path: str) -> _File | None:
    """Return what stands at a path now, as the process sees it."""
    try:
        stat = Path(f"{process}/root{path}").stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _version(program: Path) -> str:
    """Return what a program says of itself; the kernel keeps one that was replaced."""
    try:
        done = subprocess.run(
            [str(program), "-version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    match = _VERSION.search(done.stdout.decode(errors="replace"))
    return match[1] if match else ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split("."))
