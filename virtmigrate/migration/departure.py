# SPDX-License-Identifier: Apache-2.0
"""One move, from its plan to its ticket; and its end, when it is confirmed."""

import msgspec
from oslo_log import log as logging

from virtmigrate import errors, model, node, record, stream
from virtmigrate.backends import base
from virtmigrate.instance import Power
from virtmigrate.journal import Journal
from virtmigrate.migration import facts, ticket
from virtmigrate.model import InstanceState, TransferState, VolumeState
from virtmigrate.peer import Peer, sent_size
from virtmigrate.progress import Progress

LOG = logging.getLogger(__name__)


class Departure:
    """One move, from its plan to its ticket."""

    def __init__(
        self, here: node.Node, journal: Journal, there: Peer, progress: Progress
    ) -> None:
        self._here = here
        self.journal = journal
        self._there = there
        self._progress = progress
        self._original = facts.original(journal)
        self._transfer = facts.transfer(journal)
        self._card = facts.card(journal)

    def run(self, timeout: float, retry_interval: float) -> str:
        LOG.info(
            "operation=%s request=%s instance=%s moves from %s to %s",
            self.journal.operation,
            self._transfer.request,
            self._original.uuid,
            self._here.name,
            self._transfer.peer,
        )
        self._reserve()
        self._stop(timeout, retry_interval)
        self._freeze()
        volumes = [self._send(volume) for volume in self._transfer.volumes]
        return self._give(tuple(volumes))

    def confirm(self) -> None:
        """Tell the peer that it keeps the instance, and remove what was ours."""
        if not self.journal.has("confirmed"):
            self._win_confirm()
            self.journal.done("confirmed")
        self._remove_ours()
        self.journal.close()
        LOG.info(
            "operation=%s instance=%s confirmed on %s",
            self.journal.operation,
            self._original.uuid,
            self._transfer.peer,
        )

    # Private

    def _reserve(self) -> None:
        self.journal.done("reserving")
        self._there.reserve(self._transfer, self._card)

    def _stop(self, timeout: float, retry_interval: float) -> None:
        """Stop the guest and take its domain away: nobody may start it meanwhile."""
        uuid = self._original.uuid
        self._progress.phase("stopping")
        self.journal.done("stopping")
        leaving = msgspec.structs.replace(
            self._original,
            state=InstanceState.LEAVING,
            operation=self.journal.operation,
            peer=self._transfer.peer,
        )
        self._here.publish_instance(leaving)
        if self._original.power == Power.PAUSED.value:
            self._keep_memory(uuid)
        self._here.domains.stop(uuid, timeout, retry_interval)
        self._here.domains.undefine(uuid)
        self._demand_gone()

    def _demand_gone(self) -> None:
        """See that no domain is left: one that was started meanwhile is transient."""
        if self._here.domains.exists(self._original.uuid):
            raise errors.InvalidState(
                instance=self._original.uuid,
                host=self._here.name,
                state="started",
                reason="somebody started it while it was being moved",
            )

    def _keep_memory(self, uuid: str) -> None:
        """Keep a paused guest's memory: should the move fail, it is paused again."""
        backend = self._backend()
        volume = facts.memory_volume(self._original, self.journal.operation, self._here)
        backend.volumes.publish(volume.name, volume)
        self._here.domains.save_to(uuid, volume.path)

    def _freeze(self) -> None:
        shared = [v for v in self._transfer.volumes if v.shared and v.backing]
        if shared:
            self.journal.done("freezing")
        backend = self._backend()
        for volume in shared:
            below = backend.volumes.read(volume.source).body
            backend.update(msgspec.structs.replace(below, state=VolumeState.FROZEN))
            layer = facts.overlay_volume(volume, below, self._transfer, self._here.name)
            backend.overlay(layer, below)
            backend.persist(layer.pool, layer.name)
            usable = msgspec.structs.replace(layer, state=VolumeState.USABLE)
            backend.update(usable)

    def _send(self, volume: model.TransferVolume) -> model.TransferVolume:
        """Copy and prove one volume; return it with its digest."""
        if volume.shared:
            return volume
        bound = self._here.stream_bound
        writer = self._there.writer(self._card, volume, bound)
        size = sent_size(volume)
        self._progress.phase(f"copying {volume.target}", size)
        ours = stream.copy(self._reader(volume), writer, size, self._progress)
        self._progress.phase(f"verifying {volume.target}", size)
        theirs = self._there.verify(self._card, volume, bound, self._progress)
        if ours.root() != theirs.root():
            raise errors.VerificationFailed(
                volume=volume.name,
                host=self._there.name,
                found=theirs.root(),
                expected=ours.root(),
            )
        self.journal.done("copying", volume=volume.name, root=ours.root())
        return msgspec.structs.replace(volume, digest=ours.digest())

    def _reader(self, volume: model.TransferVolume) -> stream.Reader:
        backend = self._backend()
        ours = backend.volumes.read(volume.source).body
        pool = backend.pool(ours.pool)
        path = backend.local_file(pool, ours.name)
        if path is not None:
            return stream.FileReader(path, volume.length)
        LOG.info(
            "operation=%s volume=%s is read through libvirt: this process may not "
            "read the file, which would be faster",
            self.journal.operation,
            ours.name,
        )
        return stream.VolumeReader(
            pool, ours.name, volume.length, self._here.stream_bound
        )

    def _give(self, volumes: tuple[model.TransferVolume, ...]) -> str:
        """Give the right to run up, here first, then in the transfer's record."""
        self._progress.phase("handing over")
        self._progress.check()
        stored = self._there.transfer(self.journal.operation)
        if stored is None or stored.body.state is not TransferState.RESERVED:
            raise errors.MigrationError(
                instance=self._original.uuid,
                operation=self.journal.operation,
                reason="the peer gave the reservation up",
            )
        self._demand_gone()
        self.journal.done("giving")
        generation = self._here.publish_instance(self._away())
        given = self._publish(
            stored,
            state=TransferState.GIVEN,
            generation=generation,
            volumes=volumes,
            record=self._at_peer(),
        )
        text = ticket.write(ticket.of(given))
        self.journal.done("given", ticket=text)
        self.journal.done("returned")
        return text

    def _publish(
        self, stored: record.Stored[model.Transfer], **changes: object
    ) -> model.Transfer:
        body = msgspec.structs.replace(stored.body, **changes)
        self._there.transfers.publish(stored.name, body, after=stored.generation)
        return body

    def _away(self) -> model.Instance:
        return msgspec.structs.replace(
            self._original,
            state=InstanceState.AWAY,
            operation=self.journal.operation,
            peer=self._transfer.peer,
        )

    def _at_peer(self) -> model.Instance:
        """Return the instance as it is to be at the peer."""
        begun = facts.facts(self.journal, "begun")
        by_source = {v.source: v.name for v in self._transfer.volumes}
        disks = tuple(
            msgspec.structs.replace(
                ref, volume=by_source[ref.volume], backend=self._card.name
            )
            for ref in self._original.disks
        )
        return msgspec.structs.replace(
            self._original,
            disks=disks,
            memory=int(begun["memory"]),
            vcpus=int(begun["vcpus"]),
            operation=self.journal.operation,
            peer=self._here.name,
        )

    def _win_confirm(self) -> None:
        """Write CONFIRMED at the peer, or see that an earlier attempt did.

        The peer may be giving it back at the same moment: one of the two wins, and
        nothing is removed here before it is known to be this one.
        """
        stored = self._there.transfer(self.journal.operation)
        if stored is None and self.journal.has("confirming"):
            # Only a confirmed transfer is forgotten by the peer.
            return
        self._demand_settled(stored)
        self.journal.done("confirming")
        if stored is not None and stored.body.state is TransferState.SETTLED:
            self._publish(stored, state=TransferState.CONFIRMED)

    def _demand_settled(self, stored: record.Stored[model.Transfer] | None) -> None:
        state = stored.body.state if stored else None
        if state in (TransferState.SETTLED, TransferState.CONFIRMED):
            return
        raise errors.NotConfirmable(
            instance=self._original.uuid,
            operation=self.journal.operation,
            reason=f"{self._transfer.peer} has not proven that it has it, durable "
            f"(the transfer is {state.value if state else 'unknown there'})",
        )

    def _remove_ours(self) -> None:
        """Remove the volumes that the move left here, those of this instance only."""
        facts.drop_memory(self._here, self.journal)
        backend = self._backend()
        for sent in self._transfer.volumes:
            found = None if sent.shared else backend.volumes.find(sent.source)
            if found is not None and found.body.owner == self._original.uuid:
                backend.remove(sent.source)
        stored = self._here.instances.find(self._original.uuid)
        if (
            stored
            and stored.body.operation == self.journal.operation
            and (stored.body.host == self._here.name)
        ):
            self._here.instances.remove(self._original.uuid)

    def _backend(self) -> base.Backend:
        return self._here.backend(self._original.disks[0].backend)
