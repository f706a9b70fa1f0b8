# SPDX-License-Identifier: Apache-2.0
"""What a peer's receiver does for a source, of one operation.

Most of it only saves bytes or time: where the receiver is silent, or refuses, that is
said in the log, and a slower way is taken.
"""

from collections.abc import Callable

import msgspec
from oslo_log import log as logging

from virtmigrate import account, asking, errors, model, stream
from virtmigrate.manifest import Manifest
from virtmigrate.request import Answer, Request, Verb

LOG = logging.getLogger(__name__)

Check = Callable[[], object]
"""Called every half second at least while the peer works; what it raises ends that."""

LEASE = 86400.0
"""Seconds that the peer keeps an image for us."""

LOAN = 3600.0
"""Seconds that it keeps one while we copy it; if it goes, there is its source."""


class Assistance:
    """Help with one operation. Safe to share between threads."""

    def __init__(self, asker: asking.Asker) -> None:
        self._asker = asker

    # What saves bytes

    def hold(
        self, transfer: model.Transfer, check: Check = lambda: None
    ) -> model.Transfer:
        """Let the peer hold the images that it has; nothing of them is sent.

        Only what stands on nothing: a root says nothing of what is below.
        """
        names: dict[str, str] = {}
        for volume in transfer.volumes:
            is_alone = volume.role is model.Role.IMAGE and volume.backing is None
            if is_alone and volume.digest:
                wanted = Request(
                    verb=Verb.HOLD,
                    root=volume.digest.root,
                    format=volume.format,
                    size=volume.size,
                    lease=LEASE,
                    backend=volume.backend,
                )
                answer = self._try(wanted, "an image is sent along", check)
                if answer is not None:
                    names[volume.name] = answer[0].name
        volumes = tuple(_standing_on(volume, names) for volume in transfer.volumes)
        return msgspec.structs.replace(transfer, volumes=volumes)

    def find(self, key: str, backend: str, check: Check) -> Answer | None:
        """Let the peer hold the image of a key; None where it has none."""
        wanted = Request(verb=Verb.HOLD, root=key, lease=LOAN, backend=backend)
        answer = self._try(wanted, "the image is not taken from there", check)
        return answer[0] if answer else None

    def release(self, backend: str = "") -> None:
        """Give up what the peer holds; a lease ends by itself.

        Arguments:
            backend: where, besides those of the transfer's volumes.
        """
        wanted = Request(verb=Verb.RELEASE, backend=backend)
        self._try(wanted, "what it holds expires")

    def reuse(
        self, volume: str, size: int, check: Check = lambda: None
    ) -> Manifest | None:
        """Let the peer take what it retired of this disk as the incoming volume."""
        wanted = Request(verb=Verb.REUSE, volume=volume, size=size)
        answer = self._try(wanted, "nothing to begin with", check)
        return answer[1] if answer else None

    def grow(
        self, volume: str, before: int, size: int, check: Check = lambda: None
    ) -> bool:
        """Let the peer make an incoming volume longer; False when it stays as it is."""
        if size <= before:
            return False
        wanted = Request(verb=Verb.GROW, volume=volume, size=size)
        return self._try(wanted, "all is sent anew", check) is not None

    def reclaim(self, backend: str, missing: int, check: Check = lambda: None) -> bool:
        """Let the peer remove what was retired there; False when that freed nothing."""
        wanted = Request(verb=Verb.RECLAIM, backend=backend, size=missing)
        answer = self._try(wanted, "nothing was reclaimed", check)
        return answer is not None and answer[0].size > 0

    # What has no other way, or one that the caller takes

    def verify(self, wanted: Request, mover: stream.Mover) -> Manifest:
        """Return the manifest that the peer reads of an incoming volume.

        Raises ReceiverSilent, RequestRefused.
        """
        told = 0

        def tell(done: int) -> None:
            nonlocal told
            mover.progress.advance(max(0, done - told))
            told = max(told, done)

        with mover.account.waiting(account.PEER):
            _, found = self._asker.ask(wanted, tell)
        # A verification that is done brings a manifest: the asker sees to it.
        assert found is not None
        return found

    def bring(self, volume: str, piece: str, offset: int, size: int) -> None:
        """Let the peer write a piece into an incoming volume; raises as verify()."""
        wanted = Request(
            verb=Verb.IMPORT, volume=volume, piece=piece, offset=offset, size=size
        )
        self._asker.ask(wanted)

    def finish(self) -> None:
        """Let the peer's own driver take the instance; raises as verify()."""
        self._asker.ask(Request(verb=Verb.FINISH))

    def give_back(self) -> None:
        """Let the peer's own driver give the instance back; raises as verify()."""
        self._asker.ask(Request(verb=Verb.GIVE_BACK))

    def act(self, verb: Verb) -> None:
        """Let the peer's own driver do its part of a live move; raises as verify()."""
        self._asker.ask(Request(verb=verb))

    # Private

    def _try(
        self, wanted: Request, otherwise: str, check: Check = lambda: None
    ) -> tuple[Answer, Manifest | None] | None:
        try:
            return self._asker.ask(wanted, lambda _: check())
        except (errors.ReceiverSilent, errors.RequestRefused) as e:
            LOG.info("%s: %s", otherwise, e)
            return None


def without_holds(transfer: model.Transfer) -> model.Transfer:
    """Return a transfer whose images are all sent along."""
    volumes = tuple(_standing_on(volume, {}) for volume in transfer.volumes)
    return msgspec.structs.replace(transfer, volumes=volumes)


# Private


def _standing_on(
    volume: model.TransferVolume, names: dict[str, str]
) -> model.TransferVolume:
    """Return a volume with the images that the peer holds by their names there."""
    backing = names.get(volume.backing or "", volume.backing)
    if volume.name not in names:
        # An image that the peer lacks comes along as a layer of this instance alone.
        is_image = volume.role is model.Role.IMAGE
        role = model.Role.LAYER if is_image else volume.role
        return msgspec.structs.replace(volume, backing=backing, role=role, digest=None)
    return msgspec.structs.replace(
        volume, name=names[volume.name], backing=backing, held=True, room=0
    )
