# SPDX-License-Identifier: Apache-2.0
"""Instances that the compute service of this host awaits: their sources may bring them.

Each is an empty file. Its move may never come, so it holds for some time only.
"""

import time
import uuid as uuids
from pathlib import Path

from oslo_log import log as logging

LOG = logging.getLogger(__name__)


class Consents:
    """Which instances may come. Safe to share between threads and processes.

    Arguments:
        directory: made when the first one is given.
        age: seconds that one holds.
    """

    def __init__(self, directory: Path, age: float) -> None:
        self._directory = directory
        self._age = age

    def give(self, uuid: str) -> None:
        """Let it come; given again, that holds as long as a new one."""
        self._directory.mkdir(parents=True, exist_ok=True)
        self._path(uuid).touch()

    def end(self, uuid: str) -> None:
        """Take it back; nothing happens without one."""
        self._path(uuid).unlink(missing_ok=True)

    def has(self, uuid: str) -> bool:
        """Tell whether it may come."""
        return self._holds(self._path(uuid))

    def sweep(self) -> None:
        """Remove those that are over."""
        for path in self._directory.glob("*"):
            if not self._holds(path):
                path.unlink(missing_ok=True)
                LOG.info("instance=%s is awaited no more: it never came", path.name)

    # Private

    def _path(self, uuid: str) -> Path:
        return self._directory / str(uuids.UUID(uuid))

    def _holds(self, path: Path) -> bool:
        try:
            return time.time() - path.stat().st_mtime <= self._age
        except FileNotFoundError:
            return False
