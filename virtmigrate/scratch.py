# SPDX-License-Identifier: Apache-2.0
"""Layers over transient disks: made before a guest starts, gone when it is off.

The instance's record names the disk that stays, and its domain's own configuration
does, too. A start makes a fresh layer over each transient disk, and starts the domain
by an XML that names it, with the whole chain below. So nothing has to be put back when
the guest ends, in whatever way: a layer whose guest is off, with no memory saved, is
nobody's, and the next start or settle removes it.
"""

import dataclasses
import uuid as uuids
from collections.abc import Iterator, Mapping

import msgspec
from oslo_log import log as logging

from virtmigrate import domainxml, errors, instance, model, qcow2
from virtmigrate.backends import base
from virtmigrate.formats import DiskFormat
from virtmigrate.instance import Power
from virtmigrate.model import Role, VolumeState
from virtmigrate.rollback import Rollback
from virtmigrate.units import round_up

LOG = logging.getLogger(__name__)

Owned = tuple[base.Backend, model.Volume]


class Scratch:
    """The layers of one host. Safe to share between threads.

    Who calls it for an instance has claimed that.

    Arguments:
        backends: the host's, by name.
        files: the one whose layers lie over disks of backends without layers.
        limit: bytes that a layer takes at most; 0: as its disk.
    """

    def __init__(
        self,
        domains: instance.Domains,
        backends: Mapping[str, base.Backend],
        files: base.Backend,
        limit: int,
    ) -> None:
        self._domains = domains
        self._backends = backends
        self._files = files
        self._limit = limit

    def start(
        self, found: model.Instance, *, paused: bool = False, keep: bool = False
    ) -> None:
        """Start an instance with layers over its transient disks.

        Nothing happens when it runs. One whose memory is saved goes on with those that
        it has. On failure it is off, and the layers are removed, now or by the next
        settle.

        Arguments:
            keep: go on with the layers that there are, as a reboot does.
        """
        refs = transient(found)
        own = self._noted(found) if self._is_idle(found.uuid) else None
        if not refs or own is None:
            self._domains.start(found.uuid, paused=paused)
            return
        # libvirt would start it with the host, and make no layers.
        self._domains.forbid_autostart(found.uuid)
        with Rollback() as undo:
            undo.add("drop its layers", lambda: self.drop(found.uuid))
            layers = self._layers(found, keep=keep)
            chains = {
                ref.target: (self._layer(layers[ref.target]), *self._below(ref))
                for ref in refs
            }
            text = domainxml.with_disks(own, chains)
            self._domains.start_with(text, paused=paused)
            undo.commit()
        LOG.info(
            "instance=%s transient=%s started", found.uuid, ",".join(sorted(layers))
        )

    def start_bare(self, found: model.Instance) -> None:
        """Start an instance paused, by its disks themselves, to have them grown.

        The caller turns it off; nobody may let it go on.
        """
        self._domains.start_with(self._domains.xml(found.uuid), paused=True)

    def drop(self, uuid: str) -> bool:
        """Remove the layers that this host made for an instance; can be called again.

        Returns False, and removes none, while it runs here or its memory is saved.
        """
        if not self._is_idle(uuid):
            return False
        for backend, volume in self.owned(uuid):
            # Whoever took it over may be running on others.
            if volume.origin == self._domains.host.name:
                backend.remove(volume.name)
                LOG.info("instance=%s transient layer=%s removed", uuid, volume.name)
        return True

    def owned(self, uuid: str) -> list[Owned]:
        """Return the layers of an instance, each with where it lies."""
        return [each for each in self.all() if each[1].owner == uuid]

    def all(self) -> Iterator[Owned]:
        """Yield the layers of all instances; other hosts' too, where they share it."""
        for backend in self._backends.values():
            if backend.capabilities.overlays:
                for stored in backend.catalog.all():
                    if stored.body.transient is not None:
                        yield backend, stored.body

    def tops(self, found: model.Instance) -> dict[str, domainxml.Layer]:
        """Return by target what the guest of a started instance writes to."""
        owned = self.owned(found.uuid)
        layers = {ref.target: _of(ref, owned) for ref in transient(found)}
        return {target: self._layer(each) for target, each in layers.items() if each}

    def place(self, ref: model.DiskRef) -> base.Backend:
        """Return the backend in which the layer of a disk lies."""
        backend = self._backends[ref.backend]
        return backend if backend.capabilities.overlays else self._files

    # Private

    def _is_idle(self, uuid: str) -> bool:
        """Tell whether nothing runs, is being started or is saved of an instance."""
        try:
            info = self._domains.info(uuid)
        except errors.InstanceNotFound:
            return True
        # libvirt numbers one that it is about to start, and says that it is off.
        return info.power is Power.OFF and info.id < 0

    def _noted(self, found: model.Instance) -> str:
        """Return its own configuration, which says what is transient from here on.

        And nothing else: one that was killed may have changed the record only.
        """
        text = self._domains.xml(found.uuid)
        noted = domainxml.with_transient(text, (r.target for r in transient(found)))
        if noted != text:
            self._domains.define(noted)
        return noted

    def _layers(self, found: model.Instance, *, keep: bool) -> dict[str, Owned]:
        """Return by target the layers to start with; all others are removed."""
        owned = self.owned(found.uuid)
        kept = {ref.target: _of(ref, owned) for ref in transient(found)} if keep else {}
        for each in owned:
            if each not in kept.values():
                each[0].remove(each[1].name)
        operation = uuids.uuid4().hex[:16]
        return {
            ref.target: kept.get(ref.target) or self._make(found, ref, operation)
            for ref in transient(found)
        }

    def _make(self, found: model.Instance, ref: model.DiskRef, operation: str) -> Owned:
        backend = self.place(ref)
        below = self._backends[ref.backend].volumes.read(ref.volume).body
        room, name = self._room(below.size), f"{ref.target}-transient.{operation}"
        made = model.Volume(
            name=name,
            pool=backend.disks.name,
            path=backend.disks.volume_path(name),
            format=DiskFormat.QCOW2,
            role=Role.LAYER,
            size=below.size,
            state=VolumeState.INCOMPLETE,
            owner=found.uuid,
            operation=operation,
            origin=self._domains.host.name,
            transient=model.Transient(
                target=ref.target, backend=ref.backend, volume=ref.volume, room=room
            ),
        )
        backend.scratch(made, room)
        usable = msgspec.structs.replace(made, state=VolumeState.USABLE)
        return backend, backend.update(usable)

    def _room(self, size: int) -> int:
        most = qcow2.longest(size)
        least = len(qcow2.blank(size)) + 2 * qcow2.CLUSTER
        limit = max(least, round_up(self._limit, qcow2.CLUSTER))
        return min(most, limit) if self._limit else most

    @staticmethod
    def _layer(owned: Owned) -> domainxml.Layer:
        backend, volume = owned
        assert volume.transient is not None
        return dataclasses.replace(backend.layer(volume), room=volume.transient.room)

    def _below(self, ref: model.DiskRef) -> tuple[domainxml.Layer, ...]:
        return self._backends[ref.backend].layers(ref.volume)


def transient(found: model.Instance) -> list[model.DiskRef]:
    """Return the transient disks of an instance."""
    return [ref for ref in found.disks if ref.transient]


# Private


def _of(ref: model.DiskRef, owned: list[Owned]) -> Owned | None:
    """Return the layer over a disk, None without one."""
    for backend, volume in owned:
        over = volume.transient
        usable = volume.state is VolumeState.USABLE
        if usable and over and _is_over(over, ref):
            return backend, volume
    return None


def _is_over(over: model.Transient, ref: model.DiskRef) -> bool:
    return (over.target, over.backend, over.volume) == (
        ref.target,
        ref.backend,
        ref.volume,
    )
