# SPDX-License-Identifier: Apache-2.0
"""Volumes as files in a directory that several hosts have mounted: NFS, a cluster's
file system.

All is as in a directory of one host, but that its room is counted once. Whether two
hosts see the same directory is proven for each move, as always.
"""

import dataclasses

from virtmigrate.backends.dir import DirBackend


class SharedDirBackend(DirBackend):
    """A directory that other hosts have, too."""

    kind = "shared_dir"
    capabilities = dataclasses.replace(DirBackend.capabilities, shared=True)

    def storage(self) -> str:
        # Devices and paths have other names on each host.
        return f"shared_dir {self.layout.id()}"
