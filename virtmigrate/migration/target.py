# SPDX-License-Identifier: Apache-2.0
"""The host that an instance comes to: take the right, import, settle; give back.

There is no journal here: the transfer's record, in this host's own mailbox, says
how far it is, and each step looks whether it is done.
"""

import time

import msgspec
from oslo_log import log as logging

from virtmigrate import domainxml, errors, model, node, peer, record
from virtmigrate.backends import base
from virtmigrate.formats import DiskFormat
from virtmigrate.instance import Power
from virtmigrate.migration import plan, ticket
from virtmigrate.model import InstanceState, TransferState, VolumeState

LOG = logging.getLogger(__name__)

Transfers = list[record.Stored[model.Transfer]]


class Target:
    """Arrivals at this host. Safe to share between threads."""

    def __init__(self, here: node.Node) -> None:
        self._here = here

    def finish(
        self,
        uuid: str,
        text: str,
        *,
        power_on: bool = True,
        interfaces: tuple[domainxml.Interface, ...] = (),
    ) -> None:
        """Take the instance of a ticket, and start it if it ran.

        Can be called again after any failure. Raises TicketDamaged,
        NotEntitled (the source took it back, or never gave it up).
        """
        given = ticket.read(text, uuid)
        with self._here.claimed(uuid):
            stored = self._here.mailbox.transfers.find(given.operation)
            if stored is None:
                raise self._not_ours(uuid, f"operation {given.operation} is not known")
            if ticket.of(stored.body).digests != given.digests:
                raise errors.TicketDamaged(
                    reason="its digests are not those of the transfer"
                )
            taken = self._take(stored, power_on=power_on, interfaces=interfaces)
            _Arrival(self._here, taken).settle()

    def held(self, uuid: str) -> record.Stored[model.Transfer] | None:
        """Return the unconfirmed transfer that brought the instance here."""
        for stored in self.transfers():
            if stored.body.instance == uuid and stored.body.state in peer.HELD:
                return stored
        return None

    def give_back(self, uuid: str) -> bool:
        """Give an unconfirmed instance back: no domain, no right, no volumes here.

        Returns False when there is no such transfer. Can be called again.
        """
        stored = self.held(uuid)
        if stored is None:
            return False
        self._here.domains.kill(uuid)
        self._here.domains.undefine(uuid)
        self._say_gone(stored.body)
        self._publish(stored, TransferState.RETURNED)
        _Arrival(self._here, stored).remove_volumes()
        LOG.info(
            "operation=%s instance=%s given back to %s",
            stored.name,
            uuid,
            stored.body.source,
        )
        return True

    def recover(self) -> list[str]:
        """Finish what a killed process left here, and remove what is over.

        Returns what could not be finished.
        """
        left = []
        for stored in self.transfers():
            try:
                with self._here.claimed(stored.body.instance):
                    # Who held the claim until now may have gone on with it.
                    now = self._here.mailbox.transfers.find(stored.name)
                    if now is not None:
                        self._recover(now)
            except errors.Error as e:
                LOG.warning("operation=%s: %s", stored.name, e)
                left.append(f"{stored.name}: {e}")
        self._bury()
        return left

    def transfers(self) -> Transfers:
        """Return all transfers in this host's mailbox."""
        return list(self._here.mailbox.open_transfers())

    # Private

    def _not_ours(self, uuid: str, reason: str) -> errors.NotEntitled:
        return errors.NotEntitled(host=self._here.name, instance=uuid, reason=reason)

    def _take(
        self,
        stored: record.Stored[model.Transfer],
        *,
        power_on: bool,
        interfaces: tuple[domainxml.Interface, ...],
    ) -> record.Stored[model.Transfer]:
        """Win the right from the transfer's record, or find that it is ours.

        What the caller wants is kept with it: a restart finishes the same.
        """
        state = stored.body.state
        if state in peer.HELD:
            return stored
        if state is not TransferState.GIVEN:
            raise self._not_ours(
                stored.body.instance, f"operation {stored.name} is {state.value}"
            )
        wanted = _complete(stored)
        if not power_on:
            wanted = msgspec.structs.replace(wanted, power=Power.OFF.value)
        if interfaces:
            xml = domainxml.with_interfaces(str(wanted.domain_xml), interfaces)
            wanted = msgspec.structs.replace(wanted, domain_xml=xml)
        return self._publish(stored, TransferState.TAKEN, record=wanted)

    def _publish(
        self,
        stored: record.Stored[model.Transfer],
        state: TransferState,
        **changes: object,
    ) -> record.Stored[model.Transfer]:
        body = msgspec.structs.replace(stored.body, state=state, **changes)
        transfers = self._here.mailbox.transfers
        return transfers.publish(stored.name, body, after=stored.generation)

    def _say_gone(self, transfer: model.Transfer) -> None:
        stored = self._here.instances.find(transfer.instance)
        if stored is not None and stored.body.host == self._here.name:
            gone = msgspec.structs.replace(stored.body, state=InstanceState.GONE)
            self._here.publish_instance(gone)

    def _recover(self, stored: record.Stored[model.Transfer]) -> None:
        state, age = stored.body.state, time.time() - stored.body.created
        limit = float(self._here.options.reclaim_age)
        if state is TransferState.TAKEN:
            _Arrival(self._here, stored).settle()
        elif state is TransferState.CONFIRMED:
            self._close(stored)
        elif state is TransferState.RETURNED:
            _Arrival(self._here, stored).remove_volumes()
        elif state is TransferState.RESERVED and age > limit:
            LOG.warning("operation=%s given up: its source is silent", stored.name)
            self._publish(stored, TransferState.WITHDRAWN)
            _Arrival(self._here, stored).remove_volumes()
        elif state is TransferState.WITHDRAWN and age > 2 * limit:
            self._here.mailbox.transfers.remove(stored.name)

    def _bury(self) -> None:
        """Remove records of instances that were given back, and taken back."""
        open_ones = {stored.name for stored in self.transfers()}
        for name in self._here.instances.names():
            stored = self._here.instances.find(name)
            if (
                stored is not None
                and stored.body.state is InstanceState.GONE
                and stored.body.host == self._here.name
                and stored.body.operation not in open_ones
            ):
                self._here.instances.remove(name)

    def _close(self, stored: record.Stored[model.Transfer]) -> None:
        """End a confirmed move: layers that kept the source's state are merged."""
        if _Arrival(self._here, stored).merge():
            self._here.mailbox.transfers.remove(stored.name)


