# SPDX-License-Identifier: Apache-2.0
"""What a source needs of the host an instance moves to; nothing else is asked.

Versions, room, incoming volumes, verifying, and the transfer's record. All of it
goes over `transfer_uri`, so that an unprivileged libvirtd can serve it. At the
peer only volumes named after our own operation are made or removed.
"""

import libvirt
from oslo_log import log as logging

from virtmigrate import errors, manifest, model, node, record, storagepool, stream, xml
from virtmigrate.host import Host
from virtmigrate.model import TransferState
from virtmigrate.progress import Progress
from virtmigrate.units import format_bytes

LOG = logging.getLogger(__name__)

RESERVING = (TransferState.RESERVED, TransferState.GIVEN, TransferState.TAKEN)
"""States in which a transfer's volumes may still grow."""

HELD = (TransferState.TAKEN, TransferState.SETTLED, TransferState.RETURNING)
"""States in which the peer has the instance and may have to give it back."""


class Peer:
    """The other host, as the source of a move sees it.

    Safe to share between threads.

    Arguments:
        host: the connection to its transfer URI.
        mailbox: its mailbox.
    """

    def __init__(self, host: Host, mailbox: node.Mailbox) -> None:
        self.host = host
        self.name = host.name
        self._mailbox = mailbox
        self.transfers = mailbox.transfers

    # Before anything is touched

    def card(self) -> model.HostCard:
        """Return what the peer says of itself.

        Raises HostError, RecordError; MigrationRefused comes from `agree`.
        """
        return self._mailbox.cards.read(node.CARD).body

    def demand(self, needed: "Needs") -> None:
        """Raise HostError unless it can run such a domain and has the name free."""
        with self.host.session("asking what it can run") as session:
            conn = session.conn
            self._demand_free(conn, needed)
            text = conn.getDomainCapabilities(
                None, needed.arch, needed.machine, needed.virt_type, 0
            )
        if needed.cpu_model and not _usable(text, needed.cpu_model):
            raise errors.HostError(
                host=self.name, reason=f"CPU model {needed.cpu_model} is not usable"
            )

    def sees(self, pool: str, nonce: str) -> bool:
        """Tell whether a pool of the peer shows a volume; False without the pool."""
        try:
            return self._pool(pool).has(nonce)
        except errors.PoolNotFound:
            return False

    # The transfer

    def reserve(self, transfer: model.Transfer, card: model.BackendCard) -> None:
        """Publish the transfer, which reserves its room; then see that there is room.

        Every reservation counts, also one made at the same moment, so two never
        overcommit (both may be refused). Raises NoSpace; the reservation stays
        until `forget`.
        """
        self.transfers.publish(transfer.operation, transfer)
        wanted = sum(volume.room for volume in transfer.volumes)
        reserved = self._reserved(transfer, card)
        free = max(0, self._pool(card.incoming).room().free - card.reserved)
        if wanted + reserved > free:
            raise errors.NoSpace(
                host=self.name,
                pool=card.incoming,
                free=format_bytes(free),
                wanted=format_bytes(wanted),
                reserved=format_bytes(reserved),
            )

    def transfer(self, operation: str) -> record.Stored[model.Transfer] | None:
        """Return the transfer's record as it is now at the peer."""
        return self.transfers.find(operation)

    def writer(
        self, card: model.BackendCard, volume: model.TransferVolume, bound: int
    ) -> stream.VolumeWriter:
        """Create an incoming volume at its full size and return its writer.

        A half-written one of this operation is made anew.
        """
        pool, size = self._pool(card.incoming), sent_size(volume)
        try:
            pool.create_raw(volume.name, size)
        except errors.VolumeExists:
            pool.delete(volume.name)
            pool.create_raw(volume.name, size)
        return stream.VolumeWriter(pool, volume.name, size, bound)

    def verify(
        self,
        card: model.BackendCard,
        volume: model.TransferVolume,
        bound: int,
        progress: Progress,
    ) -> manifest.Manifest:
        """Read an incoming volume back and return its manifest."""
        size = sent_size(volume)
        pool = self._pool(card.incoming)
        if pool.physical(volume.name) != size:
            raise errors.ShortTransfer(
                volume=volume.name, host=self.name, reason="the copy has another size"
            )
        reader = stream.VolumeReader(pool, volume.name, size, bound)
        return stream.survey(reader, size, progress)

    def remove_volumes(self, transfer: model.Transfer, card: model.BackendCard) -> None:
        """Remove what this operation made in incoming; can be called again."""
        pool = self._pool(card.incoming)
        for volume in transfer.volumes:
            if not volume.shared:
                pool.delete(volume.name)

    def forget(self, operation: str) -> None:
        """Remove the transfer's record: it is over."""
        self.transfers.remove(operation)

    # Private

    def _pool(self, name: str) -> storagepool.Pool:
        ours = self._mailbox.pool
        return storagepool.Pool(
            self.host, name, ownership=ours.ownership, busy_timeout=ours.busy_timeout
        )

    def _demand_free(self, conn: "libvirt.virConnect", needed: "Needs") -> None:
        for domain in conn.listAllDomains(0):
            if needed.uuid == domain.UUIDString() or needed.name == domain.name():
                raise errors.HostError(
                    host=self.name,
                    reason=f"it has a domain {domain.name()} ({domain.UUIDString()})",
                )

    def _reserved(self, transfer: model.Transfer, card: model.BackendCard) -> int:
        """Return the bytes that other transfers may still write."""
        pool = self._pool(card.incoming)
        total = 0
        for other in self._mailbox.open_transfers():
            ours = other.name == transfer.operation
            if not ours and other.body.backend == card.name:
                total += outstanding(other.body, pool)
        return total


class Needs(model.Struct, frozen=True):
    """What a domain asks of the host that is to run it."""

    uuid: str
    name: str
    arch: str
    machine: str
    virt_type: str
    cpu_model: str | None = None
    """A named model; None when any CPU of the host will do."""


def sent_size(volume: model.TransferVolume) -> int:
    """Return the size of the raw volume that the bytes are sent into.

    A raw disk that grows is created grown: behind its old end it reads as zeros.
    Other formats keep their length, the guest's view of them grows later.
    """
    raw = volume.format.value == "raw"
    return max(volume.size, volume.length) if raw else volume.length


def outstanding(transfer: model.Transfer, pool: storagepool.Pool) -> int:
    """Return the bytes that a transfer has reserved and not written yet."""
    if transfer.state not in RESERVING:
        return 0
    total = 0
    for volume in transfer.volumes:
        written = 0
        if not volume.shared:
            try:
                written = pool.allocated(volume.name)
            except errors.VolumeNotFound:
                LOG.debug("volume=%s is not begun", volume.name)
        total += max(0, volume.room - written)
    return total


def agree(card: model.HostCard) -> None:
    """Raise HostError unless the peer reads something that we write."""
    pairs = (
        ("records", record.READS, card.records),
        ("manifests", manifest.READS, card.manifests),
        ("migration strings", node.TICKETS, card.tickets),
    )
    for what, ours, theirs in pairs:
        # This release writes one version of each; the newest that both know.
        if max(ours) not in theirs:
            raise errors.HostError(
                host=card.host,
                reason=f"release {card.release} reads {what} of versions "
                f"{list(theirs)}, and this one writes {max(ours)}",
            )


# Private


def _usable(capabilities: str, model_name: str) -> bool:
    root = xml.parse(capabilities)
    for found in root.findall("cpu/mode[@name='custom']/model"):
        if found.text == model_name:
            return found.get("usable") == "yes"
    return False
