# SPDX-License-Identifier: Apache-2.0
"""The host that an instance comes to: take the right, import, settle; give back.

There is no journal here: the transfer's record, in this host's own mailbox, says
how far it is, and each step looks whether it is done.
"""

import math
import time
from collections.abc import Callable

import msgspec
from oslo_log import log as logging

from virtmigrate import domainxml, errors, model, node, peer, record
from virtmigrate.instance import Power
from virtmigrate.migration import ticket
from virtmigrate.migration.arrival import (
    RUNS_HERE,
    Arrival,
    complete,
    gave_to_itself,
)
from virtmigrate.model import InstanceState, TransferState
from virtmigrate.request import Verb

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
        self._finish_of(given, power_on=power_on, interfaces=interfaces)

    def actions(self) -> dict[Verb, Callable[[model.Transfer], object]]:
        """Return what a source may have done here, where `accept_moves` says so."""
        if not self._here.options.accept_moves:
            return {}
        return {
            Verb.FINISH: lambda transfer: self._finish_of(ticket.of(transfer)),
            Verb.GIVE_BACK: self._give_back_of,
        }

    def held(self, uuid: str) -> record.Stored[model.Transfer] | None:
        """Return the unconfirmed transfer that brought the instance here."""
        return next(iter(self._all_held(uuid)), None)

    def give_back(self, uuid: str) -> bool:
        """Give an unconfirmed instance back: no domain, no right, no volumes here.

        Returns False when there is no such transfer. Can be called again.
        """
        held = self._all_held(uuid)
        for stored in held:
            self._return(stored)
        return bool(held)

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
        """Return the cold transfers in this host's mailbox."""
        found = self._here.mailbox.open_transfers()
        return [each for each in found if each.body.live is None]

    # Private

    def _give_back_of(self, transfer: model.Transfer) -> None:
        """Give the instance of this transfer back; no other that is like it."""
        with self._here.claimed(transfer.instance):
            for stored in self._all_held(transfer.instance):
                if stored.name == transfer.operation:
                    self._return(stored)

    def _all_held(self, uuid: str) -> Transfers:
        of_it = [each for each in self.transfers() if each.body.instance == uuid]
        return [each for each in of_it if self._is_held(each)]

    def _is_held(self, stored: record.Stored[model.Transfer]) -> bool:
        """Tell whether this host may give the instance of a transfer back."""
        if stored.body.state not in peer.HELD:
            return False
        if self._may_return(stored.body):
            return True
        LOG.warning(
            "transfer=%r of instance=%r says %s, and this host did not note that it "
            "came by it: passed over",
            stored.name,
            stored.body.instance,
            stored.body.state.value,
        )
        return False

    def _may_return(self, transfer: model.Transfer) -> bool:
        """Tell whether nothing else than this transfer brought what is here.

        Its state alone proves nothing: a peer can write it. Taken and not noted yet,
        or given back and not said so yet: then there is no domain.
        """
        own = self._here.own_record(transfer.instance)
        untaken = own is not None and gave_to_itself(own, transfer.operation)
        if own is None or own.state is InstanceState.GONE or untaken:
            return not self._here.domains.exists(transfer.instance)
        return self._has_arrived(transfer)

    def _has_arrived(self, transfer: model.Transfer) -> bool:
        """Tell whether this host noted that the instance came by this transfer."""
        own = self._here.own_record(transfer.instance)
        return own is not None and (own.operation, own.state) == (
            transfer.operation,
            InstanceState.ARRIVED,
        )

    def _has_gone(self, transfer: model.Transfer) -> model.Instance | None:
        """Return the note that the instance of this transfer was given back."""
        own = self._here.own_record(transfer.instance)
        gone = transfer.operation, InstanceState.GONE
        return own if own and (own.operation, own.state) == gone else None

    def _drop_tenures(self, transfer: model.Transfer) -> None:
        """Where there were only copies, nobody has anything to run any more."""
        sent = {each.backend for each in transfer.volumes if not each.shared}
        sent -= {each.backend for each in transfer.volumes if each.shared}
        if transfer.source != self._here.name:
            self._here.tenures.drop(transfer.instance, sent)

    def _return(self, stored: record.Stored[model.Transfer]) -> None:
        """Give back what a transfer brought; only what this host noted is stopped."""
        if stored.body.state is not TransferState.RETURNING:
            # Won before anything is taken away: from here it can't be confirmed.
            stored = self._publish(stored, TransferState.RETURNING)
        if self._has_arrived(stored.body):
            self._here.domains.kill(stored.body.instance)
            self._here.domains.undefine(stored.body.instance)
            gone = self._say_gone(stored.body)
            self._here.tenures.pass_on(gone, stored.body.source)
        elif noted := self._has_gone(stored.body):
            # A killed attempt may not have come as far as this.
            self._here.tenures.pass_on(noted, stored.body.source)
        else:
            self._here.forget_unborn(stored.body.instance)
        Arrival(self._here, stored).remove_volumes()
        self._drop_tenures(stored.body)
        self._publish(stored, TransferState.RETURNED)
        LOG.info(
            "operation=%s instance=%s given back to %s",
            stored.name,
            stored.body.instance,
            stored.body.source,
        )

    def _finish_of(
        self,
        given: ticket.Ticket,
        *,
        power_on: bool = True,
        interfaces: tuple[domainxml.Interface, ...] = (),
    ) -> None:
        """Take the instance of a ticket: the caller's, or one of what lies here."""
        with self._here.claimed(given.instance):
            stored = self._here.mailbox.transfers.find(given.operation)
            if stored is None:
                raise self._not_ours(
                    given.instance, f"operation {given.operation} is not known"
                )
            self._demand_same(stored.body, given)
            Arrival(self._here, stored).demand_whole()
            taken = self._take(stored, power_on=power_on, interfaces=interfaces)
            Arrival(self._here, taken).settle()

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

    def _say_gone(self, transfer: model.Transfer) -> model.Instance:
        noted = self._here.instances.read(transfer.instance).body
        gone = msgspec.structs.replace(noted, state=InstanceState.GONE)
        self._here.publish_instance(gone)
        return gone

    def _recover(self, stored: record.Stored[model.Transfer]) -> None:
        state, age = stored.body.state, self._age(stored)
        limit = float(self._here.options.reclaim_age)
        given = stored.body.generation > 0
        if state is TransferState.TAKEN:
            self._go_on(stored)
        elif state is TransferState.CONFIRMED:
            self._close(stored)
        elif state is TransferState.RETURNING and self._is_held(stored):
            self._return(stored)
        elif state is TransferState.RESERVED and age > limit:
            LOG.warning("operation=%s given up: its source is silent", stored.name)
            self._publish(stored, TransferState.WITHDRAWN)
            Arrival(self._here, stored).remove_volumes()
        elif state is TransferState.WITHDRAWN and age > 2 * limit and not given:
            # One that was given stays: it is its source's proof of the withdrawal.
            self._here.mailbox.transfers.remove(stored.name)

    def _age(self, stored: record.Stored[model.Transfer]) -> float:
        """Return the seconds since the record was made.

        A source can say that this will be in the future; when its volume was written
        is what this host saw.
        """
        written = self._here.mailbox.transfers.written(stored)
        return time.time() - min(stored.body.created, written or math.inf)

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
        # What is claimed is the instance that the caller named.
        same = same and ours.instance == given.instance
        if transfer.state is TransferState.GIVEN:
            same = same and ours.record == given.record
        if not same:
            raise errors.TicketDamaged(
                reason="its instance, source or digests are not those of the transfer"
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
