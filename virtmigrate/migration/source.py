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
    confirmed   it never comes back; what is left is to remove its volumes here
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from virtmigrate import errors, model, node, record, stream
from virtmigrate.backends import base
from virtmigrate.formats import DiskFormat
from virtmigrate.instance import Power
from virtmigrate.journal import Journal, load_all
from virtmigrate.migration import plan, ticket
from virtmigrate.model import InstanceState, Role, TransferState, VolumeState
from virtmigrate.peer import Peer
from virtmigrate.progress import Progress

LOG = logging.getLogger(__name__)

KIND = "departure"
TAKEN = (TransferState.TAKEN, TransferState.SETTLED, TransferState.CONFIRMED)


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
                if journal.has("given"):
                    return self._again(journal, request)
                self._undo(journal)
            progress.phase("checking")
            there = self._connect(request.dest)
            planned = plan.make(self._here, there, request)
            journal = self._begin(planned, request)
            return self._run(_Departure(self, journal, there, progress), request)

    def confirm(self, uuid: str) -> None:
        """Give the source's volumes up for good; nothing happens without a move.

        Raises NotConfirmable while the peer has not proven that it has the
        instance, durable.
        """
        with self._here.claimed(uuid):
            journal = self._find(uuid)
            if journal is None or not journal.has("given"):
                LOG.info("instance=%s nothing to confirm on %s", uuid, self._here.name)
                return
            departure = _Departure(self, journal, self._peer_of(journal), Progress())
            departure.confirm()

    def revert(self, uuid: str, *, power_on: bool = True) -> None:
        """Take the instance back after the peer gave it back, or before it took it.

        Can be called at any time, from any half-done state. Raises NotRevertible
        while the peer has it, MigrationUndecided when the peer can't be asked.
        """
        with self._here.claimed(uuid):
            journal = self._find(uuid)
            if journal is None:
                self._here.entitled(uuid)
                return
            self._undo(journal, power_on=power_on)

    def recover(self) -> list[str]:
        """Finish what a killed process left; return what could not be finished.

        A move whose ticket was given to the caller stays: the caller decides.
        """
        left = []
        for journal in self._journals():
            uuid = _original(journal).uuid
            try:
                with self._here.claimed(uuid):
                    self._recover(journal)
            except errors.Error as e:
                LOG.warning("operation=%s instance=%s: %s", journal.operation, uuid, e)
                left.append(f"{journal.operation}: {e}")
        return left

    def open_operations(self) -> list[tuple[str, str, str, str]]:
        """Return (operation, instance, peer, newest step) of what is not over."""
        return [
            (j.operation, _original(j).uuid, _facts(j, "begun")["dest"], j.steps()[-1])
            for j in self._journals()
        ]

    # Private

    @property
    def here(self) -> node.Node:
        return self._here

    def _journals(self) -> Iterator[Journal]:
        for journal in load_all(self._here.journals):
            if _facts(journal, "begun").get("kind") == KIND:
                yield journal

    def _find(self, uuid: str) -> Journal | None:
        """Return the journal that decides about the instance, if one does."""
        for journal in self._journals():
            if _original(journal).uuid == uuid and not journal.has("restored"):
                return journal
        return None

    def _peer_of(self, journal: Journal) -> Peer:
        return self._connect(str(_facts(journal, "begun")["dest"]))

    def _again(self, journal: Journal, request: plan.Request) -> str:
        dest = _facts(journal, "begun")["dest"]
        if dest != request.dest:
            raise errors.MigrationRefused(
                instance=request.instance,
                reason=f"it was handed over to {dest} by operation "
                f"{journal.operation}; confirm or revert that first",
            )
        journal.done("returned")
        return str(_facts(journal, "given")["ticket"])

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

    def _run(self, departure: "_Departure", request: plan.Request) -> str:
        try:
            return departure.run(request.timeout, request.retry_interval)
        except BaseException as e:
            self._roll_back(departure.journal, e)
            raise

    def _roll_back(self, journal: Journal, error: BaseException) -> None:
        """Undo, and raise MigrationRolledBack from what went wrong."""
        original = _original(journal)
        LOG.warning("operation=%s rolling back: %r", journal.operation, error)
        debts = self._undo(journal)
        if not isinstance(error, Exception):
            return
        raise errors.MigrationRolledBack(
            instance=original.uuid,
            operation=journal.operation,
            reason=str(error) or type(error).__name__,
            state=original.power,
            host=self._here.name,
            debts=f"; still owed at the peer: {debts}" if debts else "",
        ) from error

    def _undo(self, journal: Journal, *, power_on: bool = True) -> str:
        return _Undo(self._here, journal, self._peer_of).run(power_on=power_on)

    def _recover(self, journal: Journal) -> None:
        if journal.has("confirmed"):
            there = self._peer_of(journal)
            _Departure(self, journal, there, Progress()).confirm()
        elif journal.has("restored") or not journal.has("returned"):
            self._undo(journal)