class _Arrival:
    """One instance that came here. Every step can be run twice."""

    def __init__(self, here: node.Node, stored: record.Stored[model.Transfer]) -> None:
        self._here = here
        self._stored = stored
        self._transfer = stored.body
        self._backend: base.Backend = here.backend(stored.body.backend)

    def settle(self) -> None:
        """Import the volumes, define the domain, start it, and say so."""
        imported = [self._import(v) for v in reversed(self._transfer.volumes)]
        wanted = self._wanted()
        if not self._here.domains.exists(wanted.uuid):
            self._here.domains.define(self._xml(wanted), autostart=wanted.autostart)
        self._power(wanted)
        self._publish_settled(all(imported))

    def remove_volumes(self) -> None:
        """Remove what this transfer brought, imported or not."""
        for volume in self._transfer.volumes:
            if not volume.shared:
                self._backend.remove(volume.name)
                self._backend.incoming.delete(volume.name)

    def merge(self) -> bool:
        """Merge layers over shared disks; False when that has to wait.

        A running guest is needed: QEMU does it. One that is off keeps its layer.
        """
        layers = [v for v in self._transfer.volumes if v.shared and v.backing]
        if not layers:
            return True
        uuid = self._transfer.instance
        if not self._is_here(uuid):
            # It moved on, its layers with it, as layers like any other.
            return True
        running = self._here.domains.power(uuid) is Power.RUNNING
        if running:
            for volume in layers:
                self._merge(uuid, volume)
        return running

    # Private

    def _is_here(self, uuid: str) -> bool:
        try:
            return bool(self._here.entitled(uuid))
        except (errors.NotEntitled, errors.RecordMissing):
            return False

    def _import(self, volume: model.TransferVolume) -> bool:
        """Make an incoming volume one of ours; return whether it is durable."""
        if volume.shared:
            return True
        found = self._backend.volumes.find(volume.name)
        if found is not None and found.body.durable:
            return True
        if found is None:
            self._backend.volumes.publish(volume.name, self._record(volume))
        elif found.body.state is VolumeState.USABLE:
            return self._make_durable(found.body)
        pool, path = self._backend.accept(volume.name)
        proven = msgspec.structs.replace(
            self._record(volume), pool=pool, path=path, state=VolumeState.USABLE
        )
        return self._make_durable(proven)

    def _make_durable(self, volume: model.Volume) -> bool:
        durable = self._backend.persist(volume.pool, volume.name)
        self._backend.update(msgspec.structs.replace(volume, durable=durable))
        return durable

    def _record(self, volume: model.TransferVolume) -> model.Volume:
        pool = self._backend.incoming
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
        )

    def _wanted(self) -> model.Instance:
        """Publish, once, that this host has the instance; return it with its XML."""
        given = _complete(self._stored)
        here = msgspec.structs.replace(
            given,
            host=self._here.name,
            state=InstanceState.HERE,
            domain_xml=None,
        )
        stored = self._here.instances.find(given.uuid)
        if stored is None or stored.body != here:
            self._here.publish_instance(here)
        return given

    def _xml(self, wanted: model.Instance) -> str:
        xml = domainxml.without_runtime(str(wanted.domain_xml))
        xml = domainxml.with_emulator(xml, None)
        refs = {ref.target: self._backend.layers(ref.volume) for ref in wanted.disks}
        nvram = refs.pop(plan.NVRAM, None)
        xml = domainxml.with_disks(xml, refs)
        if nvram:
            xml = domainxml.with_nvram(xml, nvram[0].source)
        return domainxml.with_size(xml, wanted.memory, wanted.vcpus)

    def _power(self, wanted: model.Instance) -> None:
        """Start it if it ran, grown; a guest that was off is grown paused."""
        start = wanted.power != Power.OFF.value
        grown = [v for v in self._transfer.volumes if v.grow and not _raw(v)]
        if not start and not grown:
            return
        uuid = wanted.uuid
        self._here.domains.start(uuid, paused=bool(grown))
        for volume in grown:
            self._here.domains.resize_disk(uuid, volume.target, volume.size)
        if not start:
            self._here.domains.kill(uuid)
        elif grown:
            self._here.domains.unpause(uuid)

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

    def _merge(self, uuid: str, volume: model.TransferVolume) -> None:
        """Merge one layer into the disk below it, and drop it."""
        top = self._backend.volumes.find(volume.name)
        if top is None or top.body.backing is None:
            return
        base_record = self._backend.volumes.read(top.body.backing).body
        self._here.domains.commit_layer(uuid, volume.target)
        merged = msgspec.structs.replace(
            base_record, size=volume.size, state=VolumeState.USABLE, digest=None
        )
        self._backend.update(merged)
        stored = self._here.instances.read(uuid).body
        disks = tuple(
            msgspec.structs.replace(ref, volume=merged.name)
            if ref.volume == volume.name
            else ref
            for ref in stored.disks
        )
        self._here.publish_instance(msgspec.structs.replace(stored, disks=disks))
        self._backend.remove(volume.name)


def _raw(volume: model.TransferVolume) -> bool:
    return volume.format is DiskFormat.RAW


def _complete(stored: record.Stored[model.Transfer]) -> model.Instance:
    """Return the instance of a transfer that was given."""
    if stored.body.record is None:
        raise errors.RecordBroken(
            host=stored.body.peer,
            pool=node.MAILBOX,
            record=stored.name,
            reason="it was given without the instance's record",
        )
    return stored.body.record
