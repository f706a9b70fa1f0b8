# SPDX-License-Identifier: Apache-2.0
"""The peer's half of a live move. Every step can be run twice.

A transfer's record lies where peers can write. What this host waits for it knows by
a journal of its own; nothing is done for a transfer that it did not note there.
"""

import time
from pathlib import Path

import msgspec
from oslo_log import log as logging

from virtmigrate import domainxml, errors, model, node, record
from virtmigrate.instance import Power
from virtmigrate.journal import Journal
from virtmigrate.livemigration import notes
from virtmigrate.livemigration.domains import Copy, Domains
from virtmigrate.migration import facts, trees
from virtmigrate.migration.scrutiny import Scrutiny
from virtmigrate.model import InstanceState, Proof, TransferState, VolumeState

LOG = logging.getLogger(__name__)

Stored = record.Stored[model.Transfer]


class Arrivals:
    """Running instances that come to this host. Safe to share between threads."""

    def __init__(self, here: node.Node) -> None:
        self._here = here

    # What a source asks for

    def allow(self, uuid: str) -> None:
        """Let a source bring this instance: the compute service knows of it."""
        self._consent(uuid).parent.mkdir(parents=True, exist_ok=True)
        self._consent(uuid).touch()

    def disallow(self, uuid: str) -> None:
        """Take that back; what is on its way stays."""
        self._consent(uuid).unlink(missing_ok=True)

    def expect(self, transfer: model.Transfer) -> None:
        """Wait for an instance: note that, make its volumes, and say how it is to be.

        Can be called again. Raises NotEntitled, StorageError: what was made goes when
        the source withdraws.
        """
        self._demand_allowed(transfer)
        with self._here.claimed(transfer.instance):
            stored = self._here.mailbox.transfers.read(transfer.operation)
            if stored.body.state is not TransferState.RESERVED:
                raise self._not_ours(stored.body, f"it is {stored.body.state.value}")
            Scrutiny(self._here, stored).demand()
            _Arrival(self._here, stored, self._note(stored)).expect()

    def arrive(self, transfer: model.Transfer) -> None:
        """Make what came one of this host's instances; raises NotEntitled."""
        with self._here.claimed(transfer.instance):
            self._arrive(self._here.mailbox.transfers.read(transfer.operation))

    def call_off(self, transfer: model.Transfer) -> None:
        """Remove what was made for an instance that does not come; NotEntitled."""
        with self._here.claimed(transfer.instance):
            stored = self._here.mailbox.transfers.read(transfer.operation)
            if stored.body.state is not TransferState.WITHDRAWN:
                raise self._not_ours(stored.body, f"it is {stored.body.state.value}")
            self._call_off(stored)

    def unsettled(self, uuid: str) -> Journal | None:
        """Return the journal of an instance that this host has, and has not settled."""
        for each in notes.journals(self._here.journals, notes.ARRIVAL):
            if each.has("taken") and (each.facts("begun") or {})["instance"] == uuid:
                return each
        return None

    def recover(self) -> list[str]:
        """Go on with what came or was withdrawn; return what could not be finished."""
        left = []
        for operation, uuid in self._open().items():
            try:
                with self._here.claimed(uuid):
                    if said := self._recover(operation):
                        left.append(f"{operation}: {said}")
            except Exception as e:
                # One that cannot be finished must not keep the host from the others.
                LOG.warning("operation=%s: %s", operation, e)
                left.append(f"{operation}: {e}")
        return left

    # Private

    def _consent(self, uuid: str) -> Path:
        return self._here.journals.parent / "awaited" / uuid

    def _demand_allowed(self, transfer: model.Transfer) -> None:
        is_allowed = self._here.options.accept_moves
        if not is_allowed and not self._consent(transfer.instance).exists():
            raise self._not_ours(
                transfer,
                "accept_moves is off, and the compute service here does not await it",
            )

    def _not_ours(self, transfer: model.Transfer, reason: str) -> errors.NotEntitled:
        return errors.NotEntitled(
            host=self._here.name,
            instance=transfer.instance,
            reason=f"operation {transfer.operation}: {reason}",
        )

    def _open(self) -> dict[str, str]:
        """Return the instances of what is not over, by operation."""
        found = {
            each.operation: str((each.facts("begun") or {})["instance"])
            for each in notes.journals(self._here.journals, notes.ARRIVAL)
        }
        for stored in self._here.mailbox.open_transfers():
            if stored.body.live is not None:
                found.setdefault(stored.name, stored.body.instance)
        return found

    def _journal(self, operation: str) -> Journal | None:
        for each in notes.journals(self._here.journals, notes.ARRIVAL):
            if each.operation == operation:
                return each
        return None

    def _note(self, stored: Stored) -> Journal:
        found = self._journal(stored.name)
        if found is not None:
            return found
        self._demand_free(stored.body)
        wanted = _wanted(stored.body)
        return notes.begin(self._here.journals, notes.ARRIVAL, stored.body, wanted, {})

    def _demand_free(self, transfer: model.Transfer) -> None:
        own = self._here.own_record(transfer.instance)
        if own is not None and own.state is not InstanceState.GONE:
            raise self._not_ours(transfer, f"its record here says {own.state.value}")
        if self._here.domains.exists(transfer.instance):
            raise self._not_ours(transfer, "a domain of that UUID is here already")

    def _recover(self, operation: str) -> str:
        stored = self._here.mailbox.transfers.find(operation)
        journal = self._journal(operation)
        if stored is None:
            if journal is not None:
                self._forgotten(journal)
            return ""
        state = stored.body.state
        if state is TransferState.TAKEN:
            self._arrive(stored)
        elif state is TransferState.SETTLED and journal is not None:
            journal.close()
        elif state is TransferState.WITHDRAWN:
            self._call_off(stored)
        elif state is TransferState.RESERVED and self._is_stale(stored):
            return self._waits(stored)
        return ""

    def _is_stale(self, stored: Stored) -> bool:
        written = self._here.mailbox.transfers.written(stored)
        since = min(stored.body.created, written or stored.body.created)
        return time.time() - since > float(self._here.options.reclaim_age)

    def _waits(self, stored: Stored) -> str:
        """Give up a transfer whose source is silent, unless its guest is here."""
        uuid = stored.body.instance
        if Domains(self._here.host).copy(uuid) is not Copy.NONE:
            return (
                f"instance {uuid} stands paused here until {stored.body.source} says "
                "whose it is"
            )
        self._publish(stored, TransferState.WITHDRAWN)
        self._call_off(stored)
        return ""

    def _publish(self, stored: Stored, state: TransferState) -> None:
        body = msgspec.structs.replace(stored.body, state=state)
        transfers = self._here.mailbox.transfers
        transfers.publish(stored.name, body, after=stored.generation)

    def _arrive(self, stored: Stored) -> None:
        journal = self._journal(stored.name)
        if stored.body.state is TransferState.SETTLED:
            return
        if journal is None or stored.body.state is not TransferState.TAKEN:
            raise self._not_ours(
                stored.body, f"it is {stored.body.state.value}, or was not awaited"
            )
        if not _Arrival(self._here, stored, journal).arrive():
            # Its source keeps what it has until then.
            raise self._not_ours(
                stored.body, "it goes on here, and its volumes are not durable yet"
            )
        self._publish(stored, TransferState.SETTLED)
        journal.close()
        self.disallow(stored.body.instance)

    def _call_off(self, stored: Stored) -> None:
        journal = self._journal(stored.name)
        if journal is not None:
            _Arrival(self._here, stored, journal).remove()
            journal.close()
        self.disallow(stored.body.instance)
        self._here.mailbox.transfers.remove(stored.name)

    def _forgotten(self, journal: Journal) -> None:
        """The source removed the transfer: it was settled, or never came to be."""
        if not journal.has("taken"):
            transfer = facts.transfer(journal)
            stored = record.Stored(journal.operation, 0, transfer)
            _Arrival(self._here, stored, journal).remove()
        journal.close()


