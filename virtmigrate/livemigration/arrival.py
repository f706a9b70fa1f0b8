# SPDX-License-Identifier: Apache-2.0
"""The peer's half of a live move. Every step can be run twice.

A transfer's record lies where peers can write. What this host waits for it knows by
a journal of its own; nothing is done for a transfer that it did not note there.
"""

import contextlib
import time
from collections.abc import Iterator

import msgspec
from oslo_log import log as logging

from virtmigrate import errors, model, node, record
from virtmigrate.journal import Journal
from virtmigrate.livemigration import coming, notes
from virtmigrate.livemigration.consents import Consents
from virtmigrate.livemigration.domains import Copy, Domains
from virtmigrate.migration import facts
from virtmigrate.migration.scrutiny import Scrutiny, is_uuid
from virtmigrate.model import InstanceState, TransferState

LOG = logging.getLogger(__name__)

Stored = record.Stored[model.Transfer]


class Arrivals:
    """Running instances that come to this host. Safe to share between threads."""

    def __init__(self, here: node.Node) -> None:
        self._here = here
        self._consents = Consents(
            here.journals.parent / "awaited", float(here.options.reclaim_age)
        )

    # What a source asks for

    def allow(self, uuid: str) -> None:
        """Let a source bring this instance, within `reclaim_age`: the compute service
        knows of it."""
        self._consents.give(uuid)

    def disallow(self, uuid: str) -> None:
        """Take that back; what is on its way stays."""
        self._consents.end(uuid)

    def expect(self, transfer: model.Transfer) -> None:
        """Wait for an instance: note that, make its volumes, and say how it is to be.

        Can be called again. From here on only what this host noted is believed. Raises
        NotEntitled, RecordBroken, StorageError: what was made goes when the source
        withdraws.
        """
        self._demand_allowed(transfer)
        with self._here.claimed(transfer.instance):
            stored = self._here.mailbox.transfers.read(transfer.operation)
            if stored.body.instance != transfer.instance:
                raise self._not_ours(transfer, "it is of another instance by now")
            if stored.body.state is not TransferState.RESERVED:
                raise self._not_ours(stored.body, f"it is {stored.body.state.value}")
            if stored.body.live is None or stored.body.record is None:
                raise self._not_ours(stored.body, "it is no live move")
            journal = self._journal(stored.name)
            if journal is not None and self._is_expected(journal, stored.body):
                return
            Scrutiny(self._here, stored).demand()
            coming.Coming(self._here, stored, journal or self._note(stored)).expect()

    def arrive(self, transfer: model.Transfer) -> None:
        """Make what came one of this host's instances; raises NotEntitled."""
        with self._claimed(transfer):
            self._arrive(self._here.mailbox.transfers.read(transfer.operation))

    def call_off(self, transfer: model.Transfer) -> None:
        """Remove what was made for an instance that does not come; NotEntitled."""
        with self._claimed(transfer):
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
        self._consents.sweep()
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

    @contextlib.contextmanager
    def _claimed(self, transfer: model.Transfer) -> Iterator[None]:
        """Claim the instance that this host noted, whatever the transfer says."""
        journal = self._journal(transfer.operation)
        if journal is None:
            raise self._not_ours(transfer, "it was not awaited, or is over")
        with self._here.claimed(facts.transfer(journal).instance):
            yield

    def _demand_allowed(self, transfer: model.Transfer) -> None:
        if not is_uuid(transfer.instance):
            raise self._not_ours(transfer, "that is no UUID of an instance")
        is_allowed = self._here.options.accept_moves
        if not is_allowed and not self._consents.has(transfer.instance):
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
        self._end_older(stored.body)
        self._demand_free(stored.body)
        wanted = coming.wanted_of(stored.body)
        return notes.begin(self._here.journals, notes.ARRIVAL, stored.body, wanted, {})

    def _is_expected(self, journal: Journal, transfer: model.Transfer) -> bool:
        """Tell whether all was made for a transfer; NotEntitled if that changed."""
        if journal.has("expected") and _same(_expected(journal), transfer):
            return True
        if not _same(facts.transfer(journal), transfer):
            raise self._not_ours(transfer, "it was changed since this host noted it")
        return False

    def _end_older(self, transfer: model.Transfer) -> None:
        """Clean up after earlier moves of an instance to here; NotEntitled for one that
        is not over: what comes now must not be taken for what that brought."""
        for each in list(notes.journals(self._here.journals, notes.ARRIVAL)):
            if facts.transfer(each).instance != transfer.instance:
                continue
            stored = self._here.mailbox.transfers.find(each.operation)
            if stored is None:
                self._forgotten(each)
            elif stored.body.state is TransferState.WITHDRAWN:
                self._call_off(stored)
            else:
                raise self._not_ours(
                    transfer, f"its move {each.operation} to here is not over"
                )

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
        journal = self._journal(stored.name)
        uuid = facts.transfer(journal).instance if journal else ""
        if uuid and Domains(self._here.host).copy(uuid) is not Copy.NONE:
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
        if not journal.has("expected") or not _same(_expected(journal), stored.body):
            raise self._not_ours(stored.body, "it is not what this host waits for")
        ours = record.Stored(stored.name, stored.generation, _expected(journal))
        if not coming.Coming(self._here, ours, journal).arrive():
            # Its source keeps what it has until then.
            raise self._not_ours(
                stored.body,
                "it goes on here, and its volumes are not durable yet: this process "
                f"cannot fsync them, the driver on {self._here.name} does",
            )
        self._publish(stored, TransferState.SETTLED)
        journal.close()
        self.disallow(ours.body.instance)

    def _call_off(self, stored: Stored) -> None:
        journal = self._journal(stored.name)
        if journal is not None:
            if journal.has("taken"):
                raise self._not_ours(stored.body, "it has arrived here")
            self._remove(journal)
            self.disallow(facts.transfer(journal).instance)
            journal.close()
        self._here.mailbox.transfers.remove(stored.name)

    def _forgotten(self, journal: Journal) -> None:
        """The source removed the transfer: it was settled, or never came to be."""
        if not journal.has("taken"):
            self._remove(journal)
        journal.close()

    def _remove(self, journal: Journal) -> None:
        stored = record.Stored(journal.operation, 0, facts.transfer(journal))
        coming.Coming(self._here, stored, journal).remove()


# Private


def _expected(journal: Journal) -> model.Transfer:
    """Return a transfer as this host wrote it when all was made for it."""
    text = str(facts.facts(journal, "expected")["transfer"])
    return msgspec.json.decode(text, type=model.Transfer)


def _same(noted: model.Transfer, found: model.Transfer) -> bool:
    """Tell whether a transfer is the one that was noted, however far it is."""
    return noted == msgspec.structs.replace(
        found, state=noted.state, created=noted.created
    )
