# SPDX-License-Identifier: Apache-2.0
"""One instance that comes here. Every step can be run twice.

A transfer's record was written by a peer: it is held to its own operation's
volumes and to what can be carried, and nothing is done for it before this host
noted, in a record of its own, that it took the instance.
"""

import msgspec
from oslo_log import log as logging

from virtmigrate import domainxml, errors, model, node, record
from virtmigrate.backends import base
from virtmigrate.formats import DiskFormat
from virtmigrate.instance import Power
from virtmigrate.migration import plan
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
        self._backend: base.Backend = here.backend(stored.body.backend)
        self._demand_honest()

    def settle(self) -> None:
        """Import the volumes, define the domain, start it, and say so."""
        noted = self.note()
        imported = [self._import(v) for v in reversed(self._transfer.volumes)]
        wanted = complete(self._stored)
        if not self._here.domains.exists(wanted.uuid):
            self._here.domains.define(self._xml(wanted), autostart=wanted.autostart)
        self._power(noted)
        self._demand_still_ours()
        self._publish_settled(all(imported))

    def demand_whole(self) -> None:
        """Raise VolumeNotFound unless all that was sent is there."""
        present = set(self._backend.incoming.names()) | set(self._backend.disks.names())
        for volume in self._transfer.volumes:
            if not volume.shared and volume.name not in present:
                raise errors.VolumeNotFound(
                    host=self._here.name,
                    pool=self._backend.incoming.name,
                    volume=volume.name,
                )

    def note(self) -> model.Instance:
        """Publish, once, that this host took the instance, before it acts on it."""
        noted = self.noted()
        if noted is not None:
            return noted
        arrived = msgspec.structs.replace(
            complete(self._stored),
            host=self._here.name,
            state=InstanceState.ARRIVED,
            domain_xml=None,
        )
        self._here.publish_instance(arrived)
        return arrived

    def noted(self) -> model.Instance | None:
        """Return the instance's record if this host wrote it for this transfer."""
        stored = self._here.instances.find(self._transfer.instance)
        if (
            stored is not None
            and stored.body.host == self._here.name
            and stored.body.operation == self._transfer.operation
            and stored.body.state in (InstanceState.ARRIVED, InstanceState.HERE)
        ):
            return stored.body
        return None

    def remove_volumes(self) -> None:
        """Remove what this transfer brought, imported or not."""
        for volume in self._transfer.volumes:
            if not volume.shared:
                self._recorded(volume)
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
        if self._here.domains.power(uuid) is not Power.RUNNING:
            return False
        return all([self._merge(uuid, volume) for volume in layers])  # noqa: C419

    # Private

    def _demand_honest(self) -> None:
        """Refuse a record that names what is not its own: a peer wrote it."""
        ending = f".{self._transfer.operation}"
        for volume in self._transfer.volumes:
            if not volume.shared and not volume.name.endswith(ending):
                raise self._dishonest(f"volume {volume.name} is not of this operation")
        record = self._transfer.record
        if record is not None and record.uuid != self._transfer.instance:
            raise self._dishonest(f"it holds the record of instance {record.uuid}")

    def _recorded(self, volume: model.TransferVolume) -> model.Volume | None:
        """Return the record of a volume of ours; RecordBroken if it is another's."""
        found = self._backend.volumes.find(volume.name)
        if found is None:
            return None
        owner = (found.body.owner, found.body.operation)
        if owner != (self._transfer.instance, self._transfer.operation):
            raise self._dishonest(f"volume {volume.name} belongs to {owner}")
        return found.body

    def _dishonest(self, reason: str) -> errors.RecordBroken:
        return errors.RecordBroken(
            host=self._here.name,
            pool=node.MAILBOX,
            record=self._stored.name,
            reason=reason,
        )

    def _demand_still_ours(self) -> None:
        """Take the domain away again if the instance was given back meanwhile."""
        now = self._here.mailbox.transfers.find(self._stored.name)
        if now is not None and now.body.state in RUNS_HERE:
            return
        self._here.domains.kill(self._transfer.instance)
        self._here.domains.undefine(self._transfer.instance)
        raise errors.NotEntitled(
            host=self._here.name,
            instance=self._transfer.instance,
            reason=f"operation {self._stored.name} was given back meanwhile",
        )

    def _is_here(self, uuid: str) -> bool:
        try:
            return bool(self._here.entitled(uuid))
        except (errors.NotEntitled, errors.RecordMissing):
            return False

    def _import(self, volume: model.TransferVolume) -> bool:
        """Make an incoming volume one of ours; return whether it is durable."""
        if volume.shared:
            return True
        found = self._recorded(volume)
        if found is not None and found.durable:
            return True
        if found is None:
            self._backend.volumes.publish(volume.name, self._record(volume))
        elif found.state is VolumeState.USABLE:
            return self._make_durable(found)
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

    def _xml(self, wanted: model.Instance) -> str:
        xml = domainxml.without_runtime(str(wanted.domain_xml))
        xml = domainxml.with_emulator(xml, None)
        found = [*domainxml.obstacles(xml)]
        refs = {ref.target: self._backend.layers(ref.volume) for ref in wanted.disks}
        named = {disk.target for disk in domainxml.disks(xml) if disk.chain}
        if found or named != set(refs) - {plan.NVRAM}:
            raise self._dishonest(f"its domain has disks {sorted(named)}; {found}")
        nvram = refs.pop(plan.NVRAM, None)
        xml = domainxml.with_disks(xml, refs)
        if nvram:
            xml = domainxml.with_nvram(xml, nvram[0].source)
        return domainxml.with_size(xml, wanted.memory, wanted.vcpus)

    def _power(self, noted: model.Instance) -> None:
        """Start it, once, if it ran, grown; a guest that was off is grown paused."""
        if noted.power == STARTED:
            return
        start = noted.power != Power.OFF.value
        grown = [v for v in self._transfer.volumes if v.grow and not _raw(v)]
        uuid = noted.uuid
        if start or grown:
            self._here.domains.start(uuid, paused=bool(grown))
        for volume in grown:
            self._here.domains.resize_disk(uuid, volume.target, volume.size)
        if grown and not start:
            self._here.domains.kill(uuid)
        elif grown:
            self._here.domains.unpause(uuid)
        self._here.publish_instance(msgspec.structs.replace(noted, power=STARTED))

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

    def _merge(self, uuid: str, volume: model.TransferVolume) -> bool:
        """Merge one layer into the disk below it, and drop it.

        False when QEMU is not through with it yet: it is looked at again later.
        """
        top = self._backend.volumes.find(volume.name)
        if top is None or top.body.backing is None:
            return True
        base_record = self._backend.volumes.read(top.body.backing).body
        below = self._backend.path(base_record)
        if not self._here.domains.commit_layer(uuid, volume.target, below):
            return False
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
        return True


def _raw(volume: model.TransferVolume) -> bool:
    return volume.format is DiskFormat.RAW


def complete(stored: record.Stored[model.Transfer]) -> model.Instance:
    """Return the instance of a transfer that was given."""
    if stored.body.record is None:
        raise errors.RecordBroken(
            host=stored.body.peer,
            pool=node.MAILBOX,
            record=stored.name,
            reason="it was given without the instance's record",
        )
    return stored.body.record
