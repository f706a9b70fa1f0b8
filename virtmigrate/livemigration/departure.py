# SPDX-License-Identifier: Apache-2.0
"""The source's half of one live move, forwards."""

import time

import msgspec
from oslo_log import log as logging

from virtmigrate import errors, lending, model, node, record
from virtmigrate.backends import base
from virtmigrate.host import Host
from virtmigrate.instance import Power
from virtmigrate.journal import Journal
from virtmigrate.livemigration.domains import Domains
from virtmigrate.livemigration.steering import Steering
from virtmigrate.livemigration.terms import Outcome
from virtmigrate.migration import facts
from virtmigrate.model import InstanceState, TransferState
from virtmigrate.peer import Peer
from virtmigrate.progress import Progress
from virtmigrate.request import Verb

LOG = logging.getLogger(__name__)

OVER = (TransferState.TAKEN, TransferState.SETTLED)
"""States from which the peer has it for good."""


class Departure:
    """One live move, forwards. Every step can be run twice.

    Arguments:
        there: the peer, as a source of moves sees it.
        host: its libvirtd that runs guests.
    """

    def __init__(
        self,
        here: node.Node,
        journal: Journal,
        there: Peer,
        host: Host,
        progress: Progress,
    ) -> None:
        self._here = here
        self.journal = journal
        self._there = there
        self._host = host
        self._progress = progress
        self._original = facts.original(journal)
        self._transfer = facts.transfer(journal)
        self._uuid = self._original.uuid
        self._newest: record.Stored[model.Transfer] | None = None

    def prepare(self) -> model.Transfer:
        """Have the peer wait for it; return the transfer as the peer made it.

        A failure until here is not felt by the guest.
        """
        self._progress.phase("preparing")
        self.journal.done("reserving")
        cards = facts.cards(self.journal)
        self._there.reserve(self._transfer, cards, self._progress.check)
        self._there.act(self.journal.operation, Verb.EXPECT)
        stored = self._there.transfers.read(self.journal.operation)
        if stored.body.live is None or not stored.body.live.ready:
            raise self._failed("the peer does not wait for it")
        return stored.body

    def leave(self) -> None:
        """Let nobody start it here, and the peer alone beside this host take it."""
        self.journal.done("leaving")
        leaving = msgspec.structs.replace(
            self._original,
            state=InstanceState.LEAVING,
            operation=self.journal.operation,
            peer=self._transfer.peer,
        )
        self._here.publish_instance(leaving)
        # libvirt would start it with the host, and ask nobody.
        self._here.domains.forbid_autostart(self._uuid)
        self._here.tenures.announce(self._original, self._transfer.peer)

    def send(self, steering: Steering) -> None:
        """Have libvirt bring it to the peer, where it stands paused."""
        self._progress.check()
        self._there.renew(self.journal.operation)
        self._newest = self._there.transfers.read(self.journal.operation)
        # What is asked in the downtime goes by connections that are open.
        with self._host.session("waiting for it") as session:
            session.rest()
            self.journal.done("migrating")
            steering.run()

    def switch(self) -> float:
        """Give the right up, and let it go on there; return the seconds it took."""
        began = time.monotonic()
        self.give()
        given = time.monotonic()
        self.resume()
        ended = time.monotonic()
        self.journal.done("given")
        LOG.info(
            "operation=%s given in %.3f s, resumed in %.3f s",
            self.journal.operation,
            given - began,
            ended - given,
        )
        return ended - began

    def give(self) -> None:
        """Give the right up: the source's QEMU is gone, and its domain undefined.

        Raises HeldElsewhere: nothing was given. HostError, RecordConflict: the transfer
        decides who has it.
        """
        # What another host has taken over is not this one's to give.
        self._here.tenures.demand(self._original)
        self.journal.done("giving")
        transfers = self._there.transfers
        # Nobody changes it but who ends the move: what was read before is tried first.
        stored = self._newest or transfers.read(self.journal.operation)
        self._newest = None
        if stored.body.state not in OVER:
            if stored.body.state is not TransferState.RESERVED:
                raise self._failed(f"the transfer is {stored.body.state.value}")
            taken = msgspec.structs.replace(stored.body, state=TransferState.TAKEN)
            transfers.follow(stored, taken)

    def resume(self) -> None:
        """Let the guest go on at the peer; what fails here the peer's settle does."""
        if self._original.power != Power.RUNNING.value:
            return
        try:
            Domains(self._host).unpause(self._uuid)
        except errors.Error as e:
            LOG.warning("operation=%s not resumed: %s", self.journal.operation, e)

    def finish(self) -> str:
        """Let the peer settle, then remove what is left here; return what is owed."""
        try:
            if owed := self._settle():
                return f"{self._transfer.peer} has it, and has not settled: {owed}"
            self._remove_ours()
            self._there.forget(self.journal.operation)
        except errors.Error as e:
            # It runs there: what is left here is a debt, and no failed move.
            return str(e)
        self.journal.close()
        LOG.info(
            "operation=%s instance=%s is on %s",
            self.journal.operation,
            self._uuid,
            self._transfer.peer,
        )
        return ""

    def outcome(self, seconds: float, switching: float) -> Outcome:
        """Return what the move was."""
        downtime, sent = 0.0, 0
        try:
            downtime, sent = Domains(self._host).measured(self._uuid)
        except errors.Error as e:
            LOG.debug("operation=%s no figures: %s", self.journal.operation, e)
        return Outcome(self.journal.operation, seconds, downtime + switching, sent)

    # Private

    def _failed(self, reason: str) -> errors.MigrationError:
        return errors.MigrationError(
            instance=self._uuid, operation=self.journal.operation, reason=reason
        )

    def _settle(self) -> str:
        operation = self.journal.operation
        stored = self._there.transfer(operation)
        if stored is not None and stored.body.state is TransferState.TAKEN:
            self._there.act(operation, Verb.ARRIVE)
            stored = self._there.transfer(operation)
        if stored is None:
            # Only this host removes it, after it was settled.
            settled = self.journal.has("settled")
            return "" if settled else "its transfer is gone there; what is here stays"
        if stored.body.state is not TransferState.SETTLED:
            return f"the transfer is {stored.body.state.value}"
        self.journal.done("settled")
        return ""

    def _remove_ours(self) -> None:
        """Remove domain, volumes and, last, the record.

        Where that record is gone, or another move's, nothing is left of this one: what
        is here came back since.
        """
        own = self._here.own_record(self._uuid)
        if own is None or own.operation != self.journal.operation:
            return
        # One that libvirt started with the host is not the one that goes on there.
        self._here.domains.kill(self._uuid)
        self._here.domains.undefine(self._uuid)
        backends = set()
        for volume in self._transfer.volumes:
            if not volume.shared:
                backend = facts.source_of(self._here, self._original, volume)
                backends.add(backend.name)
                self._remove_from(backend, volume.source)
        self._here.tenures.drop(self._uuid, backends)
        self._here.instances.remove(self._uuid)

    def _remove_from(self, backend: base.Backend, top: str) -> None:
        """Remove what is left of a disk; what others stand on is theirs from now on."""
        timeout = self._here.options.lock_timeout
        with lending.settled(backend, self._uuid, timeout) as kept:
            for each in self._left(backend.name, top):
                if each not in kept:
                    backend.remove(each)

    def _left(self, backend: str, top: str) -> list[str]:
        """Return what this instance has still here of a disk, the lowest first."""
        volumes = self._here.backend(backend).volumes
        found: list[str] = []
        name: str | None = top
        while name is not None and (stored := volumes.find(name)):
            if stored.body.owner == self._uuid:
                found.insert(0, name)
            name = stored.body.backing
        return found
