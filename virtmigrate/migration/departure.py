# SPDX-License-Identifier: Apache-2.0
"""One move, from its plan to its ticket; and its end, when it is confirmed."""

import msgspec
from oslo_log import log as logging

from virtmigrate import errors, lending, model, node, record
from virtmigrate.backends import base
from virtmigrate.instance import Power
from virtmigrate.journal import Journal
from virtmigrate.migration import cargo, facts, inspection, ticket, trees
from virtmigrate.model import InstanceState, Proof, TransferState, VolumeState
from virtmigrate.peer import Peer
from virtmigrate.progress import Progress
from virtmigrate.snapshottree import Snapshots

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

    def run(self, timeout: float, retry_interval: float) -> str:
        LOG.info(
            "operation=%s request=%s instance=%s moves from %s to %s",
            self.journal.operation,
            self._transfer.request,
            self._original.uuid,
            self._here.name,
            self._transfer.peer,
        )
        with cargo.Cargo(self._here, self.journal, self._there, self._progress) as sent:
            sent.prepare()
            if self._is_to_be_sent_ahead():
                sent.send_ahead()
            self._transfer = sent.transfer
            self._look_again()
            self._stop(timeout, retry_interval)
            self._freeze()
            return self._give(sent.send())

    def confirm(self, *, accept_unproven: bool = False) -> None:
        """Tell the peer that it keeps the instance, and remove what was ours.

        Arguments:
            accept_unproven: an operator's word that a copy may be the only one
                although not all of it was compared.
        """
        if not self.journal.has("confirmed"):
            self._win_confirm(accept_unproven)
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

    def _is_to_be_sent_ahead(self) -> bool:
        running = self._original.power == Power.RUNNING.value
        return running and bool(self._here.options.send_ahead)

    def _look_again(self) -> None:
        """Take the instance as it is now, and see that the peer still waits for it.

        Raises MigrationRefused: until here nothing was touched.
        """
        self._original = inspection.inspect(self._here, self._original)
        self._there.renew(self.journal.operation)

    def _stop(self, timeout: float, retry_interval: float) -> None:
        """Stop the guest and take its domain away: nobody may start it meanwhile."""
        uuid = self._original.uuid
        self._progress.phase("stopping")
        original = msgspec.json.encode(self._original).decode()
        self.journal.done("stopping", original=original)
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
        xml = self._here.domains.xml(uuid)
        inspection.demand_recorded(self._here, self._original, xml)
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
        volume = facts.memory_volume(self._original, self.journal.operation, self._here)
        self._here.files.volumes.publish(volume.name, volume)
        self._here.domains.save_to(uuid, volume.path)

    def _freeze(self) -> None:
        shared = [v for v in self._transfer.volumes if v.shared]
        if any(v.backing or v.kept for v in shared):
            self.journal.done("freezing")
        for volume in shared:
            backend = self._backend(volume)
            if volume.kept:
                backend.keep_state(volume.source, self.journal.operation)
            if not volume.backing:
                continue
            below = backend.volumes.read(volume.source).body
            backend.update(msgspec.structs.replace(below, state=VolumeState.FROZEN))
            layer = facts.overlay_volume(volume, below, self._transfer, self._here.name)
            backend.overlay(layer, below)
            backend.persist(layer.pool, layer.name)
            usable = msgspec.structs.replace(layer, state=VolumeState.USABLE)
            backend.update(usable)

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
        self._here.tenures.demand(self._original)
        self.journal.done("giving")
        generation = self._here.publish_instance(self._away())
        self._here.tenures.pass_on(self._original, self._transfer.peer)
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
        tops = {(v.target, v.source): v for v in self._transfer.volumes}
        disks = []
        for ref in self._original.disks:
            top = tops[ref.target, ref.volume]
            disks.append(
                msgspec.structs.replace(ref, volume=top.name, backend=top.backend)
            )
        return msgspec.structs.replace(
            self._original,
            disks=tuple(disks),
            snapshots=self._snapshots_at_peer(),
            memory=int(begun["memory"]),
            vcpus=int(begun["vcpus"]),
            operation=self.journal.operation,
            peer=self._here.name,
        )

    def _snapshots_at_peer(self) -> Snapshots:
        named, backends = {}, {}
        for volume in self._transfer.volumes:
            backend = self._backend(volume).name
            if volume.shared:
                # It keeps its name: what is put over it is gone after the confirm.
                backends[backend] = volume.backend
            else:
                named[backend, volume.source] = volume.backend, volume.name
        return trees.at_peer(self._original.snapshots, named, backends)

    def _win_confirm(self, accept_unproven: bool) -> None:
        """Write CONFIRMED at the peer, or see that an earlier attempt did.

        The peer may be giving it back at the same moment: one of the two wins, and
        nothing is removed here before it is known to be this one.
        """
        stored = self._there.transfer(self.journal.operation)
        if stored is None and self.journal.has("confirming"):
            # Only a confirmed transfer is forgotten by the peer.
            return
        self._demand_settled(stored)
        accepted = accept_unproven or self._has_accepted()
        if not accepted and stored and stored.body.state is TransferState.SETTLED:
            self._demand_proven(stored.body)
        self.journal.done("confirming", accept_unproven=accepted)
        if stored is not None and stored.body.state is TransferState.SETTLED:
            self._publish(stored, state=TransferState.CONFIRMED)

    def _has_accepted(self) -> bool:
        """Tell whether an earlier attempt to confirm came with that word."""
        confirming = self.journal.facts("confirming") or {}
        return bool(confirming.get("accept_unproven"))

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

    def _demand_proven(self, transfer: model.Transfer) -> None:
        unproven = [v for v in transfer.volumes if v.proof is not Proof.FULL]
        if not unproven:
            return
        how = ", ".join(f"{v.target}: verify = {v.proof.value}" for v in unproven)
        raise errors.NotConfirmable(
            instance=self._original.uuid,
            operation=self.journal.operation,
            reason=f"not all of the copies was compared with the source ({how}). A "
            "byte that arrived wrong cannot be repaired once the source's volumes "
            "are gone: confirm again and accept that (--accept-unproven)",
        )

    def _remove_ours(self) -> None:
        """Remove or retire the volumes that the move left here, those of this
        instance only."""
        facts.drop_memory(self._here, self.journal)
        self._here.scratch.drop(self._original.uuid)
        timeout = self._here.options.lock_timeout
        for sent in self._transfer.volumes:
            backend = self._backend(sent)
            if sent.kept:
                backend.drop_state(sent.source, self.journal.operation)
            # What it inherited while it moved, others stand on: that is theirs.
            with lending.settled(backend, self._original.uuid, timeout) as lent:
                self._remove_sent(backend, sent, lent)
        self._let_go()
        stored = self._here.instances.find(self._original.uuid)
        if (
            stored
            and stored.body.operation == self.journal.operation
            and stored.body.state is InstanceState.AWAY
            and (stored.body.host == self._here.name)
        ):
            self._here.instances.remove(self._original.uuid)

    def _remove_sent(
        self, backend: base.Backend, sent: model.TransferVolume, lent: set[str]
    ) -> None:
        left = [each for each in self._left(backend, sent) if each.name not in lent]
        if any(facts.is_converted(sent, volume) for volume in left):
            for volume in left:
                backend.remove(volume.name)
        elif left:
            root = facts.roots(self.journal).get(sent.name)
            self._remove_or_retire(backend, left[0], root)

    def _let_go(self) -> None:
        """Give up what says that this host may run it; not where it still is."""
        uuid = self._original.uuid
        had = {ref.backend for ref in self._original.disks}
        own = self._here.own_record(uuid)
        if own is not None and own.state is not InstanceState.AWAY:
            had -= {ref.backend for ref in own.disks}
        self._here.tenures.drop(uuid, had)

    def _left(
        self, backend: base.Backend, sent: model.TransferVolume
    ) -> list[model.Volume]:
        """Return what this instance has still here of a volume that was sent.

        Of a converted disk that is all of its chain, the lowest first: removed in this
        order, what is left of it is always found from its top.
        """
        found: list[model.Volume] = []
        # Whoever took it over meanwhile has what this host would remove.
        holder = self._here.tenures.holder(backend, self._original.uuid)
        name = None if sent.shared or holder is not None else sent.source
        while name is not None and (stored := backend.volumes.find(name)):
            converted = facts.is_converted(sent, stored.body)
            name = stored.body.backing if converted else None
            found.insert(0, stored.body)
        return [each for each in found if each.owner == self._original.uuid]

    def _remove_or_retire(
        self, backend: base.Backend, volume: model.Volume, root: str | None
    ) -> None:
        """Keep a volume whose content is on record, if this host wants to.

        An earlier move that was reverted may have left a manifest, too; the guest
        wrote since.
        """
        keep = self._here.options.keep_retired and volume.proof is Proof.FULL
        kept = backend.manifest(volume.name) if keep else None
        if kept is not None and kept.root() == root:
            retired = msgspec.structs.replace(volume, state=VolumeState.RETIRED)
            backend.update(retired)
        else:
            backend.remove(volume.name)

    def _backend(self, volume: model.TransferVolume) -> base.Backend:
        return facts.source_of(self._here, self._original, volume)
