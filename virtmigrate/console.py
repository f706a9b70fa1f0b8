# SPDX-License-Identifier: Apache-2.0
"""What a guest says on its serial console."""

from pathlib import Path

from virtmigrate.units import KiB

LENGTH = 100 * KiB
"""Bytes of a console that are shown: the newest."""


def path(directory: str, uuid: str) -> Path:
    """Return the log of an instance's console, on the libvirt host."""
    return Path(directory) / f"virtmigrate-{uuid}.log"


def tail(log: Path, length: int = LENGTH) -> bytes:
    """Return the end of a console's log.

    virtlogd rotates it: what is missing comes from the one before. Raises OSError
    where there is none, or it may not be read.
    """
    found = _end(log, length)
    older = log.with_name(f"{log.name}.0")
    if len(found) < length and older.exists():
        found = _end(older, length - len(found)) + found
    return found


# Private


def _end(log: Path, length: int) -> bytes:
    with log.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - length))
        return file.read(length)
