# SPDX-License-Identifier: Apache-2.0
"""The host that an instance comes to: take the right, import, settle; give back.

There is no journal here: the transfer's record, in this host's own mailbox, says
how far it is, and each step looks whether it is done.
"""

import time

import msgspec
from oslo_log import log as logging

from virtmigrate import domainxml, errors, model, node, peer, record
from virtmigrate.instance import Power
from virtmigrate.migration import ticket
from virtmigrate.migration.arrival import RUNS_HERE, Arrival, complete
from virtmigrate.model import InstanceState, TransferState

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
            self._demand_same(stored.body, given)
            Arrival(self._here, stored).demand_whole()
            taken = self._take(stored, power_on=power_on, interfaces=interfaces)
            Arrival(self._here, taken).settle()

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
        if stored.body.state is not TransferState.RETURNING:
            # Won before anything is taken away: from here it can't be confirmed.
            stored = self._publish(stored, TransferState.RETURNING)
        self._here.domains.kill(uuid)
        self._here.domains.undefine(uuid)
        self._say_gone(stored.body)
        Arrival(self._here, stored).remove_volumes()
        self._publish(stored, TransferState.RETURNED)
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
            except Exception as e:
                # One that cannot be finished must not keep the host from the others.
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
        if state in RUNS_HERE:
            return stored
        if state is not TransferState.GIVEN:
            raise self._not_ours(
                stored.body.instance, f"operation {stored.name} is {state.value}"
            )
        wanted = complete(stored)
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
        given = stored.body.generation > 0
        if state is TransferState.TAKEN:
            self._go_on(stored)
        elif state is TransferState.CONFIRMED:
            self._close(stored)
        elif state is TransferState.RETURNING:
            self.give_back(stored.body.instance)
        elif state is TransferState.RESERVED and age > limit:
            LOG.warning("operation=%s given up: its source is silent", stored.name)
            self._publish(stored, TransferState.WITHDRAWN)
            Arrival(self._here, stored).remove_volumes()
        elif state is TransferState.WITHDRAWN and age > 2 * limit and not given:
            # One that was given stays: it is its source's proof of the withdrawal.
            self._here.mailbox.transfers.remove(stored.name)

    def _go_on(self, stored: record.Stored[model.Transfer]) -> None:
        """Finish what finish() began; only this host's own note says that it did."""
        arrival = Arrival(self._here, stored)
        if arrival.noted() is None:
            raise self._not_ours(
                stored.body.instance,
                f"operation {stored.name} is taken, and this host did not note it; "
                "finish_migration has to be called again",
            )
        arrival.settle()

    def _demand_same(self, transfer: model.Transfer, given: ticket.Ticket) -> None:
        """See that the record is the one that the source gave up with the ticket."""
        ours = ticket.of(transfer)
        same = ours.digests == given.digests and ours.source == given.source
        if transfer.state is TransferState.GIVEN:
            same = same and ours.record == given.record
        if not same:
            raise errors.TicketDamaged(
                reason="its digests are not those of the transfer"
            )

    def _bury(self) -> None:
        """Remove records of instances that were given back, and taken back."""
        for name in self._here.instances.names():
            try:
                stored = self._here.instances.find(name)
                if stored is not None and stored.body.state is InstanceState.GONE:
                    self._bury_one(name)
            except errors.Error as e:
                LOG.warning("instance=%s passed over: %s", name, e)

    def _bury_one(self, name: str) -> None:
        with self._here.claimed(name):
            # It may have come again since the look that found it gone.
            stored = self._here.instances.find(name)
            if (
                stored is not None
                and stored.body.state is InstanceState.GONE
                and stored.body.host == self._here.name
                and self._here.mailbox.transfers.find(stored.body.operation) is None
            ):
                self._here.instances.remove(name)

    def _close(self, stored: record.Stored[model.Transfer]) -> None:
        """End a confirmed move: layers that kept the source's state are merged."""
        self._here.note_confirmed(stored.body.instance)
        if Arrival(self._here, stored).merge():
            self._here.mailbox.transfers.remove(stored.name)
