# SPDX-License-Identifier: Apache-2.0
"""Room at a peer: what transfers have reserved there, and what is left."""

from oslo_log import log as logging

from virtmigrate import errors, mailbox, model, storagepool
from virtmigrate.model import TransferState
from virtmigrate.units import format_bytes

LOG = logging.getLogger(__name__)

RESERVING = (TransferState.RESERVED, TransferState.GIVEN, TransferState.TAKEN)
"""States in which a transfer's volumes may still grow."""


class Room:
    """The room of one backend of a peer, and who has reserved it.

    Arguments:
        incoming: the backend's pool for what arrives.
    """

    def __init__(
        self,
        box: mailbox.Mailbox,
        card: model.BackendCard,
        incoming: storagepool.Pool,
    ) -> None:
        self._mailbox = box
        self._card = card
        self._incoming = incoming

    def missing(self, transfer: model.Transfer) -> int:
        """Return the bytes that a transfer wants beyond what is free.

        What all others have reserved and not written yet counts as used.
        """
        wanted = self._outstanding(transfer) + self._reserved(transfer.operation)
        return max(0, wanted - self._free())

    def left(self) -> int:
        """Return the bytes that are neither used nor reserved by anybody."""
        return max(0, self._free() - self._reserved())

    def error(self, transfer: model.Transfer) -> errors.NoSpace:
        """Return what to raise when bytes are missing."""
        return errors.NoSpace(
            host=self._incoming.host.name,
            pool=self._incoming.name,
            free=format_bytes(self._free()),
            wanted=format_bytes(sum(v.room for v in self._ours(transfer))),
            reserved=format_bytes(self._reserved(transfer.operation)),
        )

    # Private

    def _free(self) -> int:
        return max(0, self._incoming.room().free - self._card.reserved)

    def _reserved(self, operation: str = "") -> int:
        """Return the bytes that transfers other than this one may still write.

        One that wants more than there is can't be honest, and keeps nobody out.
        """
        total, capacity = 0, self._incoming.room().capacity
        for other in self._mailbox.open_transfers():
            if other.name == operation:
                continue
            wanted = self._outstanding(other.body)
            if wanted > capacity:
                LOG.warning(
                    "transfer=%r wants %s of %s: passed over",
                    other.name,
                    format_bytes(wanted),
                    format_bytes(capacity),
                )
                continue
            total += wanted
        return total

    def _ours(self, transfer: model.Transfer) -> list[model.TransferVolume]:
        return [v for v in transfer.volumes if v.backend == self._card.name]

    def _outstanding(self, transfer: model.Transfer) -> int:
        """Return the bytes that a transfer has reserved here and not written yet."""
        if transfer.state not in RESERVING:
            return 0
        return sum(outstanding_of(v, self._incoming) for v in self._ours(transfer))


def sent_size(volume: model.TransferVolume) -> int:
    """Return the size of the raw volume that the bytes are sent into.

    A raw disk that grows is created grown: behind its old end it reads as zeros.
    Other formats keep their length, the guest's view of them grows later.
    """
    raw = volume.format.value == "raw"
    return max(volume.size, volume.length) if raw else volume.length


def outstanding_of(volume: model.TransferVolume, pool: storagepool.Pool) -> int:
    """Return the bytes that are reserved for a volume and not written yet."""
    written = 0
    if volume.room and not volume.shared:
        try:
            written = pool.allocated(volume.name)
        except errors.VolumeNotFound:
            LOG.debug("volume=%s is not begun", volume.name)
    return max(0, volume.room - written)
