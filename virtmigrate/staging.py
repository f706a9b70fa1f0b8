# SPDX-License-Identifier: Apache-2.0
"""Where images lie on a host until they are checked and filled into a backend."""

import contextlib
import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from virtmigrate import errors, node

_OPERATION = re.compile(r"[0-9a-f]{16}")


@contextlib.contextmanager
def opened(here: node.Node, operation: str) -> Iterator[Path]:
    """Yield a directory of this host for what is fetched; it goes in the end.

    Raises StorageError where it cannot be made.
    """
    place = directory(here) / operation
    with here.locks.only(f"staging-{operation}"):
        with explained(here):
            place.mkdir(parents=True, mode=0o700)
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)


def sweep(here: node.Node) -> None:
    """Remove what killed fetchers of this host left."""
    root = directory(here)
    for place in root.iterdir() if root.is_dir() else ():
        if _OPERATION.fullmatch(place.name):
            with here.locks.only(f"staging-{place.name}") as is_idle:
                if is_idle:
                    shutil.rmtree(place, ignore_errors=True)


def directory(here: node.Node) -> Path:
    """Return where images are staged."""
    options = here.options
    return Path(options.image_staging_path or f"{options.state_path}/staging")


@contextlib.contextmanager
def explained(here: node.Node) -> Iterator[None]:
    """Turn OSErrors into what is wrong with the directory: DiskFull, StorageError."""
    try:
        yield
    except OSError as e:
        where = {"host": here.name, "pool": str(directory(here))}
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise errors.DiskFull(**where, reason=e.strerror) from e
        raise errors.StorageError(
            **where,
            reason=f"images cannot be staged there: {e.strerror}; image_staging_path "
            "names that directory",
        ) from e


def demand_room(path: Path, size: int, host: str) -> None:
    """Raise NoSpace where a directory has no room for so many bytes."""
    free = shutil.disk_usage(path).free
    if free < size:
        raise errors.NoSpace(
            host=host, pool=str(path), wanted=size, free=free, reserved=0
        )
