# SPDX-License-Identifier: Apache-2.0
"""This host as the peer of a move that stays on it.

All is as between two hosts: a transfer in the mailbox, room reserved, copies proven
before anything is given up. Only what lies between is left out: bytes go from backend
to backend in this process, and no receiver is asked.
"""

from virtmigrate import (
    account,
    assistance,
    errors,
    model,
    needs,
    node,
    peer,
    reservation,
    stream,
    writing,
)
from virtmigrate.manifest import Manifest
from virtmigrate.request import Request


class OwnHost(peer.Peer):
    """This host, as the source of a move within it sees it. Safe to share."""

    def __init__(self, here: node.Node) -> None:
        super().__init__(here.host, here.mailbox)
        self._here = here
        self._alone = _Alone(here)

    def demand(self, needed: needs.Needs) -> None:
        needs.demand(self.host, needed, is_there=True)

    def target(
        self,
        operation: str,
        card: model.BackendCard,
        volume: model.TransferVolume,
        length: int,
    ) -> writing.Target:
        size = reservation.sent_size(volume)
        return self._here.backend(card.name).target(volume.name, size)

    # Private

    def _help(self, operation: str) -> assistance.Assistance:
        return self._alone

    def _surveyed(
        self,
        operation: str,
        card: model.BackendCard,
        wanted: Request,
        mover: stream.Mover,
    ) -> Manifest:
        with self._here.backend(card.name).arrived(wanted.volume) as arrived:
            if arrived.size != wanted.size:
                raise errors.ShortTransfer(
                    volume=wanted.volume,
                    host=self.name,
                    reason=f"the copy has {arrived.size} bytes",
                )
            arrived.flush()
            blocks = peer.blocks_of(wanted)
            return mover.survey(arrived.source, blocks, waits=account.PEER)


# Private


class _Alone(assistance.Assistance):
    """Help where nobody is asked: what only saves bytes is done without.

    An instance that is here has nothing retired that a move within the host could
    reuse while it is claimed.
    """

    def __init__(self, here: node.Node) -> None:
        self._here = here

    def hold(
        self, transfer: model.Transfer, check: assistance.Check = lambda: None
    ) -> model.Transfer:
        return assistance.without_holds(transfer)

    def release(self, backend: str = "") -> None:
        """Nothing: nothing is held."""

    def reuse(
        self, volume: str, size: int, check: assistance.Check = lambda: None
    ) -> Manifest | None:
        return None

    def grow(
        self,
        volume: str,
        before: int,
        size: int,
        check: assistance.Check = lambda: None,
    ) -> bool:
        return False

    def reclaim(
        self, backend: str, missing: int, check: assistance.Check = lambda: None
    ) -> bool:
        return self._here.backend(backend).reclaim(lambda freed: freed >= missing) > 0
