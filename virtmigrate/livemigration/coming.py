# SPDX-License-Identifier: Apache-2.0
"""One instance that comes here alive: its volumes, its domain, its record."""

import msgspec
from oslo_log import log as logging

from virtmigrate import domainxml, errors, model, node, record
from virtmigrate.instance import Power
from virtmigrate.journal import Journal
from virtmigrate.livemigration.domains import Copy, Domains
from virtmigrate.migration import trees
from virtmigrate.migration.scrutiny import Scrutiny
from virtmigrate.model import InstanceState, Proof, VolumeState

LOG = logging.getLogger(__name__)

Stored = record.Stored[model.Transfer]

_NOT_DURABLE = (
    "the process that answers there cannot fsync {}: run it as a user who sees that "
    "directory"
)


class Coming:
    """One instance that comes here."""

    def __init__(self, here: node.Node, stored: Stored, journal: Journal) -> None:
        self._here = here
        self._stored = stored
        self._transfer = stored.body
        self._journal = journal
        self._uuid = stored.body.instance
        self._domains = Domains(here.host)
        self._scrutiny = Scrutiny(here, stored)

    def expect(self) -> None:
        self._demand_shared()
        for volume in self._sent():
            self._make(volume)
        live, wanted = self._transfer.live, wanted_of(self._transfer)
        assert live is not None
        body = msgspec.structs.replace(
            self._transfer,
            record=msgspec.structs.replace(
                wanted, domain_xml=self._configuration(wanted)
            ),
            live=model.Live(xml=self._as_here(live.xml, wanted), ready=True),
        )
        self._journal.done("expected", transfer=msgspec.json.encode(body).decode())
        transfers = self._here.mailbox.transfers
        transfers.publish(self._stored.name, body, after=self._stored.generation)

    def arrive(self) -> bool:
        """Have it here; tell whether all that was sent is durable."""
        self._journal.done("taken")
        wanted = wanted_of(self._transfer)
        here = msgspec.structs.replace(
            wanted,
            snapshots=trees.as_here(wanted.snapshots),
            host=self._here.name,
            state=InstanceState.HERE,
            peer=None,
            domain_xml=None,
        )
        self._go_on(here, wanted)
        own = self._here.own_record(self._uuid)
        # What was changed since then stays.
        if own is None or own.operation != here.operation:
            self._here.publish_instance(here)
        self._start(here, wanted)
        return all([self._prove(volume) for volume in self._sent()])  # noqa: C419

    def remove(self) -> None:
        own = self._here.own_record(self._uuid)
        if own is None or own.state is InstanceState.GONE:
            # Nothing else has brought it here since.
            self._domains.kill(self._uuid)
            self._domains.undefine(self._uuid)
        for volume in self._sent():
            if self._scrutiny.recorded(volume) is not None:
                self._here.backend(volume.backend).remove(volume.name)

    # Private

    def _sent(self) -> list[model.TransferVolume]:
        return [each for each in self._transfer.volumes if not each.shared]

    def _demand_shared(self) -> None:
        """Refuse a disk that both see, and that is not the instance's."""
        for volume in self._transfer.volumes:
            if volume.shared:
                backend = self._here.backend(volume.backend)
                found = backend.volumes.read(volume.name).body
                if found.owner != self._uuid:
                    raise errors.NotEntitled(
                        host=self._here.name,
                        instance=self._uuid,
                        reason=f"volume {volume.name} is of {found.owner}",
                    )

    def _make(self, volume: model.TransferVolume) -> None:
        """Make a volume that libvirt fills, where it is to stay."""
        backend = self._here.backend(volume.backend)
        if self._scrutiny.recorded(volume) is not None:
            backend.remove(volume.name)
        pool = backend.incoming
        made = model.Volume(
            name=volume.name,
            pool=pool.name,
            path=pool.volume_path(volume.name),
            format=volume.format,
            role=volume.role,
            size=volume.size,
            state=VolumeState.INCOMPLETE,
            owner=self._uuid,
            operation=self._transfer.operation,
            origin=self._transfer.source,
            proof=Proof.NONE,
        )
        backend.allocate(made)
        name, path = backend.accept(volume.name)
        backend.update(msgspec.structs.replace(made, pool=name, path=path))
        if not backend.persist(name, volume.name):
            # It would come, and its source keep its copy for ever.
            raise errors.StorageError(
                host=self._here.name, pool=name, reason=_NOT_DURABLE.format(path)
            )

    def _as_here(self, text: str, wanted: model.Instance) -> str:
        xml = domainxml.with_emulator(text, None)
        refs = {
            ref.target: self._here.backend(ref.backend).layers(ref.volume)
            for ref in wanted.disks
        }
        return domainxml.with_disks(xml, refs)

    def _configuration(self, wanted: model.Instance) -> str:
        """Return what this host defines and starts: with its own disks, and no more."""
        xml = domainxml.without_runtime(str(wanted.domain_xml))
        found = [*domainxml.obstacles(xml)]
        named = {disk.target for disk in domainxml.disks(xml) if disk.chain}
        if found or named != {ref.target for ref in wanted.disks}:
            raise self._scrutiny.refusal(
                f"its domain has disks {sorted(named)}; {found}"
            )
        return self._as_here(xml, wanted)

    def _go_on(self, here: model.Instance, wanted: model.Instance) -> None:
        """Have its tenure, then let a guest that came go on, before all that can wait.

        Raises HeldElsewhere: it is off.
        """
        whole = self._domains.copy(self._uuid) is Copy.WHOLE
        if not whole or self._journal.has("started"):
            return
        try:
            with self._here.tenures.starting(here, self._here.domains):
                if wanted.power == Power.RUNNING.value:
                    self._domains.go_on(self._uuid)
        except errors.HeldElsewhere:
            # Its source may have let it go on.
            self._domains.kill(self._uuid)
            raise

    def _start(self, here: model.Instance, wanted: model.Instance) -> None:
        """Have its domain; start it anew if its memory is lost."""
        autostart = wanted.autostart and not self._here.tenures.concern(here)
        if not self._domains.is_defined(self._uuid):
            self._here.domains.define(str(wanted.domain_xml))
        if self._journal.has("started"):
            return
        if autostart:
            # libvirt leaves that behind.
            self._here.domains.allow_autostart(self._uuid)
        if self._domains.is_off(self._uuid):
            LOG.error("instance=%s its memory is lost: started anew", self._uuid)
            self._here.start(self._uuid)
        self._journal.done("started")

    def _prove(self, volume: model.TransferVolume) -> bool:
        """Say that a volume is usable: libvirt said that it was filled; tell whether it
        is durable. StorageError: its source keeps what it has."""
        backend = self._here.backend(volume.backend)
        found = backend.volumes.read(volume.name).body
        if found.durable:
            return True
        durable = backend.persist(found.pool, found.name)
        backend.update(
            msgspec.structs.replace(found, state=VolumeState.USABLE, durable=durable)
        )
        return durable


def wanted_of(transfer: model.Transfer) -> model.Instance:
    """Return the instance of a transfer as it is to be here; NotEntitled."""
    if transfer.record is None:
        raise errors.NotEntitled(
            host=transfer.peer, instance=transfer.instance, reason="it has no record"
        )
    return transfer.record
