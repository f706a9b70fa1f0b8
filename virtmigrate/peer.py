# SPDX-License-Identifier: Apache-2.0
"""What a source needs of the host an instance moves to; nothing else is asked.

Versions, room, incoming volumes, verifying, and the transfer's record. All of it
goes over `transfer_uri`, so that an unprivileged libvirtd can serve it. At the
peer only volumes named after our own operation are made or removed.
"""

import secrets
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
from oslo_log import log as logging

from virtmigrate import (
    account,
    asking,
    assistance,
    draining,
    errors,
    known,
    mailbox,
    manifest,
    model,
    needs,
    node,
    pieces,
    reading,
    record,
    request,
    reservation,
    storagepool,
    stream,
    writing,
)
from virtmigrate.host import Host
from virtmigrate.known import Known
from virtmigrate.manifest import Manifest
from virtmigrate.model import Proof, TransferState
from virtmigrate.request import Answer, Request, Verb

LOG = logging.getLogger(__name__)

HELD = (TransferState.TAKEN, TransferState.SETTLED, TransferState.RETURNING)
"""States in which the peer has the instance and may have to give it back."""


_HELPS = 64
"""Operations whose talks with the receiver are remembered."""

SAMPLE = 64
"""Blocks that are compared by verify = sampled."""


class Peer:
    """The other host, as the source of a move sees it.

    Safe to share between threads.

    Arguments:
        host: the connection to its transfer URI.
        box: its mailbox.
        patience: seconds that its receiver has to begin with a request.
    """

    def __init__(
        self, host: Host, box: mailbox.Mailbox, patience: float = 10.0
    ) -> None:
        self.host = host
        self.name = host.name
        self.mailbox = box
        self.transfers = box.transfers
        self._patience = patience
        self._helps: dict[str, assistance.Assistance] = {}

    # Before anything is touched

    def card(self) -> model.HostCard:
        """Return what the peer says of itself.

        Raises HostError, RecordError; MigrationRefused comes from `agree`.
        """
        return self.mailbox.cards.read(mailbox.CARD).body

    def demand(self, needed: needs.Needs) -> None:
        """Raise HostError unless it takes and can run such a domain, its name free."""
        draining.demand_open(self.mailbox, self.name)
        needs.demand(self.host, needed)

    def left(self, card: model.BackendCard) -> int:
        """Return the bytes of a backend that are neither used nor reserved."""
        return reservation.Room(self.mailbox, card, self._incoming(card)).left()

    def incoming(self, card: model.BackendCard) -> storagepool.Pool:
        """Return the pool that takes what arrives for a backend."""
        return self._incoming(card)

    def sees(self, pool: str, nonce: str) -> bool:
        """Tell whether a pool of the peer shows a volume; False without the pool."""
        try:
            return self._pool(pool).has(nonce)
        except errors.PoolNotFound:
            return False

    # The transfer

    def reserve(
        self,
        transfer: model.Transfer,
        cards: Mapping[str, model.BackendCard],
        check: assistance.Check = lambda: None,
    ) -> model.Transfer:
        """Publish the transfer, which reserves its room; then see that there is room.

        Every reservation counts, also one made at the same moment, so two never
        overcommit (both may be refused). What the peer has in its image cache is
        held there, and needs no room. Returns the transfer with that. `check` ends
        the waiting for the peer's receiver by what it raises. Raises
        NoSpace; the reservation stays until `forget`.
        """
        # A receiver that was silent in an earlier attempt may be there now.
        self._helps.pop(transfer.operation, None)
        found = self.transfers.find(transfer.operation)
        if found is not None:
            self._demand_reserved(found.body)
        stored = self.transfers.publish(
            transfer.operation, transfer, after=found.generation if found else 0
        )
        helps = self._help(transfer.operation)
        holding = helps.hold(transfer, check)
        if holding != transfer:
            self.transfers.publish(stored.name, holding, after=stored.generation)
        for card in cards.values():
            room = reservation.Room(self.mailbox, card, self._incoming(card))
            missing = room.missing(holding)
            if missing and helps.reclaim(card.name, missing, check):
                missing = room.missing(holding)
            if missing:
                raise room.error(holding)
        return holding

    def transfer(self, operation: str) -> record.Stored[model.Transfer] | None:
        """Return the transfer's record as it is now at the peer."""
        return self.transfers.find(operation)

    def amend(
        self, transfer: model.Transfer, volumes: tuple[model.TransferVolume, ...]
    ) -> model.Transfer:
        """Publish other lengths of the volumes; return the transfer with them."""
        stored = self.transfers.read(transfer.operation)
        self._demand_reserved(stored.body)
        amended = msgspec.structs.replace(stored.body, volumes=volumes)
        self.transfers.publish(stored.name, amended, after=stored.generation)
        return amended

    def renew(self, operation: str) -> None:
        """See that the reservation stands, and let its age begin anew.

        Raises HostError when the peer gave it up, RecordMissing.
        """
        stored = self.transfers.read(operation)
        self._demand_reserved(stored.body)
        renewed = msgspec.structs.replace(stored.body, created=time.time())
        self.transfers.publish(operation, renewed, after=stored.generation)

    def prepare(
        self,
        operation: str,
        card: model.BackendCard,
        volume: model.TransferVolume,
        kept: Path,
        check: assistance.Check = lambda: None,
    ) -> Known:
        """Have the incoming volume there at its full size; return what it holds.

        What an earlier attempt left is gone on with, then what the peer retired of
        this disk; else it is made anew, full of zeros.

        Arguments:
            kept: the file that keeps what the volume holds.
            check: raises what ends the waiting for the peer's receiver.
        """
        pool, size = self._incoming(card), reservation.sent_size(volume)
        found = known.load(kept)
        helps = self._help(operation)
        if (
            found is not None
            and _has(pool, volume.name, found.size)
            and (found.size == size or helps.grow(volume.name, found.size, size, check))
        ):
            return Known(found.fitted(size), kept)
        # Nothing may be believed of a volume that is made anew.
        known.forget(kept)
        pool.delete(volume.name)
        reused = helps.reuse(volume.name, size, check)
        if reused is None:
            pool.delete(volume.name)
            pool.create_raw(volume.name, size)
        return Known(reused or Manifest(size), kept)

    def target(
        self,
        operation: str,
        card: model.BackendCard,
        volume: model.TransferVolume,
        length: int,
    ) -> writing.Target:
        """Return the incoming volume, to write to.

        Arguments:
            length: bytes of a piece, where data comes in pieces.
        """
        name, size = volume.name, reservation.sent_size(volume)
        if not card.pieces:
            return writing.VolumeTarget(self._incoming(card), name, size)

        def bring(piece: str, offset: int, count: int) -> None:
            self._help(operation).bring(name, piece, offset, count)

        return pieces.PieceTarget(self._pool(card.pieces), name, size, length, bring)

    def verify(
        self,
        operation: str,
        card: model.BackendCard,
        volume: model.TransferVolume,
        mover: stream.Mover,
        proof: Proof,
    ) -> Manifest:
        """Return the manifest of an incoming volume, unknown where it was not read.

        Raises ShortTransfer, HostError.
        """
        size = reservation.sent_size(volume)
        sample = SAMPLE if proof is Proof.SAMPLED else 0
        wanted = Request(
            verb=Verb.VERIFY,
            volume=volume.name,
            size=size,
            sample=sample,
            seed=secrets.token_hex(16),
        )
        found = self._surveyed(operation, card, wanted, mover)
        mover.account.add(verified=found.known())
        return found

    def finish(self, operation: str) -> None:
        """Let the peer's own driver take the instance that was given.

        Raises RequestRefused, ReceiverSilent: how far it came is not known then.
        """
        self._help(operation).finish()

    def give_back(self, operation: str) -> None:
        """Let the peer's own driver give the instance back; raises as finish()."""
        self._help(operation).give_back()

    def act(self, operation: str, verb: Verb) -> None:
        """Let the peer's own driver do its part of a live move; raises as finish()."""
        self._help(operation).act(verb)

    def find_image(
        self, operation: str, key: str, backend: str, check: assistance.Check
    ) -> Answer | None:
        """Have the peer hold the image of a key for the operation; None without one."""
        return self._help(operation).find(key, backend, check)

    def image(self, card: model.BackendCard, name: str, size: int) -> reading.Source:
        """Return an image that the peer holds, to read it."""
        return reading.VolumeSource(self._pool(card.disks), name, size)

    def release(self, operation: str, backend: str = "") -> None:
        """Give up what the peer holds for the operation; a lease ends by itself."""
        self._help(operation).release(backend)

    def remove(self, card: model.BackendCard, name: str) -> None:
        """Remove an incoming volume of ours that a move needs no more."""
        self.remove_pieces(card, name)
        self._incoming(card).delete(name)

    def remove_pieces(self, card: model.BackendCard, name: str) -> None:
        """Remove the files in which a volume's data came."""
        if card.pieces:
            pool = self._pool(card.pieces)
            names = {request.piece_name(name, n) for n in range(request.PIECES)}
            for piece in names.intersection(pool.names()):
                pool.delete(piece)

    def remove_volumes(
        self, transfer: model.Transfer, cards: Mapping[str, model.BackendCard]
    ) -> None:
        """Remove what this operation made in incoming; can be called again."""
        for volume in transfer.volumes:
            if not volume.shared and not volume.held:
                self.remove(cards[volume.backend], volume.name)

    def forget(self, operation: str) -> None:
        """Remove the transfer's record: it is over.

        And before it what a killed attempt asked and did not take away.
        """
        for name in self.mailbox.pool.names():
            if request.operation_of(name) == operation:
                self.mailbox.pool.delete(name)
        self.transfers.remove(operation)
        self._helps.pop(operation, None)

    # Private

    def _demand_reserved(self, transfer: model.Transfer) -> None:
        if transfer.state is not TransferState.RESERVED:
            raise errors.HostError(
                host=self.name,
                reason=f"it gave the reservation {transfer.operation} up (it is "
                f"{transfer.state.value})",
            )

    def _help(self, operation: str) -> assistance.Assistance:
        """Return what the peer's receiver does for an operation."""
        if len(self._helps) > _HELPS:
            self._helps.clear()
        found = self._helps.get(operation)
        if found is None:
            asker = asking.Asker(
                self.mailbox.pool,
                operation,
                begin_timeout=self._patience,
                stall_timeout=self.host.timeouts.call,
            )
            found = self._helps[operation] = assistance.Assistance(asker)
        return found

    def _surveyed(
        self,
        operation: str,
        card: model.BackendCard,
        wanted: Request,
        mover: stream.Mover,
    ) -> Manifest:
        """Let the peer's receiver read an incoming volume; or read it back."""
        try:
            return mover.persist(lambda: self._help(operation).verify(wanted, mover))
        except (errors.ReceiverSilent, errors.RequestRefused) as e:
            if card.pieces:
                # libvirt cannot read it.
                raise
            LOG.warning("operation=%s %s: read back over the network", operation, e)
            return self._read_back(card, wanted, mover)

    def _read_back(
        self, card: model.BackendCard, wanted: Request, mover: stream.Mover
    ) -> Manifest:
        pool = self._incoming(card)
        if pool.physical(wanted.volume) != wanted.size:
            raise errors.ShortTransfer(
                volume=wanted.volume, host=self.name, reason="the copy has another size"
            )
        source = reading.VolumeSource(pool, wanted.volume, wanted.size)
        return mover.survey(source, blocks_of(wanted), waits=account.PEER)

    def _incoming(self, card: model.BackendCard) -> storagepool.Pool:
        return self._pool(
            card.incoming, thick=card.thick, preallocate=card.preallocates
        )

    def _pool(
        self, name: str, *, thick: bool = False, preallocate: bool = False
    ) -> storagepool.Pool:
        ours = self.mailbox.pool
        return storagepool.Pool(
            self.host,
            name,
            ownership=ours.ownership,
            busy_timeout=ours.busy_timeout,
            thick=thick,
            preallocate=preallocate,
        )


def agree(card: model.HostCard) -> None:
    """Raise HostError unless the peer reads something that we write."""
    pairs = (
        ("records", record.READS, card.records),
        ("manifests", manifest.READS, card.manifests),
        ("migration strings", node.TICKETS, card.tickets),
    )
    for what, ours, theirs in pairs:
        # What this release reads it also writes: the newest that both know is used.
        if not set(ours) & set(theirs):
            raise errors.HostError(
                host=card.host,
                reason=f"release {card.release} reads {what} of versions "
                f"{list(theirs)}, and this one writes {list(ours)}",
            )


def blocks_of(wanted: Request) -> list[int] | None:
    """Return the blocks that a proof is to read; None for all."""
    if not wanted.sample:
        return None
    count = Manifest(wanted.size).count
    return request.sampled(count, wanted.sample, wanted.seed)


# Private


def _has(pool: storagepool.Pool, name: str, size: int) -> bool:
    return pool.has(name) and pool.physical(name) == size
