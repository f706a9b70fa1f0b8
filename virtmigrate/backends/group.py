# SPDX-License-Identifier: Apache-2.0
"""A volume group as a pool of libvirt, and what libvirt cannot do with it.

libvirt makes, deletes, reads, writes and zeroes logical volumes, also from afar. It
can neither grow nor rename them: lvextend and lvrename do that, on the group's own
host only, by a process that is root there.
"""

import contextlib
import errno
import fcntl
import os
import stat
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

from virtmigrate import errors, record, storagepool, wire, writing, xml
from virtmigrate.backends import lvmtools
from virtmigrate.host import Host
from virtmigrate.units import GiB, MiB

_HEAD = 4096
"""Bytes that a record is looked for in; LVM zeroes them in a new volume."""

_STRETCH = 32 * MiB
"""Bytes of one stream."""

_BLKDISCARD = 0x1277
_BLKZEROOUT = 0x127F

_GROWING = "virtmigrate-grow-"
"""Begins the tag of a volume whose tail is not zeroed yet; its old size follows."""

_STATE = ".state."
"""Stands in the name of a kept state, between its volume and who keeps it."""


class GroupPool(storagepool.Pool):
    """The volumes of a volume group. Safe to share between threads.

    This host's libvirtd is the only one that has the group, so what it knows is true
    and is not refreshed each time: `refresh` after a command of LVM.
    """

    is_directory = False

    def __init__(
        self,
        host: Host,
        name: str,
        group: str,
        ownership: storagepool.Ownership,
        busy_timeout: float,
    ) -> None:
        super().__init__(
            host, name, ownership=ownership, busy_timeout=busy_timeout, thick=True
        )
        self.group = group
        self._extent = 0
        self._commands = threading.Lock()

    @property
    def path(self) -> str:
        return f"/dev/{self.group}"

    def names(self) -> list[str]:
        return self._retry(
            "listing", lambda _, pool: [vol.name() for vol in pool.listAllVolumes(0)]
        )

    def extent(self) -> int:
        """Return the bytes that sizes are multiples of."""
        if not self._extent:
            with self.nonce() as name:
                self._extent = self.physical(name)
        return self._extent

    def wipe(self, name: str, size: int) -> None:
        """Write zeros over all of a volume: by the kernel where this process may."""
        with self.device(name, os.O_RDWR) as fd:
            if fd is not None:
                overwrite(fd, 0)
                return
        if is_state(name):
            # libvirt wipes no snapshot.
            self._send_zeros(name, size)
        else:
            super().wipe(name, size)

    def discard(self, name: str) -> bool:
        """Discard all blocks of a volume; False where that cannot be done."""
        with self.device(name, os.O_RDWR) as fd:
            if fd is None:
                return False
            try:
                _each_range(fd, _BLKDISCARD, 0, os.lseek(fd, 0, os.SEEK_END))
            except OSError as e:
                if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise self._failed(f"discarding {name}: {e.strerror}") from e
                return False
        return True

    def keep(self, name: str, state: str) -> None:
        """Make a snapshot of a volume, with room for all that can change.

        Raises VolumeExists; on failure there is no volume of the name.
        """
        backing = xml.element("backingStore")
        xml.add(backing, "path", self.volume_path(name))
        # LVM cuts what is more than a snapshot of this volume can ever use.
        self._create(state, 2 * self.physical(name), "raw", backing)

    def states(self, name: str) -> set[str]:
        """Return the kept states of a volume.

        From afar without those that overflowed: libvirt does not list them.
        """
        found = {*self.names(), *self.snapshots(name)}
        return {each for each in found if each.startswith(f"{name}{_STATE}")}

    # This machine's view

    def is_managed(self) -> bool:
        """Tell whether this process may change the group by LVM's commands."""
        return lvmtools.are_usable() and self.is_local()

    @contextlib.contextmanager
    def device(self, name: str, flags: int) -> Iterator[int | None]:
        """Open a volume's device, None where this process may not.

        Raises VolumeNotFound, StorageError when its path leads to another device.
        """
        path = Path(self.volume_path(name))
        if not self.is_local():
            yield None
            return
        fd = None
        try:
            fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
        except PermissionError:
            yield None
            return
        except FileNotFoundError as e:
            raise errors.VolumeNotFound(
                host=self.host.name, pool=self.name, volume=name
            ) from e
        except OSError as e:
            raise self._failed(f"{path}: {e.strerror}") from e
        try:
            self._demand_same(path, fd, mapped_name(self.group, name))
            yield fd
        finally:
            os.close(fd)

    def is_open(self, name: str) -> bool:
        """Tell whether somebody has a volume open; False where nobody can say."""
        return self.is_managed() and self._shown(name, "lv_device_open") == "open"

    def rename(self, before: str, name: str) -> None:
        """Give a volume another name, in one step; VolumeExists when it is taken."""
        try:
            self._command("lvrename", self.group, before, name)
        except errors.StorageError as e:
            self._demand_free(name, e)
            raise
        self.refresh()

    def create_snapshot(self, origin: str, name: str) -> None:
        """Make a writable snapshot of a volume, with room for all that can change.

        Raises VolumeExists; on failure there is no volume of the name.
        """
        try:
            # LVM cuts what is more than a snapshot of this origin can ever use.
            self._command(
                *("lvcreate", "--yes", "--snapshot", "--extents", "200%ORIGIN"),
                *("--setactivationskip", "n", "--name", name, self._at(origin)),
            )
        except errors.StorageError as e:
            self._demand_free(name, e)
            raise
        self.refresh()

    def snapshots(self, name: str) -> set[str]:
        """Return the snapshots of a volume, as far as this process may ask."""
        if not self.is_managed():
            return set()
        words = ["--noheadings", "-o", "lv_name", "--select", f"origin={name}"]
        return set(self._command("lvs", *words, self.group).split())

    def is_overflowed(self, name: str) -> bool:
        """Tell whether a snapshot ran out of room, as far as this process may ask.

        What it held is lost then, and libvirt does not know of it.
        """
        if not self.is_managed():
            return False
        words = ["--noheadings", "-o", "lv_snapshot_invalid"]
        select = ["--select", f"lv_name={name}"]
        return bool(self._command("lvs", *words, *select, self.group).strip())

    def remove_overflowed(self, name: str) -> None:
        self._command("lvremove", "--yes", self._at(name))

    def resize(self, name: str, size: int) -> None:
        """Cut a volume, or add zeros to it; can be called again after a kill.

        Raises StorageError for a snapshot, which is as long as its origin. A tag says
        from where on a volume shows old bytes, from before it grows until they are
        zeroed.
        """
        with self._commands:
            self._finish_growing(name)
            shown, *origin = self._shown(name, "lv_size,origin").split()
            if origin:
                raise self._failed(f"{name} is a snapshot: its size cannot be changed")
            before = int(shown)
            if size < before:
                self._command("lvreduce", "--force", *self._to(size), self._at(name))
            elif size > before:
                tag = f"{_GROWING}{before}"
                self._command("lvchange", "--addtag", tag, self._at(name))
                self._command("lvextend", *self._to(size), self._at(name))
                self._finish_growing(name)
            self.refresh()

    # Private

    def _send_zeros(self, name: str, size: int) -> None:
        target = writing.VolumeTarget(self, name, size)
        with target.writer(size, lambda: None) as writer:
            for start in range(0, size, MiB):
                writer.write(start, bytes(min(MiB, size - start)))
                if (start + MiB) % _STRETCH == 0:
                    writer.finish()

    def _demand_free(self, name: str, error: errors.Error) -> None:
        """Raise VolumeExists from a command's failure, if the name is taken."""
        self.refresh()
        if name in self.names():
            raise errors.VolumeExists(
                host=self.host.name, pool=self.name, volume=name
            ) from error

    def _finish_growing(self, name: str) -> None:
        """Zero the tail that a volume grew by, if that is not done."""
        for tag in self._shown(name, "lv_tags").split(","):
            if not tag.startswith(_GROWING):
                continue
            with self.device(name, os.O_RDWR) as fd:
                if fd is None:
                    raise self._failed(f"{name} cannot be opened, its tail not zeroed")
                overwrite(fd, int(tag.removeprefix(_GROWING)))
            self._command("lvchange", "--deltag", tag, self._at(name))

    def _shown(self, name: str, field: str) -> str:
        """Return what LVM says of a volume."""
        words = ["--noheadings", "--nosuffix", "--units", "b", "-o", field]
        return self._command("lvs", *words, self._at(name)).strip()

    def _at(self, name: str) -> str:
        return f"{self.group}/{name}"

    @staticmethod
    def _to(size: int) -> tuple[str, ...]:
        return "--yes", "--size", f"{size}b"

    def _command(self, *argv: str) -> str:
        """Run a command of LVM on this host and return what it prints."""
        try:
            return lvmtools.run(*argv)
        except lvmtools.Failed as e:
            raise self._failed(str(e)) from e

    def _demand_same(self, path: Path, fd: int, expected: str) -> None:
        """Raise StorageError unless what was opened is the volume's own device."""
        found, mapped = os.fstat(fd), ""
        if stat.S_ISBLK(found.st_mode):
            number = f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
            with contextlib.suppress(OSError):
                told = Path(f"/sys/dev/block/{number}/dm/name")
                mapped = told.read_text().strip()
        if mapped != expected:
            raise self._failed(f"{path} leads to {mapped or 'no logical volume'}")

    def _failed(self, reason: str) -> errors.StorageError:
        return errors.StorageError(host=self.host.name, pool=self.name, reason=reason)


