# SPDX-License-Identifier: Apache-2.0
"""One instance that comes here. Every step can be run twice.

A transfer's record was written by a peer: it is held to its own operation's
volumes and to what can be carried, and nothing is done for it before this host
noted, in a record of its own, that it took the instance.
"""

import msgspec
from oslo_log import log as logging

from virtmigrate import domainxml, errors, mailbox, model, node, record
from virtmigrate.backends import base
from virtmigrate.formats import DiskFormat
from virtmigrate.instance import Power
from virtmigrate.migration import merging, plan, trees
from virtmigrate.migration.scrutiny import Scrutiny
from virtmigrate.model import InstanceState, TransferState, VolumeState

LOG = logging.getLogger(__name__)

RUNS_HERE = (TransferState.TAKEN, TransferState.SETTLED)

STARTED = "started"
"""Power of a record whose instance was started: what comes after is the user's."""


class Arrival:
    """One instance that came here. Every step can be run twice."""

    def __init__(self, here: node.Node, stored: record.Stored[model.Transfer]) -> None:
        self._here = here
        self._stored = stored
        self._transfer = stored.body
        self._scrutiny = Scrutiny(here, stored)
        self._scrutiny.demand()

    def settle(self) -> None:
        """Import the volumes, define the domain, start it, and say so."""
        noted = self.note()
        imported = [self._import(v) for v in reversed(self._transfer.volumes)]
        self._count_on_images()
        wanted = complete(self._stored)
        if not self._here.domains.exists(wanted.uuid):
            self._define(wanted)
        self._power(noted)
        self._demand_still_ours()
        for name in sorted({v.backend for v in self._transfer.volumes if v.held}):
            # From here on the layers' records say that they stand on images.
            self._here.backend(name).images.release(self._stored.name)
        self._publish_settled(all(imported))

    def demand_whole(self) -> None:
        """Raise VolumeNotFound unless all that was sent is there.

        Raises NotEntitled if the instance is here, and not by this move.
        """
        self.demand_free()
        present: dict[str, set[str]] = {}
        for volume in self._transfer.volumes:
            backend = self._backend(volume)
            if backend.name not in present:
                names = (*backend.incoming.names(), *backend.disks.names())
                present[backend.name] = set(names)
            if volume.held:
                self._scrutiny.image(volume)
            elif volume.shared:
                self._scrutiny.demand_shared(volume)
            elif volume.name not in present[backend.name]:
                raise errors.VolumeNotFound(
                    host=self._here.name,
                    pool=backend.incoming.name,
                    volume=volume.name,
                )
            elif self._scrutiny.recorded(volume) is None:
                self._scrutiny.demand_self_contained(volume, backend.incoming.name)

    def note(self) -> model.Instance:
        """Publish, once, that this host took the instance, before it acts on it."""
        noted = self.noted() or self._note()
        xml = complete(self._stored).domain_xml
        self._here.tenures.take(msgspec.structs.replace(noted, domain_xml=xml))
        return noted

    def demand_free(self) -> None:
        """Raise NotEntitled if what is here under that UUID is not of this move."""
        if self.noted() is not None:
            return
        uuid = self._transfer.instance
        stored = self._here.instances.find(uuid)
        if stored is not None and not self._gives_way(stored.body):
            raise self._not_entitled(
                f"its record here says {stored.body.state.value} on "
                f"{stored.body.host}, operation {stored.body.operation}"
            )
        if self._here.domains.exists(uuid):
            raise self._not_entitled("a domain of that UUID is here already")

    def noted(self) -> model.Instance | None:
        """Return the instance's record if this host wrote it for this transfer."""
        own = self._here.own_record(self._transfer.instance)
        here = (InstanceState.ARRIVED, InstanceState.HERE)
        if own is None or own.operation != self._transfer.operation:
            return None
        return own if own.state in here else None

    def remove_volumes(self) -> None:
        """Remove what this transfer brought, imported or not."""
        for volume in self._transfer.volumes:
            if not volume.shared and not volume.held:
                backend = self._backend(volume)
                if self._scrutiny.recorded(volume) is not None:
                    # It may be moved already, and its record not say so yet.
                    backend.disks.delete(volume.name)
                backend.remove(volume.name)
                backend.incoming.delete(volume.name)

    def merge(self) -> bool:
        """Merge layers over shared disks; False when that has to wait.

        A running guest is needed: QEMU does it. One that is off keeps its layer. See
        merging.py.
        """
        layers = [v for v in self._transfer.volumes if v.shared and v.backing]
        if not layers:
            return True
        uuid = self._transfer.instance
        if self.noted() is None:
            # It moved on, its layers with it, as layers like any other.
            return True
        merges = [
            merging.Merge(self._here, self._scrutiny, self._backend(volume), volume)
            for volume in layers
        ]
        return all([each.run(uuid) for each in merges])  # noqa: C419

    # Private

    def _note(self) -> model.Instance:
        self.demand_free()
        wanted = complete(self._stored)
        arrived = msgspec.structs.replace(
            wanted,
            snapshots=trees.as_here(wanted.snapshots),
            host=self._here.name,
            state=InstanceState.ARRIVED,
            domain_xml=None,
        )
        self._here.publish_instance(arrived)
        return arrived

    def _define(self, wanted: model.Instance) -> None:
        # Where other hosts see its disks, libvirt may not start it with this one.
        autostart = wanted.autostart and not self._here.tenures.concern(wanted)
        self._here.domains.define(self._xml(wanted), autostart=autostart)

    def _backend(self, volume: model.TransferVolume) -> base.Backend:
        return self._here.backend(volume.backend)

    def _demand_still_ours(self) -> None:
        """Take the domain away again if the instance was given back meanwhile."""
        now = self._here.mailbox.transfers.find(self._stored.name)
        confirmed = TransferState.CONFIRMED
        if now is not None and now.body.state in (*RUNS_HERE, confirmed):
            return
        self._here.domains.kill(self._transfer.instance)
        self._here.domains.undefine(self._transfer.instance)
        raise self._not_entitled(
            f"operation {self._stored.name} was given back meanwhile"
        )

    def _not_entitled(self, reason: str) -> errors.NotEntitled:
        return errors.NotEntitled(
            host=self._here.name, instance=self._transfer.instance, reason=reason
        )

    def _gives_way(self, found: model.Instance) -> bool:
        """Tell whether a record may be replaced by the note of this arrival.

        Where hosts share their records, what the source wrote for this move does; and
        what this host wrote, if it gave the instance to itself.
        """
        if found.host == self._here.name:
            is_free = found.state is InstanceState.GONE
            return is_free or gave_to_itself(found, self._transfer.operation)
        away = found.state is InstanceState.AWAY
        return away and found.operation == self._transfer.operation

    def _count_on_images(self) -> None:
        """Say that the layers, which are recorded now, stand on images of this host.

        Raises ImageGone: the lease of the move was over, and the image was dropped.
        """
        for volume in self._transfer.volumes:
            if volume.held:
                self._backend(volume).images.count_on(volume.name)

    def _import(self, volume: model.TransferVolume) -> bool:
        """Make an incoming volume one of ours; return whether it is durable."""
        if volume.held:
            return self._scrutiny.image(volume).durable
        if volume.shared:
            self._scrutiny.demand_shared(volume)
            self._grow_shared(volume)
            return True
        backend, found = self._backend(volume), self._scrutiny.recorded(volume)
        if found is not None and found.durable:
            return True
        if found is None:
            backend.volumes.publish(volume.name, self._record(volume))
        elif found.state is not VolumeState.INCOMPLETE:
            return _make_durable(backend, found)
        pool, path = backend.accept(volume.name)
        # The source could write to it until here.
        self._scrutiny.demand_self_contained(volume, pool)
        proven = msgspec.structs.replace(
            self._record(volume), pool=pool, path=path, state=self._state(volume)
        )
        return _make_durable(backend, proven)

    def _state(self, volume: model.TransferVolume) -> VolumeState:
        """Return what a volume is here: one that a sent layer stands on is frozen."""
        named = {
            (each.backend, each.backing)
            for each in self._transfer.volumes
            if not each.shared and not each.held
        }
        is_below = (volume.backend, volume.name) in named
        return VolumeState.FROZEN if is_below else VolumeState.USABLE

    def _grow_shared(self, volume: model.TransferVolume) -> None:
        """Grow a disk whose state its backend keeps for the source."""
        backend = self._backend(volume)
        found = backend.volumes.read(volume.name).body
        if volume.kept and found.size < volume.size:
            backend.grow(volume.name, volume.size)
            backend.update(msgspec.structs.replace(found, size=volume.size))

    def _record(self, volume: model.TransferVolume) -> model.Volume:
        pool = self._backend(volume).incoming
        return model.Volume(
            name=volume.name,
            pool=pool.name,
            path=pool.volume_path(volume.name),
            format=volume.format,
            role=volume.role,
            size=volume.size,
            state=VolumeState.INCOMPLETE,
            owner=self._transfer.instance,
            operation=self._transfer.operation,
            origin=self._transfer.source,
            backing=volume.backing,
            digest=volume.digest,
            proof=volume.proof,
        )

    def _xml(self, wanted: model.Instance) -> str:
        xml = domainxml.without_runtime(str(wanted.domain_xml))
        xml = domainxml.with_emulator(xml, None)
        found = [*domainxml.obstacles(xml)]
        refs = {
            ref.target: self._here.backend(ref.backend).layers(ref.volume)
            for ref in wanted.disks
        }
        named = {disk.target for disk in domainxml.disks(xml) if disk.chain}
        if found or named != set(refs) - {plan.NVRAM}:
            raise self._scrutiny.refusal(
                f"its domain has disks {sorted(named)}; {found}"
            )
        nvram = refs.pop(plan.NVRAM, None)
        xml = domainxml.with_disks(xml, refs)
        if nvram:
            xml = domainxml.with_nvram(xml, nvram[0].source)
        else:
            self._scrutiny.demand_no_variables(xml)
        return domainxml.with_size(xml, wanted.memory, wanted.vcpus)

    def _power(self, noted: model.Instance) -> None:
        """Start it, once, if it ran, grown; a guest that was off is grown paused."""
        if noted.power == STARTED:
            return
        start = noted.power != Power.OFF.value
        grown = [v for v in self._transfer.volumes if v.grow and not _raw(v)]
        uuid = noted.uuid
        self._grow_bare(noted, grown)
        if start or grown:
            self._here.start(uuid, paused=bool(grown))
        for volume in grown:
            if volume.target not in _transient(noted):
                self._here.domains.resize_disk(uuid, volume.target, volume.size)
        if grown and not start:
            self._here.domains.kill(uuid)
        elif grown:
            self._here.domains.unpause(uuid)
        self._here.publish_instance(msgspec.structs.replace(noted, power=STARTED))

    def _grow_bare(
        self, noted: model.Instance, grown: list[model.TransferVolume]
    ) -> None:
        """Grow transient disks before there are layers over them."""
        sizes = {v.target: v.size for v in grown if v.target in _transient(noted)}
        if not sizes:
            return
        # What a killed call left has these disks, or layers of their old sizes.
        self._here.domains.kill(noted.uuid)
        with self._here.starting(noted.uuid):
            self._here.scratch.start_bare(noted)
        for target, size in sizes.items():
            self._here.domains.resize_disk(noted.uuid, target, size)
        self._here.domains.kill(noted.uuid)

    def _publish_settled(self, durable: bool) -> None:
        if self._transfer.state is TransferState.SETTLED:
            return
        if not durable:
            LOG.warning(
                "operation=%s instance=%s runs, and its volumes could not be "
                "fsynced from here: the driver on %s does that before a confirm",
                self._stored.name,
                self._transfer.instance,
                self._here.name,
            )
            return
        body = msgspec.structs.replace(self._transfer, state=TransferState.SETTLED)
        self._here.mailbox.transfers.publish(
            self._stored.name, body, after=self._stored.generation
        )


def gave_to_itself(own: model.Instance, operation: str) -> bool:
    """Tell whether a host gave an instance up to itself, and has not taken it yet.

    By its own record: what is away at another host does not come back because a
    transfer in its mailbox, where peers may write, says so.
    """
    given = own.operation, own.state, own.peer
    return given == (operation, InstanceState.AWAY, own.host)


def _make_durable(backend: base.Backend, volume: model.Volume) -> bool:
    durable = backend.persist(volume.pool, volume.name)
    backend.update(msgspec.structs.replace(volume, durable=durable))
    return durable


def _transient(noted: model.Instance) -> set[str]:
    return {ref.target for ref in noted.disks if ref.transient}


def _raw(volume: model.TransferVolume) -> bool:
    return volume.format is DiskFormat.RAW


def complete(stored: record.Stored[model.Transfer]) -> model.Instance:
    """Return the instance of a transfer that was given."""
    if stored.body.record is None:
        raise errors.RecordBroken(
            host=stored.body.peer,
            pool=mailbox.MAILBOX,
            record=stored.name,
            reason="it was given without the instance's record",
        )
    return stored.body.record