# Private


class _Arrival:
    """One instance that comes here."""

    def __init__(self, here: node.Node, stored: Stored, journal: Journal) -> None:
        self._here = here
        self._stored = stored
        self._transfer = stored.body
        self._journal = journal
        self._uuid = stored.body.instance
        self._domains = Domains(here.host)

    def expect(self) -> None:
        self._demand_shared()
        for volume in self._sent():
            self._make(volume)
        live, wanted = self._transfer.live, _wanted(self._transfer)
        assert live is not None
        body = msgspec.structs.replace(
            self._transfer,
            record=msgspec.structs.replace(
                wanted, domain_xml=self._as_here(str(wanted.domain_xml), wanted)
            ),
            live=model.Live(xml=self._as_here(live.xml, wanted), ready=True),
        )
        transfers = self._here.mailbox.transfers
        transfers.publish(self._stored.name, body, after=self._stored.generation)

    def arrive(self) -> bool:
        """Have it here; tell whether all that was sent is durable."""
        self._journal.done("taken")
        wanted = _wanted(self._transfer)
        here = msgspec.structs.replace(
            wanted,
            snapshots=trees.as_here(wanted.snapshots),
            host=self._here.name,
            state=InstanceState.HERE,
            peer=None,
            domain_xml=None,
        )
        self._go_on(here, wanted)
        if self._here.own_record(self._uuid) != here:
            self._here.publish_instance(here)
        self._start(here, wanted)
        return all([self._prove(volume) for volume in self._sent()])  # noqa: C419

    def remove(self) -> None:
        self._domains.kill(self._uuid)
        self._domains.undefine(self._uuid)
        for volume in self._sent():
            backend = self._here.backend(volume.backend)
            found = backend.volumes.find(volume.name)
            if found is None or found.body.operation == self._transfer.operation:
                backend.remove(volume.name)
                backend.incoming.delete(volume.name)

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
        if backend.volumes.find(volume.name) is not None:
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

    def _as_here(self, text: str, wanted: model.Instance) -> str:
        xml = domainxml.with_emulator(text, None)
        refs = {
            ref.target: self._here.backend(ref.backend).layers(ref.volume)
            for ref in wanted.disks
        }
        return domainxml.with_disks(xml, refs)

    def _go_on(self, here: model.Instance, wanted: model.Instance) -> None:
        """Let a guest that came go on, before all that can wait."""
        whole = self._domains.copy(self._uuid) is Copy.WHOLE
        runs = wanted.power == Power.RUNNING.value
        if whole and runs and not self._journal.has("started"):
            self._domains.go_on(self._uuid)

    def _start(self, here: model.Instance, wanted: model.Instance) -> None:
        """Have its domain and its tenure; start it anew if its memory is lost."""
        autostart = wanted.autostart and not self._here.tenures.concern(here)
        if not self._domains.is_defined(self._uuid):
            self._here.domains.define(str(wanted.domain_xml), autostart=autostart)
        if self._journal.has("started"):
            return
        is_off = self._domains.is_off(self._uuid)
        if is_off:
            LOG.error("instance=%s its memory is lost: started anew", self._uuid)
            self._here.start(self._uuid)
        else:
            with self._here.starting(self._uuid):
                pass
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


def _wanted(transfer: model.Transfer) -> model.Instance:
    if transfer.record is None:
        raise errors.NotEntitled(
            host=transfer.peer, instance=transfer.instance, reason="it has no record"
        )
    return transfer.record
