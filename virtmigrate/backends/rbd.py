# SPDX-License-Identifier: Apache-2.0
"""Volumes as images in a RADOS pool of a Ceph cluster.

Images are raw: layers, where they are wanted, are the cluster's own clones. What
other hosts of the cluster see they see at once, records too: those are keys of one
object in a namespace of the pool.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
from oslo_log import log as logging

from virtmigrate import domainxml, errors, model, reading, storagepool, stream, xml
from virtmigrate.backends import base, cluster, images, leases, objects, terms
from virtmigrate.formats import DiskFormat
from virtmigrate.host import Host

LOG = logging.getLogger(__name__)


class RbdBackend(base.Backend):
    """A pool of a cluster that this host reaches."""

    kind = "rbd"
    capabilities = terms.Capabilities(
        formats=(DiskFormat.RAW,),
        overlays=False,
        snapshots=True,
        shared=True,
        streams=False,
        thick=False,
        files=False,
        locks=terms.Reach.STORAGE,
        fences=True,
    )
    cloning: Mapping[str, terms.Clones] = {
        "auto": terms.Clones.SHARED,
        "copy": terms.Clones.COPY,
    }

    def __init__(self, host: Host, settings: terms.Settings) -> None:
        options = settings.options
        self.cluster = cluster.Cluster(
            host.name,
            options["rbd_ceph_conf"],
            options["rbd_user"],
            options["rbd_pool"],
            options["rbd_timeout"],
        )
        self._secret: str | None = options["rbd_secret_uuid"]
        self._user: str = options["rbd_user"]
        super().__init__(host, settings)
        self._images = objects.ImagePool(
            host, self.disks.name, self.cluster, settings.busy_timeout
        )
        # Uploads do not reach images, so that what arrives may lie among the disks.
        self.disks = self.incoming = self._images

    def pool(self, name: str) -> storagepool.Pool:
        kind = objects.RecordPool if name.endswith("-records") else objects.ImagePool
        return kind(self.host, name, self.cluster, self.settings.busy_timeout)

    @property
    def records(self) -> str:
        return self.disks.name

    def ensure(self) -> None:
        self._demand_secret()
        self.disks.ensure_defined(self._definition())
        super().ensure()

    def close(self) -> None:
        self.cluster.close()

    def storage(self) -> str:
        return f"rbd {self.cluster.fsid()}"

    def layer(self, volume: model.Volume) -> domainxml.Layer:
        auth = None
        if self._secret:
            auth = domainxml.Auth(user=self._user, secret=self._secret)
        return domainxml.Layer(
            type=domainxml.SourceType.NETWORK,
            source=self.path(volume),
            fmt=volume.format,
            hosts=self.cluster.monitors(),
            auth=auth,
        )

    def path(self, volume: model.Volume) -> str:
        return f"{self.cluster.pool}/{volume.name}"

    def accept(self, name: str) -> tuple[str, str]:
        return self.disks.name, f"{self.cluster.pool}/{name}"

    def persist(self, pool: str, name: str) -> bool:
        # What librbd acknowledged is on the OSDs' storage; this flushes what it holds.
        with self.cluster.image(name, f"flushing {name}", read_only=False) as image:
            image.flush()
        return True

    def local_file(self, pool: storagepool.Pool, name: str) -> Path | None:
        return None

    # Data

    @contextlib.contextmanager
    def arrived(
        self, name: str, ahead: int = reading.WINDOW
    ) -> Iterator[terms.Arrived]:
        size = self.disks.physical(name)
        source = images.ImageSource(self.cluster, name, size)
        yield terms.Arrived(size, source, lambda: self.persist(self.disks.name, name))

    def target(self, name: str, size: int) -> images.ImageTarget:
        return images.ImageTarget(self.cluster, name, size)

    def source(self, volume: model.Volume, size: int) -> images.ImageSource:
        return images.ImageSource(self.cluster, volume.name, size)

    def live(self, volume: model.Volume, size: int) -> images.ImageSource | None:
        return images.ImageSource(self.cluster, volume.name, size, is_live=True)

    def grow(self, name: str, size: int) -> None:
        with self.cluster.image(name, f"growing {name}", read_only=False) as image:
            if image.size() < size:
                image.resize(size)

    # Clones

    def users(self, name: str) -> set[str]:
        return super().users(name) | self._images.children(name)

    def flatten(self, name: str) -> model.Volume:
        found = self.volumes.read(name).body
        if found.parent is None:
            return super().flatten(name)
        if self._images.snapshots(name):
            raise errors.Unsupported(
                backend=self.name,
                operation=f"flatten {name}",
                reason="a move keeps its state, which stands on the same image",
            )
        self._images.flatten(name)
        return self.update(msgspec.structs.replace(found, parent=None))

    # Other hosts

    def clients(self, name: str) -> set[str]:
        with self.cluster.image(name, f"asking who has {name} open") as image:
            return self.cluster.clients(image)

    def fence(self, clients: set[str]) -> None:
        for client in sorted(clients):
            self.cluster.fence(client)

    def share(self, locations: Sequence[str], volume: model.Volume) -> bool:
        found = [objects.Stored.parsed(each) for each in locations]
        for where in [each for each in found if each is not None]:
            if where.fsid != self.cluster.fsid():
                continue
            try:
                self._share(where, volume)
            except errors.StorageDown:
                raise
            except errors.StorageError as e:
                # It may be gone, or this user may not read that pool.
                LOG.warning("backend=%s %s is not shared: %s", self.name, where, e)
                continue
            return True
        return False

    # States

    def keep_state(self, name: str, operation: str) -> None:
        with (
            contextlib.suppress(errors.VolumeExists),
            self.cluster.image(name, f"keeping {name}", read_only=False) as image,
        ):
            image.create_snap(cluster.SNAPSHOT + operation)

    def restore_state(self, name: str, operation: str, *, keep: bool = False) -> None:
        snapshot = cluster.SNAPSHOT + operation
        with self.cluster.image(name, f"restoring {name}", read_only=False) as image:
            if snapshot in {each["name"] for each in image.list_snaps()}:
                image.rollback_to_snap(snapshot)
                if not keep:
                    image.remove_snap(snapshot)

    def drop_state(self, name: str, operation: str) -> None:
        snapshot = cluster.SNAPSHOT + operation
        with (
            contextlib.suppress(errors.VolumeNotFound),
            self.cluster.image(name, f"keeping {name}", read_only=False) as image,
        ):
            if snapshot in {each["name"] for each in image.list_snaps()}:
                image.remove_snap(snapshot)

    def state(self, name: str, operation: str, size: int) -> reading.Source:
        kept = cluster.SNAPSHOT + operation
        return images.ImageSource(self.cluster, name, size, snapshot=kept)

    # What earlier moves left

    def set_aside(
        self, retired: model.Volume, aside: str, name: str, size: int
    ) -> terms.Reuse:
        # What arrives has no record that says on what it stands.
        self._demand(retired.parent is None, f"rename {retired.name}, a clone")
        present = set(self.disks.names())
        found = terms.Reuse.MOVED
        if retired.name in present:
            self._rename(retired.name, aside)
        elif aside in present:
            found = terms.Reuse.UNPROVEN
        else:
            return terms.Reuse.SWITCHED if name in present else terms.Reuse.GONE
        with self.cluster.image(aside, f"resizing {aside}", read_only=False) as image:
            image.resize(size)
        return found

    def switch(self, aside: str, name: str) -> None:
        self._rename(aside, name)

    # Private

    def _share(self, where: objects.Stored, volume: model.Volume) -> None:
        name, size = volume.name, volume.size
        self._make(volume, lambda: self._images.create_shared(where, name, size))

    def _clone_record(self, image: model.Volume, volume: model.Volume) -> model.Volume:
        found = super()._clone_record(image, volume)
        if self.capabilities.clones is terms.Clones.COPY:
            return found
        return msgspec.structs.replace(found, parent=image.name)

    def _create_clone(
        self, image: model.Volume, volume: model.Volume, mover: stream.Mover
    ) -> None:
        if volume.parent:
            self._images.create_clone(image.name, volume.name, volume.size)
        else:
            super()._create_clone(image, volume, mover)

    def _lock_mechanism(self) -> leases.ObjectLocks:
        return leases.ObjectLocks(self.cluster, self.settings.lock_lease, self.name)

    def _rename(self, before: str, name: str) -> None:
        with self.cluster.working(f"renaming {before}", name) as (manager, context):
            manager.rename(context, before, name)

    def _definition(self) -> xml.Element:
        """Return libvirt's description of the pool, for what peers do with it."""
        root = xml.element("pool", attributes={"type": "rbd"})
        xml.add(root, "name", self.disks.name)
        source = xml.add(root, "source")
        xml.add(source, "name", self.cluster.pool)
        for each in self.cluster.monitors():
            name, _, port = each.rpartition(":")
            xml.add(source, "host", name=name.strip("[]"), port=port)
        if self._secret:
            auth = xml.add(source, "auth", type="ceph", username=self._user)
            xml.add(auth, "secret", uuid=self._secret)
        return root

    def _demand_secret(self) -> None:
        """See that this host's libvirt has the key that QEMU needs."""
        if not self._secret:
            return
        try:
            with self.host.session("looking for the key of Ceph") as session:
                session.conn.secretLookupByUUIDString(self._secret)
        except errors.LibvirtFailed as e:
            raise errors.ConfigurationError(
                reason=f"backend {self.name}: libvirt on {self.host.name} has no "
                f"secret {self._secret} (rbd_secret_uuid): make it, with the key of "
                f"client.{self._user}: {e}"
            ) from e