class _Departure:
    """One move, from its plan to its ticket."""

    def __init__(
        self, source: Source, journal: Journal, there: Peer, progress: Progress
    ) -> None:
        self._here = source.here
        self.journal = journal
        self._there = there
        self._progress = progress
        self._original = _original(journal)
        self._transfer = _transfer(journal)
        self._card = _card(journal)

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
        stored = self._there.transfer(self.journal.operation)
        state = stored.body.state if stored else None
        if not self.journal.has("confirmed"):
            self._demand_settled(stored)
            self.journal.done("confirmed")
        if stored is not None and state is TransferState.SETTLED:
            self._publish(stored, state=TransferState.CONFIRMED)
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

    def _keep_memory(self, uuid: str) -> None:
        """Keep a paused guest's memory: should the move fail, it is paused again."""
        backend = self._backend()
        volume = _memory_volume(self._original, self.journal.operation, self._here)
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
            layer = _overlay_volume(volume, below, self._transfer, self._here.name)
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
        size = max(volume.length, volume.size) if _raw(volume) else volume.length
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
        facts = _facts(self.journal, "begun")
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
            memory=int(facts["memory"]),
            vcpus=int(facts["vcpus"]),
            operation=self.journal.operation,
            peer=self._here.name,
        )

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
        _drop_memory(self._here, self.journal)
        backend = self._backend()
        for sent in self._transfer.volumes:
            found = None if sent.shared else backend.volumes.find(sent.source)
            if found is not None and found.body.owner == self._original.uuid:
                backend.remove(sent.source)
        stored = self._here.instances.find(self._original.uuid)
        if stored and stored.body.host == self._here.name:
            self._here.instances.remove(self._original.uuid)

    def _backend(self) -> base.Backend:
        return self._here.backend(self._original.disks[0].backend)


