# SPDX-License-Identifier: Apache-2.0
"""Volumes as files in directories of one file system.

Disks, records and what arrives from peers have a directory and a pool each: every
upload makes libvirt open every file of the pool that it went to, so disks must
not lie where uploads go.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
from oslo_log import log as logging

from virtmigrate import domainxml, errors, model, storagepool, stream
from virtmigrate.backends import base, reflink, terms
from virtmigrate.formats import DiskFormat

LOG = logging.getLogger(__name__)

_RIGHTS = {os.O_RDONLY: os.R_OK, os.O_RDWR: os.R_OK | os.W_OK}


class DirBackend(base.Backend):
    """A directory on a local file system, its pools in subdirectories."""

    kind = "dir"
    capabilities = terms.Capabilities(
        formats=(DiskFormat.RAW, DiskFormat.QCOW2),
        overlays=True,
        snapshots=False,
        shared=False,
        streams=True,
        thick=False,
        files=True,
    )
    cloning: Mapping[str, terms.Clones] = {
        "auto": terms.Clones.OVERLAY,
        "overlay": terms.Clones.OVERLAY,
        "copy": terms.Clones.REFLINK,
    }

    @property
    def preallocates(self) -> bool:
        return bool(self.settings.options.get("preallocation") == "falloc")

    def ensure(self) -> None:
        for pool in (self.disks, self.incoming, self._records):
            directory = pool.name.rpartition("-")[2]
            pool.ensure_directory(f"{self.settings.path}/{directory}")
        super().ensure()

    def storage(self) -> str:
        # Two backends may be directories of one file system.
        if self.disks.is_local():
            return f"{self.host.name}/device {Path(self.disks.path).stat().st_dev}"
        return super().storage()

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

    @contextlib.contextmanager
    def readable(self, name: str) -> Iterator[int | None]:
        if not self.incoming.is_local():
            yield None
            return
        with self._plain(self.incoming, name, os.O_RDONLY) as fd:
            yield fd

    def set_aside(
        self, retired: model.Volume, aside: str, name: str, size: int
    ) -> terms.Reuse:
        source, found = self.pool(retired.pool), terms.Reuse.MOVED
        if not self._renames(source):
            return super().set_aside(retired, aside, name, size)
        before = self._path(source, retired.name)
        if not before.exists():
            # Moved by one who was killed, and who knows what came then; or gone.
            found = self._left(aside, name)
        elif os.access(before, os.R_OK | os.W_OK):
            before.rename(self._path(self.incoming, aside))
        else:
            return super().set_aside(retired, aside, name, size)
        if found in (terms.Reuse.MOVED, terms.Reuse.UNPROVEN):
            with self._plain(self.incoming, aside, os.O_RDWR) as fd:
                if fd is None:
                    raise self._unsupported(f"write to {aside}")
                self._fit(fd, size)
                os.fsync(fd)
        self._settle(source)
        return found

    def switch(self, aside: str, name: str) -> None:
        before, path = (self._path(self.incoming, each) for each in (aside, name))
        try:
            # A rename would replace what is there.
            os.link(before, path, follow_symlinks=False)
        except FileExistsError as e:
            raise errors.VolumeExists(
                host=self.host.name, pool=self.incoming.name, volume=name
            ) from e
        except OSError as e:
            raise self._refused(self.incoming, f"{aside}: {e.strerror}") from e
        before.unlink()
        _fsync(path.parent)
        self.incoming.refresh()

    def grow(self, name: str, size: int) -> None:
        if not self.incoming.is_local():
            super().grow(name, size)
            return
        with self._plain(self.incoming, name, os.O_RDWR) as fd:
            if fd is None:
                super().grow(name, size)
            elif os.fstat(fd).st_size < size:
                self._fit(fd, size)
        self.incoming.refresh()

    # Private

    def _fit(self, fd: int, size: int) -> None:
        """Cut a file, or add zeros, with the room for them."""
        try:
            os.ftruncate(fd, size)
            if self.preallocates and size:
                os.posix_fallocate(fd, 0, size)
        except OSError as e:
            if e.errno != errno.ENOSPC:
                raise
            raise errors.DiskFull(
                host=self.host.name, pool=self.incoming.name, reason=e.strerror
            ) from e

    def _clones(self) -> terms.Clones:
        # A layer takes room as it is written, whatever its pool does.
        if self.preallocates and self.settings.options.get("clones") == "auto":
            return terms.Clones.COPY
        return super()._clones()

    def _clone_record(self, image: model.Volume, volume: model.Volume) -> model.Volume:
        if self.capabilities.clones is not terms.Clones.OVERLAY:
            return super()._clone_record(image, volume)
        return msgspec.structs.replace(
            volume, format=DiskFormat.QCOW2, backing=image.name, parent=None
        )

    def _create_clone(
        self, image: model.Volume, volume: model.Volume, mover: stream.Mover
    ) -> None:
        if volume.backing:
            self._create_overlay(volume, image)
        else:
            super()._create_clone(image, volume, mover)

    def _share_blocks(self, source: model.Volume, volume: model.Volume) -> bool:
        pool = self.pool(source.pool)
        if self.preallocates:
            # Blocks that are shared need room when they are written to.
            return False
        if not (pool.is_local() and self.incoming.is_local()):
            return False
        with (
            self._plain(pool, source.name, os.O_RDONLY) as read,
            self._plain(self.incoming, volume.name, os.O_RDWR) as written,
        ):
            if read is None or written is None:
                return False
            if os.fstat(read).st_size != source.size:
                raise self._refused(pool, f"{source.name} has not {source.size} bytes")
            try:
                cloned = reflink.clone(read, written, source.size, volume.size)
            except OSError as e:
                raise self._refused(pool, f"{source.name}: {e.strerror}") from e
        self.incoming.refresh()
        return cloned

    def _left(self, aside: str, name: str) -> terms.Reuse:
        """Tell what one who was killed left of a volume that was set aside."""
        before, path = (self._path(self.incoming, each) for each in (aside, name))
        found = [_identity(each) for each in (before, path)]
        if found[0] is not None and found[0] == found[1]:
            # Killed in the middle of a switch.
            before.unlink()
        elif found[0] is not None:
            return terms.Reuse.UNPROVEN
        return terms.Reuse.GONE if found[1] is None else terms.Reuse.SWITCHED

    @contextlib.contextmanager
    def _plain(
        self, pool: storagepool.Pool, name: str, flags: int
    ) -> Iterator[int | None]:
        """Open a plain file of a local pool, None where this process may not.

        A link, also a hard one, a pipe and what else leads away from the pool is
        refused, before a byte of it is read.
        """
        path = self._path(pool, name)
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with contextlib.ExitStack() as stack:
            try:
                found, fd = path.lstat(), None
                if _is_plain(found) and os.access(path, _RIGHTS[flags & os.O_RDWR]):
                    fd = os.open(path, flags)
                    stack.callback(os.close, fd)
                    found = os.fstat(fd)
            except FileNotFoundError as e:
                raise errors.VolumeNotFound(
                    host=self.host.name, pool=pool.name, volume=name
                ) from e
            except OSError as e:
                raise self._refused(pool, f"{name}: {e.strerror}") from e
            if not _is_plain(found):
                raise self._refused(pool, f"{name} is no plain file")
            yield fd

    def _refused(self, pool: storagepool.Pool, reason: str) -> errors.StorageError:
        return errors.StorageError(host=self.host.name, pool=pool.name, reason=reason)

    def _renames(self, source: storagepool.Pool) -> bool:
        """Tell whether this process may move files from a pool to incoming."""
        pools = (self.incoming, source)
        return all(p.is_local() and os.access(p.path, os.W_OK) for p in pools)

    def _settle(self, source: storagepool.Pool) -> None:
        """Make a move from a pool to incoming last, and known to libvirt."""
        for pool in (self.incoming, source):
            _fsync(Path(pool.path))
            pool.refresh()

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


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what tells a file from all others; None without one."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _is_plain(found: os.stat_result) -> bool:
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1
