# SPDX-License-Identifier: Apache-2.0
"""Images of a RADOS pool as volumes, and records beside them.

What this host does with its own pool goes by librbd and librados: libvirt has no
streams for images, and opens all of them when it lists some. Peers make, see and
remove images through libvirt's pool of the same name.
"""

import contextlib
import struct
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from virtmigrate import errors, rollback, storagepool
from virtmigrate.backends.cluster import CLONES, SNAPSHOT, Cluster
from virtmigrate.host import Host, Session
from virtmigrate.storagepool import Room

if TYPE_CHECKING:
    import libvirt
    import rbd

NAMESPACE = "virtmigrate"
"""Where in the pool our records are."""

INDEX = "records"
"""The object whose omap they are."""

_STAMP = struct.Struct(">d")
"""When a record was made: before its bytes."""


@dataclass(frozen=True)
class Stored:
    """An image that somebody else keeps in a cluster, by its snapshot."""

    fsid: str
    pool: str
    image: str
    snapshot: str

    @classmethod
    def parsed(cls, location: str) -> "Stored | None":
        """Return what rbd://FSID/POOL/IMAGE/SNAPSHOT names; None for all else."""
        scheme, _, rest = location.partition("://")
        parts = [urllib.parse.unquote(each) for each in rest.split("/")]
        return cls(*parts) if scheme == "rbd" and len(parts) == 4 else None


class _ClusterPool(storagepool.Pool):
    """What images and objects have in common."""

    is_directory = False

    def __init__(
        self, host: Host, name: str, cluster: Cluster, busy_timeout: float
    ) -> None:
        super().__init__(host, name, busy_timeout=busy_timeout)
        self.cluster = cluster

    @property
    def path(self) -> str:
        """Name of the RADOS pool."""
        return self.cluster.pool

    def refresh(self) -> None:
        """Nothing: what is there is seen at once."""

    def is_local(self) -> bool:
        """No: there are no files."""
        return False

    def room(self) -> Room:
        return Room(*self.cluster.room())

    @contextlib.contextmanager
    def opened(
        self, name: str, doing: str
    ) -> Iterator[tuple[Session, "libvirt.virStorageVol"]]:
        """Raise StorageError: libvirt has no streams for these."""
        yield self._no_streams(name)

    # Private

    def _no_streams(self, name: str) -> NoReturn:
        raise errors.StorageError(
            host=self.host.name,
            pool=self.name,
            reason=f"{name}: libvirt cannot read or write it",
        )


class ImagePool(_ClusterPool):
    """The images of a pool. Safe to share between threads."""

    def names(self) -> list[str]:
        with self.cluster.working("listing images") as (manager, context):
            return list(manager.list(context))

    def create_raw(self, name: str, size: int) -> None:
        with self.cluster.working(f"creating {name}", name) as (manager, context):
            manager.create(context, name, size, old_format=False)

    def delete(self, name: str) -> None:
        """Delete an image, and our snapshots of it; nothing happens without it.

        Raises VolumeInUse while images share its blocks; nothing is touched then.
        """
        with contextlib.suppress(errors.VolumeNotFound):
            doing = f"deleting {name}"
            with self.cluster.image(name, doing, read_only=False) as image:
                self._demand_childless(name, image)
                for snapshot in _snapshots(image):
                    if image.is_protected_snap(snapshot):
                        image.unprotect_snap(snapshot)
                    image.remove_snap(snapshot)
            with self.cluster.working(doing, name) as (manager, context):
                manager.remove(context, name)

    def create_clone(self, base: str, name: str, size: int) -> None:
        """Create an image of size bytes that shares its blocks with another one.

        The base must not change any more: there is one snapshot of it, which all
        clones are made of. It goes with the base. Raises VolumeExists, VolumeNotFound;
        on failure there is no image of the name.
        """
        self._have_snapshot(base)
        doing = f"cloning {base}"
        with self.cluster.working(doing, name) as (manager, context):
            manager.clone(context, base, CLONES, context, name)
        with rollback.Rollback() as undo:
            undo.add(f"delete {name}", lambda: self.delete(name))
            with self.cluster.image(name, doing, read_only=False) as image:
                image.resize(size)
            undo.commit()

    def create_shared(self, where: "Stored", name: str, size: int) -> None:
        """Create an image of size bytes that shares the blocks of another pool's.

        Nothing is written there but what Ceph notes of a clone, if it notes it there.
        Raises VolumeNotFound, StorageError: then there is no image of the name.
        """
        doing = f"cloning {where.pool}/{where.image}@{where.snapshot}"
        with (
            self.cluster.working(doing, name) as (manager, context),
            self.cluster.other(where.pool) as other,
        ):
            manager.clone(other, where.image, where.snapshot, context, name)
        with rollback.Rollback() as undo:
            undo.add(f"delete {name}", lambda: self.delete(name))
            with self.cluster.image(name, doing, read_only=False) as image:
                image.resize(size)
            undo.commit()

    def children(self, name: str) -> set[str]:
        """Return the images that share an image's blocks; none without it."""
        with (
            contextlib.suppress(errors.VolumeNotFound),
            self.cluster.image(name, f"looking for clones of {name}") as image,
        ):
            return _children(image)
        return set()

    def snapshots(self, name: str) -> list[str]:
        """Return our snapshots of an image."""
        with self.cluster.image(name, f"looking at {name}") as image:
            return _snapshots(image)

    def flatten(self, name: str) -> None:
        """Copy all that an image shares with others; nothing happens twice."""
        with self.cluster.image(name, f"flattening {name}", read_only=False) as image:
            if image.overlap():
                image.flatten()

    def physical(self, name: str) -> int:
        with self.cluster.image(name, f"measuring {name}") as image:
            return int(image.size())

    def allocated(self, name: str) -> int:
        """Return the bytes that an image takes itself, beside those that it shares."""
        with self.cluster.image(name, f"measuring {name}") as image:
            own = extents(image, with_parents=False)
            return sum(end - start for start, end in own)

    def written(self, name: str) -> float:
        with (
            contextlib.suppress(errors.VolumeNotFound),
            self.cluster.image(name, f"looking at {name}") as image,
        ):
            return float(image.modify_timestamp().timestamp())
        return 0.0

    def read(self, name: str, *, limit: int) -> bytes:
        with self.cluster.image(name, f"reading {name}") as image:
            size = int(image.size())
            if size > limit:
                raise ValueError(f"{name} has {size} bytes, more than {limit}")
            return bytes(image.read(0, size))

    def write(self, name: str, data: bytes, *, offset: int = 0) -> None:
        with self.cluster.image(name, f"writing {name}", read_only=False) as image:
            image.write(data, offset)
            image.flush()

    # Private

    def _have_snapshot(self, name: str) -> None:
        """Have the snapshot that clones are made of; others may do so, too."""
        doing = f"making a snapshot of {name}"
        with (
            contextlib.suppress(errors.VolumeExists),
            self.cluster.image(name, doing, read_only=False) as image,
        ):
            image.create_snap(CLONES)
        with (
            contextlib.suppress(errors.VolumeInUse),
            self.cluster.image(name, doing, read_only=False) as image,
        ):
            # Clones of the first version, which older clusters make, need it.
            if not image.is_protected_snap(CLONES):
                image.protect_snap(CLONES)

    def _demand_childless(self, name: str, image: "rbd.Image") -> None:
        users = ", ".join(sorted(_children(image)))
        if users:
            raise errors.VolumeInUse(
                host=self.host.name, pool=self.name, volume=name, users=users
            )