class RecordPool(GroupPool):
    """Records and manifests in the same group: in volumes that are longer than they.

    No guest ever sees these volumes, so they are not zeroed.
    """

    def create_raw(self, name: str, size: int) -> None:
        self._create(name, size or 1, "raw")

    def read(self, name: str, *, limit: int) -> bytes:
        """Return a record's bytes, or the first `limit` bytes of what is none.

        ValueError when a record says that it is longer than the limit.
        """
        with self.opened(name, f"reading {name}") as (session, vol):
            if not record.is_volume_name(name):
                return wire.download(session, vol, limit)
            head = wire.download(session, vol, min(_HEAD, limit))
            length = record.length_of(head)
            if length > limit:
                raise ValueError(f"{name} has {length} bytes, more than {limit}")
            return wire.download(session, vol, length) if length > _HEAD else head


def overwrite(fd: int, start: int) -> None:
    """Zero a device from start to its end, and have that on its storage."""
    _each_range(fd, _BLKZEROOUT, start, os.lseek(fd, 0, os.SEEK_END))
    os.fsync(fd)


def state_name(name: str, operation: str) -> str:
    """Return how the state is called that an operation keeps of a volume."""
    return f"{name}{_STATE}{operation}"


def is_state(name: str) -> bool:
    """Tell whether a volume of this name is a kept state."""
    return _STATE in name and not record.is_volume_name(name)


def mapped_name(group: str, name: str) -> str:
    """Return how the device mapper calls a logical volume."""
    return "-".join(each.replace("-", "--") for each in (group, name))


# Private


def _each_range(fd: int, request: int, start: int, end: int) -> None:
    """Do something to a range of a device, in pieces that a signal comes between."""
    while start < end:
        length = min(GiB, end - start)
        fcntl.ioctl(fd, request, struct.pack("QQ", start, length))
        start += length
