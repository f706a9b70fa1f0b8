# SPDX-License-Identifier: Apache-2.0
"""How a backend's volumes come to be: empty, as copies, as clones, as layers.

The record is published before its volume is made, and says what that stands on.
"""

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import msgspec

from virtmigrate import errors, model, qcow2, rollback, stream, wire
from virtmigrate.backends import catalog, keeping, layout
from virtmigrate.backends.access import Access
from virtmigrate.backends.terms import Capabilities, Clones, Settings
from virtmigrate.formats import DiskFormat
from virtmigrate.host import Host

_ANSWER_LOST = (errors.HostTimeout, errors.HostUnreachable, errors.StorageDown)
"""Errors after which what was asked for may be done, now or a little later."""


class Making(Access):
    """Makes volumes, with their records. Safe to share between threads."""

    kind: str
    capabilities: Capabilities
    cloning: Mapping[str, Clones] = {"auto": Clones.COPY, "copy": Clones.COPY}
    """What its option `clones` may say, and how disks are made of images then."""

    def __init__(self, host: Host, settings: Settings) -> None:
        super().__init__(host, settings)
        self.capabilities = dataclasses.replace(
            self.capabilities, clones=self._clones()
        )
        self._records = self.pool(f"virtmigrate-{self.name}-records")
        self.volumes = layout.Volumes(
            self._records, model.Volume, grace=settings.record_grace
        )
        self.catalog = catalog.Catalog(self.volumes)

    @abc.abstractmethod
    def path(self, volume: model.Volume) -> str:
        """Return where this host's QEMU finds the volume."""

    def allocate(self, volume: model.Volume) -> model.Volume:
        """Publish the record as incomplete, then create the volume, raw and sparse.

        On failure nothing of it stays.
        """
        self._make(volume, lambda: self._create(volume))
        return volume

    def copy(
        self, source: model.Volume, volume: model.Volume, mover: stream.Mover
    ) -> model.Volume:
        """Create an incoming raw volume that holds what another one holds.

        From then on the two change independently; where the new one is longer, zeros
        follow. Nobody may be writing to the source. Raises Unsupported for what is
        not raw; on failure nothing of it stays.

        Arguments:
            source: any raw volume of this backend.
            volume: what is to be made, in incoming.
            mover: copies where the storage itself cannot.
        """
        raw = source.format is volume.format is DiskFormat.RAW
        self._demand(raw and not source.backing, f"copy {source.name}")
        self._demand(source.size <= volume.size, f"shrink a copy of {source.name}")
        self._make(volume, lambda: self._create_copy(source, volume, mover))
        return volume

    def clone(
        self,
        image: model.Volume,
        volume: model.Volume,
        mover: stream.Mover,
        fence: Callable[[], None] = lambda: None,
    ) -> model.Volume:
        """Create an incoming volume of volume.size bytes that holds what an image does.

        As cheaply as the kind can: see `capabilities.clones`. Where it is longer, zeros
        follow. Its record says what it stands on, and is published before the fence is
        asked: of one who clones and one who removes the image, at least one sees the
        other. What a killed call of the same operation left is removed first. Raises
        Unsupported; on failure nothing of it stays.

        Arguments:
            image: a usable one of this backend.
            volume: what is to be made; the kind fills in what it stands on, and its
                format.
            mover: copies where the storage itself cannot.
            fence: raises when the image is being removed.

        Returns the record as it was published: incomplete.
        """
        usable = image.state is model.VolumeState.USABLE
        self._demand(usable and is_image(image), f"clone {image.name}")
        self._demand(image.size <= volume.size, f"shrink a clone of {image.name}")
        made = self._clone_record(image, volume)
        left = self.volumes.find(made.name)
        if left is not None and _is_unfinished(left.body, made):
            self._delete(made.name)

        def make() -> None:
            fence()
            self._create_clone(image, made, mover)

        self._make(made, make)
        return made

    def share(self, locations: Sequence[str], volume: model.Volume) -> bool:
        """Create an incoming volume from what a service keeps in this very storage.

        Nothing is copied: the two share their blocks. The bytes are not proven by
        that. On failure nothing of it stays.

        Arguments:
            locations: where a service says that it keeps the bytes of a raw image.
            volume: what is to be made; where it is longer, zeros follow.

        Returns False where none of these is in this storage, and can be used.
        """
        return False

    def flatten(self, name: str) -> model.Volume:
        """Make a volume independent of those that it was cloned from.

        It holds the same afterwards. Can be called again, also after a kill: the record
        is changed last. Raises Unsupported; the volume is as it was then.
        """
        found = self.volumes.read(name).body
        self._demand(found.backing is found.parent is None, f"flatten {name}")
        return found

    def users(self, name: str) -> set[str]:
        """Return the volumes that stand on one, or share its blocks.

        Raises RecordError when a record cannot be read: it might name it.
        """
        found = (stored.body for stored in self.catalog.all(strict=True))
        return {each.name for each in found if name in (each.backing, each.parent)}

    def overlay(self, volume: model.Volume, base: model.Volume) -> model.Volume:
        """Create a qcow2 layer over base, which must not change any more.

        Raises Unsupported. On failure nothing of it stays.
        """
        self._demand(self.capabilities.overlays, "put a layer over a volume")
        self._make(volume, lambda: self._create_overlay(volume, base))
        return volume

    def scratch(self, volume: model.Volume, room: int) -> model.Volume:
        """Create a qcow2 volume of volume.size bytes in a file of `room`, exclusively.

        It holds nothing, and what it stands on only the XML says: that may lie in any
        backend. The file takes room as it is written to. Raises Unsupported; on failure
        nothing of it stays.
        """
        self._demand(self.capabilities.overlays, "make a layer for what is thrown away")
        self._make(volume, lambda: self._create_scratch(volume, room))
        return volume

    # Private

    def _clones(self) -> Clones:
        wanted = str(self.settings.options.get("clones", "auto"))
        if wanted not in self.cloning:
            raise errors.ConfigurationError(
                reason=f"backend {self.name}: clones = {wanted} is not for kind "
                f"{self.kind}; use {' or '.join(self.cloning)}"
            )
        return self.cloning[wanted]

    def _make(self, volume: model.Volume, make: Callable[[], None]) -> None:
        """Publish a record, then make its volume; on failure there is neither.

        Where the storage does not answer any more the record stays, incomplete, for
        who clears up later: the volume may be there.

        Arguments:
            make: makes the volume, and leaves none when it fails, unless the answer
                was lost.
        """
        self.volumes.publish(volume.name, volume)
        with rollback.Rollback() as undo:
            what = f"remove the record of {volume.name}"
            undo.add(what, lambda: self.volumes.remove(volume.name))
            try:
                make()
            except _ANSWER_LOST:
                # The name is ours by its record; that goes after the volume.
                undo.commit()
                undo.add(f"remove {volume.name}", lambda: self._delete(volume.name))
                raise
            undo.commit()

    def _create(self, volume: model.Volume) -> None:
        self.pool(volume.pool).create_raw(volume.name, volume.size)

    def _create_overlay(self, volume: model.Volume, base: model.Volume) -> None:
        self.pool(volume.pool).create_overlay(
            volume.name, volume.size, self.path(base), base.format.value
        )

    def _create_scratch(self, volume: model.Volume, room: int) -> None:
        pool, head = self.pool(volume.pool), qcow2.blank(volume.size)
        pool.preallocate = False
        pool.create_raw(volume.name, room)
        with rollback.Rollback() as undo:
            undo.add(f"delete {volume.name}", lambda: pool.delete(volume.name))
            pool.write(volume.name, head)
            with pool.opened(volume.name, f"reading {volume.name}") as (session, vol):
                # libvirt may have forgotten the error of a write.
                if wire.download(session, vol, len(head)) != head:
                    raise errors.ShortTransfer(
                        volume=volume.name,
                        host=self.host.name,
                        reason="its header is not what was written",
                    )
            undo.commit()

    def _create_copy(
        self, source: model.Volume, volume: model.Volume, mover: stream.Mover
    ) -> None:
        self._create(volume)
        with rollback.Rollback() as undo:
            pool = self.pool(volume.pool)
            undo.add(f"delete {volume.name}", lambda: pool.delete(volume.name))
            if not self._share_blocks(source, volume):
                read = self.source(source, source.size)
                mover.copy(read, self.target(volume.name, volume.size))
            undo.commit()

    def _share_blocks(self, source: model.Volume, volume: model.Volume) -> bool:
        """Let the storage copy into a new volume; False where it cannot."""
        return False

    def _clone_record(self, image: model.Volume, volume: model.Volume) -> model.Volume:
        """Return the record of a clone: its format, and what it stands on."""
        raw = image.format is DiskFormat.RAW and not image.backing
        self._demand(raw, f"copy {image.name}")
        return msgspec.structs.replace(
            volume, format=DiskFormat.RAW, backing=None, parent=None
        )

    def _create_clone(
        self, image: model.Volume, volume: model.Volume, mover: stream.Mover
    ) -> None:
        """Create what the record of a clone says; on failure there is no volume."""
        self._create_copy(image, volume, mover)

    def _delete(self, name: str) -> None:
        """Delete a volume, its manifest, then its record; can be called again."""
        with contextlib.suppress(errors.RecordBroken):
            # A record that was never whole is older than any volume of its name.
            stored = self.volumes.find(name)
            for pool in self._pools_of(stored.body) if stored is not None else ():
                self.pool(pool).delete(name)
        self._records.delete(keeping.manifest_name(name))
        self.volumes.remove(name)

    def _pools_of(self, volume: model.Volume) -> set[str]:
        """Return where a volume may lie: it moves before its record says so."""
        if volume.pool == self.incoming.name:
            return {self.incoming.name, self.disks.name}
        return {volume.pool}

    def _demand(self, capability: bool, operation: str) -> None:
        if not capability:
            raise self._unsupported(operation)

    def _unsupported(self, operation: str) -> errors.Unsupported:
        return errors.Unsupported(
            backend=self.name, operation=operation, reason=f"kind {self.kind}"
        )


def is_image(volume: model.Volume) -> bool:
    """Tell whether a volume is one that disks are made of."""
    return volume.role is model.Role.IMAGE


# Private


def _is_unfinished(left: model.Volume, volume: model.Volume) -> bool:
    """Tell whether a record is what a killed call left that made the same."""
    same = (left.owner, left.operation) == (volume.owner, volume.operation)
    return same and left.state is model.VolumeState.INCOMPLETE