class RecordPool(_ClusterPool):
    """Records in the omap of one object, and manifests as objects beside it.

    Only records are listed. An object's keys come with an error when the cluster does
    not answer; of a list of objects the binding makes a shorter one.
    """

    def names(self) -> list[str]:
        with self.cluster.translated("listing records"):
            return self.cluster.keys(NAMESPACE, INDEX)

    def has(self, name: str) -> bool:
        if not _is_record(name):
            return super().has(name)
        with contextlib.suppress(errors.VolumeNotFound):
            self._value(name)
            return True
        return False

    def create_raw(self, name: str, size: int) -> None:
        with self.cluster.translated(f"creating {name}", name):
            if _is_record(name):
                value = _STAMP.pack(time.time()) + bytes(size)
                self.cluster.set_key(NAMESPACE, INDEX, name, value, is_new=True)
            else:
                self.cluster.create_object(NAMESPACE, name, size)

    def delete(self, name: str) -> None:
        with (
            contextlib.suppress(errors.VolumeNotFound),
            self.cluster.translated(f"deleting {name}", name),
        ):
            if _is_record(name):
                self.cluster.remove_key(NAMESPACE, INDEX, name)
            else:
                self.cluster.context(NAMESPACE).remove_object(name)

    def physical(self, name: str) -> int:
        return len(self._content(name))

    def allocated(self, name: str) -> int:
        return self.physical(name)

    def written(self, name: str) -> float:
        with contextlib.suppress(errors.VolumeNotFound):
            return float(_STAMP.unpack_from(self._value(name))[0])
        return 0.0

    def read(self, name: str, *, limit: int) -> bytes:
        data = self._content(name)
        if len(data) > limit:
            raise ValueError(f"{name} has {len(data)} bytes, more than {limit}")
        return data

    def write(self, name: str, data: bytes, *, offset: int = 0) -> None:
        if _is_record(name):
            value = bytearray(self._value(name))
            start = _STAMP.size + offset
            value[start : start + len(data)] = data
            with self.cluster.translated(f"writing {name}", name):
                # What was removed meanwhile does not come back.
                self.cluster.set_key(NAMESPACE, INDEX, name, bytes(value), is_new=False)
            return
        with self.cluster.translated(f"writing {name}", name):
            context = self.cluster.context(NAMESPACE)
            context.stat(name)
            context.write(name, data, offset)

    # Private

    def _content(self, name: str) -> bytes:
        if _is_record(name):
            return self._value(name)[_STAMP.size :]
        with self.cluster.translated(f"reading {name}", name):
            context = self.cluster.context(NAMESPACE)
            size = int(context.stat(name)[0])
            return bytes(context.read(name, length=size)) if size else b""

    def _value(self, name: str) -> bytes:
        with self.cluster.translated(f"reading {name}", name):
            return self.cluster.value(NAMESPACE, INDEX, name)


def extents(image: "rbd.Image", *, with_parents: bool = True) -> list[tuple[int, int]]:
    """Return where an image has data, from its parents too: (start, end), in order."""
    found: list[tuple[int, int]] = []

    def note(offset: int, length: int, exists: bool) -> None:
        if not exists:
            return
        if found and found[-1][1] == offset:
            found[-1] = found[-1][0], offset + length
        else:
            found.append((offset, offset + length))

    image.diff_iterate(
        0, image.size(), None, note, include_parent=with_parents, whole_object=True
    )
    return found


def _children(image: "rbd.Image") -> set[str]:
    return {str(each["image"]) for each in image.list_children2()}


def _snapshots(image: "rbd.Image") -> list[str]:
    names = [str(each["name"]) for each in image.list_snaps()]
    return [name for name in names if name.startswith(SNAPSHOT)]


def _is_record(name: str) -> bool:
    return ".rec." in name
