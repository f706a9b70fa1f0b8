# SPDX-License-Identifier: Apache-2.0
"""Volumes as files in directories of one file system.

Disks, records and what arrives from peers have a directory and a pool each: every
upload makes libvirt open every file of the pool that it went to, so disks must
not lie where uploads go.
"""

import os
from pathlib import Path

from oslo_log import log as logging

from virtmigrate import domainxml, errors, model, storagepool
from virtmigrate.backends import base
from virtmigrate.formats import DiskFormat

LOG = logging.getLogger(__name__)


class DirBackend(base.Backend):
    """A directory on a local file system, its pools in subdirectories."""

    kind = "dir"
    capabilities = base.Capabilities(
        formats=(DiskFormat.RAW, DiskFormat.QCOW2),
        overlays=True,
        files=True,
    )

    def ensure(self) -> None:
        for pool in (self.disks, self.incoming, self._records):
            directory = pool.name.rpartition("-")[2]
            pool.ensure_directory(f"{self.settings.path}/{directory}")

    def layer(self, volume: model.Volume) -> domainxml.Layer:
        return domainxml.Layer(
            type=domainxml.SourceType.FILE, source=self.path(volume), fmt=volume.format
        )

    def path(self, volume: model.Volume) -> str:
        # Hosts that share a directory may mount it at different paths.
        for pool in (self.disks, self.incoming):
            if volume.pool == pool.name:
                return pool.volume_path(volume.name)
        return volume.path

    def accept(self, name: str) -> tuple[str, str]:
        source, target = self._path(self.incoming, name), self._path(self.disks, name)
        if self._movable():
            if target.exists():
                return self.disks.name, str(target)
            self._rename(source, target)
            _fsync(target.parent)
            _fsync(source.parent)
            self.incoming.refresh()
            return self.disks.name, str(target)
        LOG.warning(
            "host=%s backend=%s: no right to move files from incoming to disks; "
            "volumes stay in incoming, where every upload makes libvirt read them",
            self.host.name,
            self.name,
        )
        return self.incoming.name, str(source)

    def persist(self, pool: str, name: str) -> bool:
        place = self.pool(pool)
        if not place.is_local():
            return False
        try:
            _fsync(self._path(place, name))
        except PermissionError:
            # sync() waits for all of the machine's file systems, and needs no right.
            os.sync()
        return True

    def local_file(self, pool: storagepool.Pool, name: str) -> Path | None:
        path = self._path(pool, name)
        if pool.is_local() and os.access(path, os.R_OK):
            return path
        return None

    # Private

    def _rename(self, source: Path, target: Path) -> None:
        try:
            source.rename(target)
        except FileNotFoundError as e:
            raise errors.VolumeNotFound(
                host=self.host.name, pool=self.incoming.name, volume=source.name
            ) from e

    def _movable(self) -> bool:
        pools = (self.incoming, self.disks)
        return all(p.is_local() and os.access(p.path, os.W_OK) for p in pools)

    @staticmethod
    def _path(pool: storagepool.Pool, name: str) -> Path:
        return Path(pool.path) / name


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