class _Undo:
    """Puts an instance back and removes what its move made; can run twice."""

    def __init__(
        self, here: node.Node, journal: Journal, connect: Callable[[Journal], Peer]
    ) -> None:
        self._here = here
        self._journal = journal
        self._connect = connect
        self._original = _original(journal)
        self._transfer = _transfer(journal)

    def run(self, *, power_on: bool) -> str:
        """Undo; return what is still owed at the peer, "" when nothing is.

        Raises MigrationUndecided, NotRevertible: nothing was done.
        """
        if not self._journal.has("restored"):
            if self._journal.has("giving"):
                self._take_back()
            self._restore(power_on)
            self._drop_layers()
            _drop_memory(self._here, self._journal)
            self._journal.done("restored")
        return self._clean_peer()

    # Private

    def _take_back(self) -> None:
        """Win the right back from the transfer's record."""
        while True:
            there, stored = self._ask()
            state = stored.body.state if stored else TransferState.WITHDRAWN
            if state in TAKEN:
                raise errors.NotRevertible(
                    instance=self._original.uuid,
                    operation=self._journal.operation,
                    reason=f"{self._transfer.peer} has it (the transfer is "
                    f"{state.value}): destroy it there first",
                )
            if stored is None or state in (
                TransferState.RETURNED,
                TransferState.WITHDRAWN,
            ):
                return
            body = msgspec.structs.replace(stored.body, state=TransferState.WITHDRAWN)
            try:
                there.transfers.publish(stored.name, body, after=stored.generation)
                return
            except errors.RecordConflict:
                LOG.info("operation=%s the peer was first", self._journal.operation)
            except errors.HostError as e:
                raise self._undecided(e) from e

    def _ask(self) -> tuple[Peer, record.Stored[model.Transfer] | None]:
        try:
            there = self._connect(self._journal)
            return there, there.transfer(self._journal.operation)
        except errors.HostError as e:
            raise self._undecided(e) from e

    def _undecided(self, error: errors.Error) -> errors.MigrationUndecided:
        return errors.MigrationUndecided(
            instance=self._original.uuid,
            operation=self._journal.operation,
            peer=self._transfer.peer,
            reason=error,
        )

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
        if not self._here.domains.exists(uuid):
            self._here.domains.define(
                str(self._original.domain_xml), autostart=self._original.autostart
            )
        if power_on:
            self._power(uuid)

    def _power(self, uuid: str) -> None:
        backend = self._here.backend(self._original.disks[0].backend)
        memory = backend.volumes.find(_memory_name(self._journal.operation))
        off = self._here.domains.power(uuid) is Power.OFF
        if self._original.power == Power.PAUSED.value and off and memory:
            self._here.domains.restore_from(memory.body.path)
        elif self._original.power != Power.OFF.value:
            self._here.domains.start(uuid)

    def _drop_layers(self) -> None:
        """Remove the layers that this move put over shared disks."""
        if not self._journal.has("freezing"):
            return
        backend = self._here.backend(self._original.disks[0].backend)
        for volume in self._transfer.volumes:
            if volume.shared and volume.backing:
                backend.remove(volume.name)
                below = backend.volumes.read(volume.source).body
                if below.state is VolumeState.FROZEN:
                    usable = msgspec.structs.replace(below, state=VolumeState.USABLE)
                    backend.update(usable)

    def _clean_peer(self) -> str:
        """Remove our volumes and our record there; what fails stays owed."""
        if self._journal.has("reserving"):
            try:
                there = self._connect(self._journal)
                there.remove_volumes(self._transfer, _card(self._journal))
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


def _facts(journal: Journal, step: str) -> dict[str, Any]:
    facts = journal.facts(step)
    if facts is None:
        raise errors.JournalBroken(path=journal.path, reason=f"it lacks {step}")
    return facts


def _original(journal: Journal) -> model.Instance:
    text = str(_facts(journal, "begun")["original"])
    return msgspec.json.decode(text, type=model.Instance)


def _transfer(journal: Journal) -> model.Transfer:
    text = str(_facts(journal, "begun")["transfer"])
    return msgspec.json.decode(text, type=model.Transfer)


def _card(journal: Journal) -> model.BackendCard:
    text = str(_facts(journal, "begun")["card"])
    return msgspec.json.decode(text, type=model.BackendCard)


def _raw(volume: model.TransferVolume) -> bool:
    return volume.format is DiskFormat.RAW


def _memory_name(operation: str) -> str:
    return f"memory.{operation}"


def _memory_volume(
    original: model.Instance, operation: str, here: node.Node
) -> model.Volume:
    pool = here.backend(original.disks[0].backend).disks
    name = _memory_name(operation)
    return model.Volume(
        name=name,
        pool=pool.name,
        path=pool.volume_path(name),
        format=DiskFormat.RAW,
        role=Role.MEMORY,
        size=0,
        state=VolumeState.INCOMPLETE,
        owner=original.uuid,
        operation=operation,
        origin=here.name,
    )


def _drop_memory(here: node.Node, journal: Journal) -> None:
    original = _original(journal)
    backend = here.backend(original.disks[0].backend)
    backend.remove(_memory_name(journal.operation))


def _overlay_volume(
    volume: model.TransferVolume,
    below: model.Volume,
    transfer: model.Transfer,
    origin: str,
) -> model.Volume:
    path = below.path.rpartition("/")[0]
    return model.Volume(
        name=volume.name,
        pool=below.pool,
        path=f"{path}/{volume.name}",
        format=DiskFormat.QCOW2,
        role=volume.role,
        size=volume.size,
        state=VolumeState.INCOMPLETE,
        owner=transfer.instance,
        operation=transfer.operation,
        origin=origin,
        backing=below.name,
    )
