# SPDX-License-Identifier: Apache-2.0
"""The host that an instance leaves: copy, hand over; undo, confirm, revert.

Steps in the journal of a departure:

    begun       what the instance was; nothing is touched yet
    reserving   the transfer's record may stand at the peer
    stopping    the guest may be off, the domain undefined
    freezing    layers may stand over shared disks
    copying     one per volume, when its copy is proven
    giving      the right may be given up
    given       it is; the ticket
    returned    the caller was told
    restored    the instance is back; what is left is owed at the peer
    reverting   the caller wants it back, and the peer could not be asked
    abandoned   an operator said that the peer, which can't be asked, is lost
    taken back  the right is here again
    confirming  the caller wants to give it up for good
    confirmed   it never comes back; what is left is to remove its volumes here
"""

from collections.abc import Callable, Iterator

import msgspec
from oslo_log import log as logging

from virtmigrate import errors, model, node
from virtmigrate.journal import Journal, load_all
from virtmigrate.migration import facts, plan
from virtmigrate.migration.departure import Departure
from virtmigrate.migration.undo import Undo
from virtmigrate.peer import Peer
from virtmigrate.progress import Progress

LOG = logging.getLogger(__name__)

KIND = "departure"


class Source:
    """Departures from this host. Safe to share between threads.

    Arguments:
        here: this host.
        connect: makes the Peer of a `dest`.
    """

    def __init__(self, here: node.Node, connect: Callable[[str], Peer]) -> None:
        self._here = here
        self._connect = connect

    def migrate(self, request: plan.Request, progress: Progress) -> str:
        """Move the instance to request.dest and return the ticket.

        Can be called again: a move that was handed over gives its ticket again,
        one that was interrupted is undone first.

        Raises MigrationRefused (nothing was touched), MigrationRolledBack (all
        is as it was), MigrationUndecided (the peer went away in the hand-over).
        """
        with self._here.claimed(request.instance):
            journal = self._find(request.instance)
            if journal is not None:
                if journal.has("confirming"):
                    self._confirm(journal)
                elif journal.has("given"):
                    return self._again(journal, request)
                else:
                    self._undo(journal)
            progress.phase("checking")
            there = self._connect(request.dest)
            planned = plan.make(self._here, there, request)
            journal = self._begin(planned, request)
            return self._run(Departure(self._here, journal, there, progress), request)

    def confirm(self, uuid: str) -> None:
        """Give the source's volumes up for good; nothing happens without a move.

        Raises NotConfirmable while the peer has not proven that it has the
        instance, durable.
        """
        with self._here.claimed(uuid):
            journal = self._find(uuid)
            if journal is None or not journal.has("given"):
                self._demand_none_away(uuid)
                LOG.info("instance=%s nothing to confirm on %s", uuid, self._here.name)
                return
            self._confirm(journal)

    def revert(
        self, uuid: str, *, power_on: bool = True, peer_is_lost: bool = False
    ) -> None:
        """Take the instance back after the peer gave it back, or before it took it.

        Can be called at any time, from any half-done state. Raises NotRevertible
        while the peer has it, MigrationUndecided when the peer can't be asked,
        unless an operator says, by peer_is_lost, that it never runs it again.
        """
        with self._here.claimed(uuid):
            journal = self._find(uuid)
            if journal is None:
                self._here.entitled(uuid)
                return
            try:
                self._undo(journal, power_on=power_on, peer_is_lost=peer_is_lost)
            except errors.MigrationUndecided:
                journal.done("reverting", power_on=power_on)
                raise

    def recover(self) -> list[str]:
        """Finish what a killed process left; return what could not be finished.

        A move whose ticket was given to the caller stays: the caller decides.
        """
        left = []
        for journal in self._journals():
            uuid = facts.original(journal).uuid
            try:
                with self._here.claimed(uuid):
                    self._recover_now(journal.operation)
            except Exception as e:
                # One that cannot be finished must not keep the host from the others.
                LOG.warning("operation=%s instance=%s: %s", journal.operation, uuid, e)
                left.append(f"{journal.operation}: {e}")
        return left

    def open_operations(self) -> list[tuple[str, str, str, str]]:
        """Return (operation, instance, peer, newest step) of what is not over."""
        return [
            (
                j.operation,
                facts.original(j).uuid,
                facts.facts(j, "begun")["dest"],
                j.steps()[-1],
            )
            for j in self._journals()
        ]

    # Private

    def _journals(self) -> Iterator[Journal]:
        for journal in load_all(self._here.journals):
            if facts.facts(journal, "begun").get("kind") == KIND:
                yield journal

    def _find(self, uuid: str) -> Journal | None:
        """Return the journal that decides about the instance, if one does."""
        for journal in self._journals():
            if facts.original(journal).uuid == uuid and not journal.has("restored"):
                return journal
        return None

    def _demand_none_away(self, uuid: str) -> None:
        stored = self._here.instances.find(uuid)
        away = (model.InstanceState.AWAY, model.InstanceState.LEAVING)
        if stored and stored.body.host == self._here.name and stored.body.state in away:
            raise errors.NotConfirmable(
                instance=uuid,
                operation=stored.body.operation,
                reason="its record says that it left, and there is no journal of it",
            )

    def _confirm(self, journal: Journal) -> None:
        there = self._peer_of(journal)
        Departure(self._here, journal, there, Progress()).confirm()

    def _peer_of(self, journal: Journal) -> Peer:
        return self._connect(str(facts.facts(journal, "begun")["dest"]))

    def _again(self, journal: Journal, request: plan.Request) -> str:
        dest = facts.facts(journal, "begun")["dest"]
        if dest != request.dest:
            raise errors.MigrationRefused(
                instance=request.instance,
                reason=f"it was handed over to {dest} by operation "
                f"{journal.operation}; confirm or revert that first",
            )
        journal.done("returned")
        return str(facts.facts(journal, "given")["ticket"])

    def _begin(self, planned: plan.Plan, request: plan.Request) -> Journal:
        return Journal.create(
            self._here.journals,
            planned.transfer.operation,
            kind=KIND,
            instance=request.instance,
            dest=request.dest,
            request=request.request,
            original=msgspec.json.encode(planned.original).decode(),
            transfer=msgspec.json.encode(planned.transfer).decode(),
            card=msgspec.json.encode(planned.card).decode(),
            memory=request.memory or planned.original.memory,
            vcpus=request.vcpus or planned.original.vcpus,
        )

    def _run(self, departure: Departure, request: plan.Request) -> str:
        try:
            return departure.run(request.timeout, request.retry_interval)
        except BaseException as e:
            self._roll_back(departure.journal, e)
            raise

    def _roll_back(self, journal: Journal, error: BaseException) -> None:
        """Undo, and raise MigrationRolledBack from what went wrong."""
        original = facts.original(journal)
        LOG.warning("operation=%s rolling back: %r", journal.operation, error)
        debts = self._undo(journal)
        if not isinstance(error, Exception):
            return
        owed = f"; still owed at the peer: {debts}" if debts else ""
        reason = str(error) or "it was cancelled"
        if not journal.has("stopping"):
            raise errors.MigrationRefused(
                instance=original.uuid, reason=reason + owed
            ) from error
        raise errors.MigrationRolledBack(
            instance=original.uuid,
            operation=journal.operation,
            reason=reason,
            state=original.power,
            host=self._here.name,
            debts=owed,
        ) from error

    def _undo(
        self, journal: Journal, *, power_on: bool = True, peer_is_lost: bool = False
    ) -> str:
        undo = Undo(self._here, journal, self._peer_of)
        return undo.run(power_on=power_on, peer_is_lost=peer_is_lost)

    def _recover_now(self, operation: str) -> None:
        """Recover what is left now: who held the claim until now went on with it."""
        for journal in self._journals():
            if journal.operation == operation:
                self._recover(journal)

    def _recover(self, journal: Journal) -> None:
        if journal.has("confirmed"):
            self._confirm(journal)
        elif wish := journal.facts("reverting"):
            self._undo(journal, power_on=bool(wish["power_on"]))
        elif journal.has("restored") or not journal.has("returned"):
            self._undo(journal)
