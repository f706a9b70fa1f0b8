# SPDX-License-Identifier: Apache-2.0
"""Put an instance back where it was, and remove what its move made."""

import time
from collections.abc import Callable

import msgspec
from oslo_log import log as logging

from virtmigrate import errors, model, node, record, scratch
from virtmigrate.instance import Power
from virtmigrate.journal import Journal
from virtmigrate.migration import facts
from virtmigrate.model import TransferState, VolumeState
from virtmigrate.peer import Peer

LOG = logging.getLogger(__name__)

BACK = (TransferState.RETURNED, TransferState.WITHDRAWN)
TAKEN = (
    TransferState.TAKEN,
    TransferState.SETTLED,
    TransferState.RETURNING,
    TransferState.CONFIRMED,
)


def is_parked(journal: Journal) -> bool:
    """Tell whether what a failed move sent waits at the peer for another attempt."""
    parked = journal.facts("parked")
    return parked is not None and time.time() < float(parked["until"])


class Undo:
    """Puts an instance back and removes what its move made; can run twice."""

    def __init__(
        self, here: node.Node, journal: Journal, connect: Callable[[Journal], Peer]
    ) -> None:
        self._here = here
        self._journal = journal
        self._connect = connect
        self._original = facts.original(journal)
        self._transfer = facts.transfer(journal)

    def run(
        self, *, power_on: bool, peer_is_lost: bool = False, park: bool = False
    ) -> str:
        """Undo; return what is still owed at the peer, "" when nothing is.

        Arguments:
            park: leave what was sent at the peer for `resume_age` seconds, for the
                next attempt to go on with.

        Raises MigrationUndecided, NotRevertible: nothing was done.
        """
        if self._journal.has("confirmed"):
            raise self._not_revertible("it is confirmed")
        if not self._journal.has("restored"):
            if self._journal.has("lost"):
                return self.give_up()
            try:
                self._put_back(power_on, peer_is_lost)
            except errors.HeldElsewhere as e:
                raise self._not_revertible(
                    f"{e.holder} took the instance over, and nothing is put back here. "
                    f"`virtmigrate host write-off {self._journal.operation}` ends this "
                    "move"
                ) from e
            if park and self._is_worth_parking():
                until = time.time() + float(self._here.options.resume_age)
                self._journal.done("parked", until=until)
        if is_parked(self._journal):
            return ""
        return self._clean_peer()

    def is_lost(self) -> bool:
        """Tell whether a host that is not of this move took the instance over."""
        is_open = self._journal.has("stopping") and not self._journal.has("confirmed")
        peer = self._transfer.peer
        return is_open and self._here.tenures.is_lost(self._original, peer)

    def give_up(self, *, peer_is_lost: bool = False) -> str:
        """End the move of an instance that is lost; can run twice.

        What only this move made is removed, and what this host knows of the instance.
        Its disks are another host's, the layers over them too. Returns what is still
        owed at the peer.

        Raises MigrationUndecided, NotRevertible (the peer has it): nothing was done.
        """
        if self._journal.has("giving") and not self._journal.has("taken back"):
            # Of copies that it has the peer could make a second one.
            self._win_back(peer_is_lost, fence=False)
            self._journal.done("taken back")
        self._journal.done("lost")
        self._forget()
        for volume in self._transfer.volumes:
            if volume.kept and self._journal.has("freezing"):
                backend = facts.source_of(self._here, self._original, volume)
                backend.drop_state(volume.source, self._journal.operation)
        facts.drop_memory(self._here, self._journal)
        self._journal.done("restored")
        return self._clean_peer()

    # Private

    def _put_back(self, power_on: bool, peer_is_lost: bool) -> None:
        if self._journal.has("giving") and not self._journal.has("taken back"):
            self._win_back(peer_is_lost)
            self._here.tenures.take(self._original)
            self._journal.done("taken back")
        elif self._journal.has("stopping"):
            # Whoever took it over meanwhile may be writing to what was kept.
            self._here.tenures.demand(self._original)
        self._restore_states()
        self._restore(power_on)
        self._let_go()
        self._drop_layers()
        facts.drop_memory(self._here, self._journal)
        self._journal.done("restored")

    def _forget(self) -> None:
        """Remove what this move says of the instance here; what else there is of it
        goes when it is destroyed here."""
        uuid = self._original.uuid
        own = self._here.own_record(uuid)
        if own is not None and own.operation != self._journal.operation:
            return
        if own is not None:
            self._here.domains.kill(uuid)
            self._here.domains.undefine(uuid)
            self._here.instances.remove(uuid)
        self._here.tenures.renounce(uuid, self._here.up())

    def _is_worth_parking(self) -> bool:
        """Tell whether bytes were sent, and the right never was about to be."""
        begun = self._journal.has("sending") or self._is_reserved()
        given = self._journal.has("giving")
        return begun and not given and int(self._here.options.resume_age) > 0

    def _is_reserved(self) -> bool:
        """Tell whether this attempt began with what an earlier one left."""
        return bool(facts.facts(self._journal, "begun").get("reserved"))

    def _win_back(self, peer_is_lost: bool, *, fence: bool = True) -> None:
        try:
            self._take_back()
        except errors.MigrationUndecided as e:
            if not peer_is_lost:
                raise
            if fence:
                self._fence()
            self._journal.done("abandoned")
            LOG.warning(
                "operation=%s instance=%s is taken back on an operator's word: %s",
                self._journal.operation,
                self._original.uuid,
                e,
            )

    def _let_go(self) -> None:
        """A move within this host had it in other backends."""
        if self._transfer.peer == self._here.name:
            had = {volume.backend for volume in self._transfer.volumes}
            had -= {ref.backend for ref in self._original.disks}
            self._here.tenures.drop(self._original.uuid, had)

    def _fence(self) -> None:
        """See that a lost peer writes to shared disks no more; NotRevertible."""
        holders = frozenset({self._here.name, self._transfer.peer})
        try:
            self._here.tenures.seize(self._original, is_down=True, holders=holders)
        except errors.HeldElsewhere:
            raise
        except (errors.StorageError, errors.InstanceError) as e:
            raise self._not_revertible(
                f"{self._transfer.peer} cannot be kept from its disks: {e}"
            ) from e

    def _take_back(self) -> None:
        """Win the right back from the transfer's record."""
        while True:
            there, stored = self._ask()
            if stored is None:
                self._demand_never_given()
                return
            if stored.body.state in TAKEN:
                raise self._not_revertible(
                    f"{self._transfer.peer} has it (the transfer is "
                    f"{stored.body.state.value}): destroy it there first"
                )
            if stored.body.state in BACK:
                return
            body = msgspec.structs.replace(stored.body, state=TransferState.WITHDRAWN)
            try:
                there.transfers.publish(stored.name, body, after=stored.generation)
                return
            except errors.RecordConflict:
                LOG.info("operation=%s the peer was first", self._journal.operation)
            except errors.HostError as e:
                raise self._undecided(e) from e

    def _demand_never_given(self) -> None:
        """Without a record at the peer: the instance is ours if it never was given.

        A record that was there and is gone proves nothing: the peer may run it.
        """
        if self._journal.has("confirming"):
            raise self._not_revertible("it is confirmed")
        if self._journal.has("given"):
            raise self._undecided("it has lost the record of the transfer")

    def _not_revertible(self, reason: str) -> errors.NotRevertible:
        return errors.NotRevertible(
            instance=self._original.uuid,
            operation=self._journal.operation,
            reason=reason,
        )

    def _ask(self) -> tuple[Peer, record.Stored[model.Transfer] | None]:
        try:
            there = self._connect(self._journal)
            return there, there.transfer(self._journal.operation)
        except errors.HostError as e:
            raise self._undecided(e) from e

    def _undecided(self, error: errors.Error | str) -> errors.MigrationUndecided:
        return errors.MigrationUndecided(
            instance=self._original.uuid,
            operation=self._journal.operation,
            peer=self._transfer.peer,
            reason=error,
        )

    def _restore_states(self) -> None:
        """Make shared disks what they were at the stop, before anybody starts it.

        Once it may have been started here nothing is kept any more, so that a second
        call changes nothing.
        """
        kept = [volume for volume in self._transfer.volumes if volume.kept]
        if not kept or not self._journal.has("freezing"):
            return
        with self._here.tenures.rewriting(self._original):
            for volume in kept:
                self._restore_state(volume)

    def _restore_state(self, volume: model.TransferVolume) -> None:
        backend = facts.source_of(self._here, self._original, volume)
        backend.restore_state(volume.source, self._journal.operation)
        found = backend.volumes.read(volume.source).body
        if found.size != volume.length:
            # The peer had grown it.
            backend.update(msgspec.structs.replace(found, size=volume.length))

    def _restore(self, power_on: bool) -> None:
        """Make the instance what it was; nothing happens if it was not stopped."""
        if not self._journal.has("stopping"):
            return
        uuid = self._original.uuid
        back = msgspec.structs.replace(
            self._original, domain_xml=None, operation=self._journal.operation
        )
        stored = self._here.instances.find(uuid)
        if stored is None or stored.body != back:
            self._here.publish_instance(back)
        if not self._here.domains.is_defined(uuid):
            self._here.domains.define(
                str(self._original.domain_xml),
                autostart=self._original.autostart
                and not self._here.tenures.concern(self._original),
            )
        if power_on:
            self._power(uuid)

    def _power(self, uuid: str) -> None:
        files = self._here.files
        memory = files.volumes.find(facts.memory_name(self._journal.operation))
        off = self._here.domains.power(uuid) is Power.OFF
        if self._original.power == Power.PAUSED.value and off and memory:
            if self._has_lost_layers():
                self._here.start(uuid, paused=True)
            else:
                self._here.restore(uuid, memory.body.path)
        elif self._original.power != Power.OFF.value:
            self._here.start(uuid)

    def _has_lost_layers(self) -> bool:
        """Tell whether layers that its memory fits may be gone: its peer may have
        started it, and begins with none."""
        transient = scratch.transient(self._original)
        return bool(transient) and self._journal.has("giving")

    def _drop_layers(self) -> None:
        """Remove the layers that this move put over shared disks."""
        if not self._journal.has("freezing"):
            return
        for volume in self._transfer.volumes:
            if volume.shared and volume.backing:
                backend = facts.source_of(self._here, self._original, volume)
                backend.remove(volume.name)
                below = backend.volumes.read(volume.source).body
                if below.state is VolumeState.FROZEN:
                    usable = msgspec.structs.replace(below, state=VolumeState.USABLE)
                    backend.update(usable)

    def _clean_peer(self) -> str:
        """Remove our volumes and our record there; what fails stays owed."""
        if self._journal.has("reserving") or self._is_reserved():
            try:
                if self._journal.has("abandoned"):
                    # It is back, against the operator's word: never touch what it has.
                    self._take_back()
                there = self._connect(self._journal)
                if any(v.role is model.Role.IMAGE for v in self._transfer.volumes):
                    there.release(self._journal.operation)
                there.remove_volumes(self._transfer, facts.cards(self._journal))
                there.forget(self._journal.operation)
            except errors.Error as e:
                LOG.warning(
                    "operation=%s owes a clean-up at %s: %s",
                    self._journal.operation,
                    self._transfer.peer,
                    e,
                )
                return str(e)
        self._journal.close()
        return ""
