# SPDX-License-Identifier: Apache-2.0
"""A pool's directory that lies on this machine, looked at without libvirt.

libvirt answers "what is there" by opening every file of the pool, which grows with
what others have there; a directory of this machine says it at once. Only looks: what
is made, written or removed is libvirt's business, which gives owners and labels.
"""

import os
import stat
from pathlib import Path


class Nearby:
    """What libvirt would list of a directory. Safe to share between threads.

    All methods raise OSError; the caller asks libvirt then.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def names(self) -> list[str]:
        """Return the names of all that libvirt calls a volume."""
        with os.scandir(self._path) as found:
            return [each.name for each in found if _is_volume(each)]

    def has(self, name: str) -> bool:
        """Tell whether libvirt would list a volume of this name."""
        path = self._path / name
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            return False
        if stat.S_ISLNK(mode):
            return path.exists()
        return stat.S_ISREG(mode) or stat.S_ISDIR(mode)

    def changed(self) -> int:
        """Return when a name came or went last, in nanoseconds of its clock."""
        return self._path.stat().st_mtime_ns

    def read(self, name: str, limit: int) -> bytes:
        """Return the bytes of a small file.

        ValueError when they are more than limit, or it is no plain file.
        """
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(self._path / name, flags)
        with os.fdopen(fd, "rb", buffering=0) as file:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise ValueError(f"{name} is no plain file")
            if found.st_size > limit:
                raise ValueError(f"{name} has {found.st_size} bytes, more than {limit}")
            return file.read(limit) or b""


# Private


def _is_volume(found: "os.DirEntry[str]") -> bool:
    if found.is_symlink():
        # libvirt follows it, and leaves out what leads nowhere.
        return Path(found.path).exists()
    return found.is_file() or found.is_dir()
