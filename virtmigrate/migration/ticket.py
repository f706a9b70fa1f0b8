# SPDX-License-Identifier: Apache-2.0
"""The migration string: what the caller carries from the source to the peer.

It names the operation and proves, by digests, which volumes and which record of
the instance are meant. It is versioned, and refused when it is damaged.
"""

import blake3
import msgspec

from virtmigrate import errors, model

VERSION = 1


class Ticket(model.Struct, frozen=True):
    """What the peer needs to find and prove the transfer."""

    version: int
    operation: str
    instance: str
    source: str
    digests: dict[str, model.Digest]
    """Of each volume that was sent, by its name at the peer."""
    record: str
    """Digest of the instance's record as it was given up."""


def of(transfer: model.Transfer) -> Ticket:
    """Return the ticket of a transfer whose volumes are proven."""
    digests = {v.name: v.digest for v in transfer.volumes if v.digest is not None}
    return Ticket(
        version=VERSION,
        operation=transfer.operation,
        instance=transfer.instance,
        source=transfer.source,
        digests=digests,
        record=_digest(msgspec.json.encode(transfer.record).decode()),
    )


def write(ticket: Ticket) -> str:
    """Return the ticket as a string."""
    text = msgspec.json.encode(ticket).decode()
    return f"virtmigrate:{VERSION}:{_digest(text)}:{text}"


def read(text: str, instance: str) -> Ticket:
    """Return the ticket of a string.

    Raises TicketDamaged: it is no ticket, was changed, is of a newer release, or
    of another instance.
    """
    parts = (text or "").split(":", 3)
    if len(parts) != 4 or parts[0] != "virtmigrate":
        raise errors.TicketDamaged(reason="it is no string of virtmigrate's")
    if parts[1] != str(VERSION):
        raise errors.TicketDamaged(
            reason=f"version {parts[1]}, and this release reads {VERSION}"
        )
    if parts[2] != _digest(parts[3]):
        raise errors.TicketDamaged(reason="its digest does not match")
    try:
        ticket = msgspec.json.decode(parts[3], type=Ticket)
    except msgspec.DecodeError as e:
        raise errors.TicketDamaged(reason=str(e)) from e
    if ticket.instance != instance:
        raise errors.TicketDamaged(reason=f"it is of instance {ticket.instance}")
    return ticket


def _digest(text: str) -> str:
    return blake3.blake3(text.encode(errors="surrogatepass")).hexdigest()[:32]
