# SPDX-License-Identifier: Apache-2.0
"""The host that an instance leaves: copy, hand over; undo, confirm, revert.

Steps in the journal of a departure:

    begun       what the instance was; nothing is touched yet. A second one begins
                the operation anew: the steps before it count no more
    reserving   the transfer's record may stand at the peer
    preparing   incoming volumes may be at the peer
    sending     bytes may be in them
    stopping    the guest may be off, the domain undefined
    freezing    layers may stand over shared disks
    copying     one per volume, when its copy is proven
    giving      the right may be given up
    given       it is; the ticket
    returned    the caller was told
    lost        another host took the instance over; nothing is put back
    restored    the instance is back, or lost; what is left is owed at the peer
    parked      what was sent stays there for a while, for the next attempt
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
from virtmigrate.migration.undo import BACK, Undo, is_parked
from virtmigrate.peer import Peer
from virtmigrate.progress import Progress

LOG = logging.getLogger(__name__)

KIND = "departure"

_ENDED = ("lost", "restored")
"""Steps after which the caller has nothing to decide any more."""


class Source:
    """Departures from this host. Safe to share between threads.

    Arguments:
        here: this host.
        connect: makes the Peer of a `dest`.
        demand_no_move: raises InvalidState while a live move of an instance is open.
    """

    def __init__(
        self,
        here: node.Node,
        connect: Callable[[str], Peer],
        demand_no_move: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._here = here
        self._connect = connect
        self._demand_no_move = demand_no_move

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
                    self._undo(journal, park=True)
            self._demand_no_live(request.instance)
            progress.phase("waiting for other moves")
            try:
                with self._here.sending(progress):
                    return self._move(request, progress)
            except errors.HostBusy as e:
                raise errors.MigrationRefused(
                    instance=request.instance, reason=str(e)
                ) from e

    def _demand_no_live(self, uuid: str) -> None:
        try:
            self._demand_no_move(uuid)
        except errors.InvalidState as e:
            raise errors.MigrationRefused(instance=uuid, reason=str(e)) from e

    def confirm(self, uuid: str, *, accept_unproven: bool = False) -> None:
        """Give the source's volumes up for good; nothing happens without a move.

        Raises NotConfirmable while the peer has not proven that it has the
        instance, durable; also when not all of the copy was compared, unless
        accept_unproven says that this risk is taken.
        """
        with self._here.claimed(uuid):
            journal = self._find(uuid)
            if journal is None or not journal.has("given"):
                self._demand_none_away(uuid)
                LOG.info("instance=%s nothing to confirm on %s", uuid, self._here.name)
                return
            self._confirm(journal, accept_unproven=accept_unproven)

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

    def demand_none(self, uuid: str) -> None:
        """Raise InvalidState while a move of the instance is open on this host.

        Also one that is half undone: its record says that the instance is here.
        """
        journal = self._find(uuid)
        if journal is not None:
            raise errors.InvalidState(
                instance=uuid,
                host=self._here.name,
                state=journal.steps()[-1],
                reason=f"operation {journal.operation} is open; confirm or revert it "
                "first",
            )

    def recover(self) -> list[str]:
        """Finish what a killed process left; return what could not be finished.

        A move whose ticket was given to the caller stays: the caller decides.
        """
        left = []
        for journal in self._journals():
            uuid = facts.original(journal).uuid
            try:
                with self._here.claimed(uuid):
                    owed = self._recover_now(journal.operation)
                if owed:
                    left.append(f"{journal.operation}: {owed}")
            except Exception as e:
                # One that cannot be finished must not keep the host from the others.
                LOG.warning("operation=%s instance=%s: %s", journal.operation, uuid, e)
                left.append(f"{journal.operation}: {e}")
        return left

    def write_off(self, operation: str, *, peer_is_lost: bool = False) -> str:
        """Forget what a move that was undone still owes at its peer.

        Volumes that are left there are its own to reclaim. The move of an instance that
        a third host took over is ended first, and its debts are paid; returns those
        that could not be. Raises MigrationError unless the instance is back here, or
        taken over, and the peer can never take it any more.

        Arguments:
            peer_is_lost: an operator's word that the peer, which cannot be asked,
                never comes back: with one that does, there could be two.
        """
        for journal in self._journals():
            if journal.operation == operation:
                with self._here.claimed(facts.original(journal).uuid):
                    return self._write_off(journal, peer_is_lost)
        raise errors.MigrationError(
            instance="?", operation=operation, reason="this host has no such move open"
        )

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

    def _move(self, request: plan.Request, progress: Progress) -> str:
        progress.phase("checking")
        there = self._connect(request.dest)
        parked = self._parked(request, there)
        operation = parked.operation if parked else None
        planned = plan.make(self._here, there, request, operation)
        if parked is not None:
            self._drop_stale(parked, planned, there)
        journal = self._begin(planned, request, parked)
        return self._run(Departure(self._here, journal, there, progress), request)

    @staticmethod
    def _drop_stale(parked: Journal, planned: plan.Plan, there: Peer) -> None:
        """Remove what the first attempt sent and the second one does not need."""
        cards = facts.cards(parked)
        needed = {
            (v.name, planned.cards[v.backend].incoming)
            for v in planned.transfer.volumes
        }
        for volume in facts.transfer(parked).volumes:
            card = cards[volume.backend]
            if not volume.shared and (volume.name, card.incoming) not in needed:
                there.remove(card, volume.name)

    def _parked(self, request: plan.Request, there: Peer) -> Journal | None:
        """Return the journal of a failed move whose copies can be gone on with."""
        try:
            return self._find_parked(request, there)
        except errors.HostError as e:
            raise errors.MigrationRefused(instance=request.instance, reason=e) from e

    def _find_parked(self, request: plan.Request, there: Peer) -> Journal | None:
        for journal in self._journals():
            same = facts.original(journal).uuid == request.instance
            dest = facts.facts(journal, "begun")["dest"]
            if same and dest == request.dest and is_parked(journal):
                stored = there.transfer(journal.operation)
                if stored and stored.body.state is model.TransferState.RESERVED:
                    return journal
        return None

    def _write_off(self, journal: Journal, peer_is_lost: bool) -> str:
        undo = Undo(self._here, journal, self._peer_of)
        if not journal.has("restored") and undo.is_lost():
            LOG.warning("operation=%s its instance was taken over", journal.operation)
            return undo.give_up(peer_is_lost=peer_is_lost)
        reason = ""
        if not journal.has("restored"):
            reason = f"its newest step is {journal.steps()[-1]}; confirm or revert it"
        elif journal.has("abandoned") and not peer_is_lost:
            reason = self._still_owed(journal)
        if reason:
            raise errors.MigrationError(
                instance=facts.original(journal).uuid,
                operation=journal.operation,
                reason=f"it owes more than a clean-up: {reason}",
            )
        journal.close()
        LOG.warning("operation=%s its debt is written off", journal.operation)
        return ""

    def _still_owed(self, journal: Journal) -> str:
        """Return why the peer might take an instance that was taken back from it."""
        try:
            stored = self._peer_of(journal).transfer(journal.operation)
        except errors.HostError as e:
            return f"the peer might come back and take the instance ({e})"
        if stored is None:
            return "the peer has lost the record of the transfer, and may run it"
        if stored.body.state in BACK:
            return ""
        return f"the peer has it (the transfer is {stored.body.state.value})"

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

    def _confirm(self, journal: Journal, *, accept_unproven: bool = False) -> None:
        there = self._peer_of(journal)
        departure = Departure(self._here, journal, there, Progress())
        departure.confirm(accept_unproven=accept_unproven)

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

    def _begin(
        self, planned: plan.Plan, request: plan.Request, parked: Journal | None
    ) -> Journal:
        begun = {
            "kind": KIND,
            "instance": request.instance,
            "dest": request.dest,
            "request": request.request,
            "original": msgspec.json.encode(planned.original).decode(),
            "transfer": msgspec.json.encode(planned.transfer).decode(),
            "cards": msgspec.json.encode(planned.cards).decode(),
            "memory": request.memory or planned.original.memory,
            "vcpus": request.vcpus or planned.original.vcpus,
            # What an earlier attempt left at the peer is there already.
            "reserved": parked is not None,
        }
        if parked is not None:
            parked.begin_again(**begun)
            return parked
        operation = planned.transfer.operation
        return Journal.create(self._here.journals, operation, **begun)

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
        cancelled = isinstance(error, errors.Cancelled)
        debts = self._undo(journal, park=not cancelled)
        if not isinstance(error, Exception):
            return
        owed = f"; still owed at the peer: {debts}" if debts else ""
        if journal.has("parked"):
            owed += "; what was sent waits there for the next attempt"
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
        self,
        journal: Journal,
        *,
        power_on: bool = True,
        peer_is_lost: bool = False,
        park: bool = False,
    ) -> str:
        undo = Undo(self._here, journal, self._peer_of)
        return undo.run(power_on=power_on, peer_is_lost=peer_is_lost, park=park)

    def _recover_now(self, operation: str) -> str:
        """Recover what is left now: who held the claim until now went on with it.

        Returns what is owed at the peer.
        """
        for journal in self._journals():
            if journal.operation == operation:
                return self._recover(journal)
        return ""

    def _recover(self, journal: Journal) -> str:
        if journal.has("confirmed"):
            self._confirm(journal)
        elif wish := journal.facts("reverting"):
            return self._undo(journal, power_on=bool(wish["power_on"]))
        elif any(map(journal.has, _ENDED)) or not journal.has("returned"):
            return self._undo(journal, park=True)
        return ""
