# SPDX-License-Identifier: Apache-2.0
"""One new volume of this host: its room, its bytes, their proof, its record."""

import msgspec

from virtmigrate import errors, manifest, model, node, reading
from virtmigrate.backends import base
from virtmigrate.model import Role, VolumeState
from virtmigrate.progress import Progress
from virtmigrate.rollback import Rollback
from virtmigrate.units import KiB, round_up

_ALIGNMENT = 4 * KiB


def aligned(backend: base.Backend, size: int) -> int:
    """Return the size of a raw volume that holds so many bytes.

    QEMU refuses a disk whose end is not aligned as direct I/O needs it.
    """
    return round_up(size, max(_ALIGNMENT, backend.granularity()))


class Filler:
    """Makes volumes in one backend. Safe to share between threads."""

    def __init__(self, here: node.Node, backend: base.Backend) -> None:
        self._here = here
        self._backend = backend

    def reserve(self, volume: model.Volume, undo: Rollback) -> None:
        """Have room for a volume, and it removed if what is begun fails.

        What instances left that moved away goes before a new one is refused.
        """
        backend, size = self._backend, volume.size
        undo.add(f"remove {volume.name}", lambda: backend.remove(volume.name))
        if backend.room() < size:
            backend.reclaim(lambda _: backend.room() >= size)

    def empty(self, volume: model.Volume, undo: Rollback) -> model.Volume:
        """Make a raw volume of zeros; return it as its record says it is."""
        self.reserve(volume, undo)
        return self.settle(self._backend.allocate(volume))

    def filled(
        self,
        volume: model.Volume,
        source: reading.Source,
        undo: Rollback,
        progress: Progress | None = None,
    ) -> model.Volume:
        """Make a raw volume that holds what a source gives, read back and proven.

        An image's manifest is kept: its bytes never change. Raises
        VerificationFailed, Cancelled.
        """
        return self.proven(volume, self.copied(volume, source, undo, progress))

    def copied(
        self,
        volume: model.Volume,
        source: reading.Source,
        undo: Rollback,
        progress: Progress | None = None,
    ) -> manifest.Manifest:
        """Make a raw volume that holds what a source gives, and read it back.

        It is not usable until proven() takes it in. Raises as filled().
        """
        self.reserve(volume, undo)
        self._backend.allocate(volume)
        return self._copy(volume, source, progress)

    def proven(self, volume: model.Volume, found: manifest.Manifest) -> model.Volume:
        """Take in a volume whose bytes are known by now."""
        if volume.role is Role.IMAGE:
            self._backend.keep_manifest(volume.name, found)
            volume = msgspec.structs.replace(volume, digest=found.digest())
        return self.settle(volume)

    def settle(self, volume: model.Volume) -> model.Volume:
        """Take an incoming volume in, durably, and publish that it is usable.

        Raises VolumeNotFound, RecordConflict when somebody gave it up meanwhile.
        """
        pool, path = self._backend.accept(volume.name)
        durable = self._backend.persist(pool, volume.name)
        usable = msgspec.structs.replace(
            volume, pool=pool, path=path, state=VolumeState.USABLE, durable=durable
        )
        store = self._backend.volumes
        stored = store.find(volume.name)
        if stored is None or stored.body.state is not VolumeState.INCOMPLETE:
            raise errors.VolumeNotFound(
                host=self._here.name, pool=pool, volume=volume.name
            )
        store.publish(volume.name, usable, after=stored.generation)
        store.prune(volume.name)
        return usable

    # Private

    def _copy(
        self, volume: model.Volume, source: reading.Source, progress: Progress | None
    ) -> manifest.Manifest:
        target = self._backend.target(volume.name, volume.size)
        with self._here.mover(progress) as mover:
            sent = mover.copy(source, target)
            with self._backend.arrived(volume.name) as arrived:
                arrived.flush()
                found = mover.survey(arrived.source)
        if sent.root() != found.root():
            raise errors.VerificationFailed(
                volume=volume.name,
                host=self._here.name,
                found=found.root(),
                expected=sent.root(),
            )
        return found
