# SPDX-License-Identifier: Apache-2.0
"""The source's way back, or on: what a live move that was cut short becomes.

Before `giving` this host decides alone. After it the transfer does. What another host
has taken over meanwhile goes on neither here nor there.
"""

from collections.abc import Callable

import msgspec
from oslo_log import log as logging

from virtmigrate import errors, model, node, record
from virtmigrate.host import Host
from virtmigrate.instance import Power
from virtmigrate.journal import Journal
from virtmigrate.livemigration.departure import OVER, Departure
from virtmigrate.livemigration.domains import Copy, Domains
from virtmigrate.migration import facts
from virtmigrate.model import TransferState
from virtmigrate.peer import Peer
from virtmigrate.progress import Progress
from virtmigrate.request import Verb

LOG = logging.getLogger(__name__)

_TRIES = 5
"""Times that the transfer is looked at again after somebody else changed it."""


class Undoing:
    """Ends one live move that did not come to its end. Can run twice.

    Arguments:
        connect, reach: make the peer of a move, and its host, by its name.
    """

    def __init__(
        self,
        here: node.Node,
        journal: Journal,
        connect: Callable[[str], Peer],
        reach: Callable[[str], Host],
    ) -> None:
        self._here = here
        self._journal = journal
        self._connect = connect
        self._reach = reach
        self._original = facts.original(journal)
        self._transfer = facts.transfer(journal)
        self._uuid = self._original.uuid
        self._domains = Domains(here.host)

    def run(self) -> str:
        """Undo or finish it; return what is still owed at the peer.

        `has_gone` says afterwards which of the two it was. Raises MigrationUndecided:
        its guest, if there is one, stands paused at the peer.
        """
        restored = self._journal.has("restored")
        if not restored and (self.has_gone or not self._put_back()):
            return self._departure().finish()
        return self._withdraw_later()

    @property
    def has_gone(self) -> bool:
        """Tell whether the peer has it for good."""
        return self._journal.has("given")

    # Private

    def _departure(self) -> Departure:
        dest = self._transfer.peer
        return Departure(
            self._here,
            self._journal,
            self._connect(dest),
            self._reach(dest),
            Progress(),
        )

    def _put_back(self) -> bool:
        """Make it what it was here; False when the peer has it now."""
        if not self._journal.has("giving") and self._is_lost():
            self._give_up()
            return True
        if self._journal.has("giving") or not self._is_here():
            return self._decide()
        self._restore(start=False)
        return True

    def _is_here(self) -> bool:
        """Tell whether its QEMU is, once libvirt is done with it; let it go on."""
        if not self._journal.has("migrating"):
            return True
        if self._domains.exists(self._uuid):
            self._domains.end_job(self._uuid)
        if self._domains.copy(self._uuid) is Copy.NONE:
            return self._domains.ended_by_itself(self._uuid)
        if self._original.power == Power.RUNNING.value:
            self._domains.go_on(self._uuid)
        return True

    def _decide(self) -> bool:
        """Its QEMU is gone from here: the transfer decides; False if for the peer."""
        if not self._journal.has("taken back"):
            self._journal.done("giving")
            # Nobody else may define it while that is open, or start it.
            self._domains.kill(self._uuid)
            self._domains.undefine(self._uuid)
            if self._is_given():
                return False
            self._journal.done("taken back")
        if self._is_lost():
            self._give_up()
        else:
            self._restore(start=True)
        return True

    def _is_lost(self) -> bool:
        """Tell whether a host that is not of this move took the instance over."""
        if self._journal.has("lost") or not self._journal.has("leaving"):
            return self._journal.has("lost")
        return self._here.tenures.is_lost(self._original, self._transfer.peer)

    def _give_up(self) -> None:
        """Turn it off, and remove what this host knows of it; its disks stay."""
        self._journal.done("lost")
        LOG.error(
            "operation=%s instance=%s is turned off: another host took it over",
            self._journal.operation,
            self._uuid,
        )
        self._domains.kill(self._uuid)
        self._domains.undefine(self._uuid)
        own = self._here.own_record(self._uuid)
        if own is not None and own.operation == self._journal.operation:
            self._here.instances.remove(self._uuid)
        self._here.tenures.renounce(self._uuid, self._here.up())
        self._journal.done("restored")

    def _is_given(self) -> bool:
        """Win the transfer for the side that has the guest."""
        for _ in range(_TRIES):
            try:
                stored = self._stored()
                if stored.body.state in OVER:
                    self._journal.done("given")
                    return True
                if stored.body.state is TransferState.WITHDRAWN:
                    return False
                if not self._is_lost() and self._is_whole_there():
                    self._departure().switch()
                    return True
                self._publish_withdrawn(stored)
                return False
            except errors.RecordConflict:
                LOG.info("operation=%s the peer was first", self._journal.operation)
            except (errors.HostError, errors.StorageError) as e:
                raise self._undecided(str(e)) from e
        raise self._undecided("its record is changed all the time")

    def _undecided(self, reason: str) -> errors.MigrationUndecided:
        return errors.MigrationUndecided(
            instance=self._uuid,
            operation=self._journal.operation,
            peer=self._transfer.peer,
            reason=reason,
        )

    def _stored(self) -> record.Stored[model.Transfer]:
        there = self._connect(self._transfer.peer)
        return there.transfers.read(self._journal.operation)

    def _is_whole_there(self) -> bool:
        there = Domains(self._reach(self._transfer.peer))
        return there.copy(self._uuid) is Copy.WHOLE

    def _publish_withdrawn(self, stored: record.Stored[model.Transfer]) -> None:
        body = msgspec.structs.replace(stored.body, state=TransferState.WITHDRAWN)
        transfers = self._connect(self._transfer.peer).transfers
        transfers.publish(stored.name, body, after=stored.generation)

    def _restore(self, *, start: bool) -> None:
        """Make record, tenure and domain what they were.

        Arguments:
            start: its guest is lost, and is started anew from its disks.
        """
        if self._journal.has("leaving"):
            self._here.tenures.announce(self._original, None)
            back = msgspec.structs.replace(
                self._original, domain_xml=None, operation=self._journal.operation
            )
            self._here.publish_instance(back)
        autostart = self._original.autostart and not self._here.tenures.concern(
            self._original
        )
        if start and not self._here.domains.is_defined(self._uuid):
            self._here.domains.define(
                str(self._original.domain_xml), autostart=autostart
            )
        elif autostart and self._journal.has("leaving"):
            # It would have been started with the host, but for this move.
            start = start or self._is_off_with_the_host()
            self._here.domains.allow_autostart(self._uuid)
        if start:
            LOG.error(
                "operation=%s instance=%s its memory is lost: started anew",
                self._journal.operation,
                self._uuid,
            )
            self._here.start(self._uuid)
        self._journal.done("restored")

    def _is_off_with_the_host(self) -> bool:
        """Tell whether it is off because its host was."""
        is_off = self._domains.is_off(self._uuid)
        return is_off and not self._domains.ended_by_itself(self._uuid)

    def _withdraw_later(self) -> str:
        """Have the peer forget it; what fails stays owed."""
        try:
            if self._journal.has("reserving"):
                self._withdraw()
        except errors.Error as e:
            LOG.warning("operation=%s owed: %s", self._journal.operation, e)
            return str(e)
        self._journal.close()
        return ""

    def _withdraw(self) -> None:
        there, operation = self._connect(self._transfer.peer), self._journal.operation
        stored = there.transfer(operation)
        if stored is None:
            there.forget(operation)
            return
        if stored.body.state is TransferState.RESERVED:
            self._publish_withdrawn(stored)
        try:
            there.act(operation, Verb.CALL_OFF)
        except (errors.RequestRefused, errors.ReceiverSilent) as e:
            # Its settle finds it withdrawn.
            LOG.info("operation=%s cleans up there later: %s", operation, e)
