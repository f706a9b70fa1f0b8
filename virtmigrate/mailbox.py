# SPDX-License-Identifier: Apache-2.0
"""Where hosts write what both need to know."""

from collections.abc import Iterator
from dataclasses import dataclass

from oslo_log import log as logging

from virtmigrate import drainnote, errors, model, record, storagepool
from virtmigrate.host import Host

LOG = logging.getLogger(__name__)

MAILBOX = "virtmigrate-mailbox"
CARD = "host"
DRAIN = "drain"

OWN = (CARD, DRAIN)
"""Names of what is no transfer."""


@dataclass(frozen=True)
class Mailbox:
    """Where hosts write what both need to know: cards and transfers."""

    pool: storagepool.Pool
    cards: record.Store[model.HostCard]
    transfers: record.Store[model.Transfer]
    drains: record.Store[drainnote.Note]

    def open_transfers(self) -> Iterator[record.Stored[model.Transfer]]:
        """Yield all transfers; a record that cannot be read is logged, and stays.

        What one peer wrote must not keep others from moving.
        """
        for name in self.transfers.names():
            if name in OWN:
                continue
            try:
                stored = self.transfers.find(name)
            except (errors.StorageError, errors.LibvirtFailed) as e:
                LOG.error("transfer=%r passed over: %s", name, e)
                continue
            if stored is not None and stored.body.operation != name:
                LOG.error("transfer=%r passed over: it is of another operation", name)
            elif stored is not None:
                yield stored


def of(host: Host, grace: float, **pool_options: object) -> Mailbox:
    """Return the mailbox of a host, ours or a peer's."""
    pool = storagepool.Pool(host, MAILBOX, **pool_options)  # type: ignore[arg-type]
    return Mailbox(
        pool=pool,
        cards=record.Store(pool, model.HostCard, grace=grace),
        transfers=record.Store(pool, model.Transfer, grace=grace),
        drains=record.Store(pool, drainnote.Note, grace=grace),
    )
