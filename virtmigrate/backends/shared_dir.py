# SPDX-License-Identifier: Apache-2.0
"""Volumes as files in a directory that several hosts have mounted: NFS, a cluster's
file system.

All is as in a directory of one host, but that its room is counted once. Whether two
hosts see the same directory is proven for each move, as always.
"""

import dataclasses
from pathlib import Path

from virtmigrate import errors
from virtmigrate.backends import coordination, terms
from virtmigrate.backends.dir import DirBackend
from virtmigrate.host import Host
from virtmigrate.locks import FileLocks, Mechanism


class SharedDirBackend(DirBackend):
    """A directory that other hosts have, too."""

    kind = "shared_dir"
    capabilities = dataclasses.replace(DirBackend.capabilities, shared=True)

    def __init__(self, host: Host, settings: terms.Settings) -> None:
        super().__init__(host, settings)
        self._lock_url: str | None = settings.options["lock_url"]
        self._lock_files: bool = settings.options["lock_files"]
        if self._lock_url and self._lock_files:
            raise errors.ConfigurationError(
                reason=f"backend {self.name}: lock_url and lock_files are two ways of "
                "locking, which do not know of each other: choose one"
            )
        if self._lock_url or self._lock_files:
            reach = terms.Reach.STORAGE
            self.capabilities = dataclasses.replace(self.capabilities, locks=reach)

    def storage(self) -> str:
        # Devices and paths have other names on each host.
        return f"shared_dir {self.layout.id()}"

    # Private

    def _lock_mechanism(self) -> Mechanism:
        if self._lock_url:
            lease, storage = self.settings.lock_lease, self.layout.id()
            where = (self.host.name, self.name)
            return coordination.CoordinatedLocks(self._lock_url, lease, storage, where)
        if not self._lock_files:
            return super()._lock_mechanism()
        if not self.disks.is_local():
            raise errors.ConfigurationError(
                reason=f"backend {self.name}: {self.settings.path} is not seen from "
                "here, so its locks (lock_files) cannot be taken from here"
            )
        return FileLocks(Path(self.settings.path) / "locks")
