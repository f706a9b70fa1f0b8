# SPDX-License-Identifier: Apache-2.0
"""The volumes of one move: their room at the peer, their copies, and the proof.

Everything that can be done while the guest runs is done then: room is reserved,
incoming volumes are made, and the disks are sent ahead. What the guest writes
meanwhile is found by its digests when it is off, and only that is sent again.
"""

import types
from typing import Self

import msgspec
from oslo_log import log as logging

from virtmigrate import (
    account,
    errors,
    guestview,
    known,
    manifest,
    model,
    node,
    reading,
    stream,
    writing,
)
from virtmigrate.backends import base
from virtmigrate.journal import Journal
from virtmigrate.migration import facts
from virtmigrate.model import Proof, Role
from virtmigrate.peer import Peer
from virtmigrate.progress import Progress
from virtmigrate.units import MiB

LOG = logging.getLogger(__name__)

ROUNDS = 3
"""How often a volume is sent whose copy is not like it."""


class Cargo:
    """What one move sends. Leaving `with` closes what it opened."""

    def __init__(
        self, here: node.Node, journal: Journal, there: Peer, progress: Progress
    ) -> None:
        self.transfer = facts.transfer(journal)
        self._here = here
        self._journal = journal
        self._there = there
        self._progress = progress
        self._cards = facts.cards(journal)
        self._original = facts.original(journal)
        self._proof = Proof(here.options.verify)
        self._account = account.Account()
        self._known: dict[str, known.Known] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        for each in self._known.values():
            each.close()

    def prepare(self) -> None:
        """Reserve room and make the incoming volumes, while the guest still runs."""
        self._progress.phase("preparing")
        self._journal.done("reserving")
        planned = self._volumes()
        self.transfer = self._there.reserve(
            self.transfer, self._cards, self._progress.check
        )
        self._journal.done("preparing")
        # What an earlier attempt sent of images that are held there now.
        sent = {volume.name for volume in self._volumes()}
        for volume in planned:
            if volume.name not in sent:
                self._there.remove(self._card(volume), volume.name)
        for volume in self._volumes():
            self._prepare(volume)

    def send_ahead(self) -> None:
        """Send disks that the guest may still write to; nothing of it is proven."""
        self._journal.done("sending")
        with self._here.mover(self._progress, self._account) as mover:
            for volume in self._volumes():
                source = self._live(volume)
                if source is not None:
                    self._progress.phase(f"sending {volume.target} ahead", source.size)
                    target = self._target(volume)
                    mover.copy(source, target, self._known[volume.name])

    def send(self) -> tuple[model.TransferVolume, ...]:
        """Copy and prove all volumes; return them with their digests."""
        self._journal.done("sending")
        self._measure()
        with self._here.mover(self._progress, self._account) as mover:
            sent = {v.name: self._send(v, mover) for v in self._volumes()}
        LOG.info(
            "operation=%s instance=%s %s",
            self._journal.operation,
            self.transfer.instance,
            self._account.summary(),
        )
        return tuple(sent.get(v.name, v) for v in self.transfer.volumes)

    # Private

    def _volumes(self) -> list[model.TransferVolume]:
        """Return what has to be sent."""
        return [v for v in self.transfer.volumes if not v.shared and not v.held]

    def _card(self, volume: model.TransferVolume) -> model.BackendCard:
        return self._cards[volume.backend]

    def _ours(self, volume: model.TransferVolume) -> tuple[base.Backend, model.Volume]:
        """Return where a volume lies here, and its record."""
        backend = facts.source_of(self._here, self._original, volume)
        return backend, backend.volumes.read(volume.source).body

    def _prepare(self, volume: model.TransferVolume) -> None:
        kept = self._journal.beside(volume.name)
        self._known[volume.name] = self._there.prepare(
            self.transfer.operation,
            self._card(volume),
            volume,
            kept,
            self._progress.check,
        )

    def _measure(self) -> None:
        """Take the lengths of files that grew between the plan and the stop."""
        before = self._volumes()
        volumes = tuple(self._measured(v) for v in self.transfer.volumes)
        if volumes == self.transfer.volumes:
            return
        self.transfer = self._there.amend(self.transfer, volumes)
        for volume in self._volumes():
            if volume not in before:
                self._known[volume.name].close()
                self._prepare(volume)

    def _measured(self, volume: model.TransferVolume) -> model.TransferVolume:
        if volume.shared or volume.held:
            return volume
        length = max(volume.length, self._length(volume))
        return msgspec.structs.replace(volume, length=length)

    def _length(self, volume: model.TransferVolume) -> int:
        backend, ours = self._ours(volume)
        if facts.is_converted(volume, ours):
            return ours.size
        return backend.pool(ours.pool).physical(ours.name)

    def _send(
        self, volume: model.TransferVolume, mover: stream.Mover
    ) -> model.TransferVolume:
        """Copy and prove one volume; return it with its digest.

        What arrived otherwise than it was sent is sent again, ROUNDS times at most.
        """
        source, target = self._source(volume), self._target(volume)
        holds = self._known[volume.name]
        converted = isinstance(source, guestview.GuestView)
        doing = f"{'converting' if converted else 'copying'} {volume.target}"
        for _ in range(ROUNDS):
            self._progress.phase(doing, target.size)
            ours = mover.copy(source, target, holds)
            wrong = self._compare(volume, ours, mover)
            if not wrong:
                self._there.remove_pieces(self._card(volume), volume.name)
                self._keep(volume, ours)
                self._journal.done("copying", volume=volume.name, root=ours.root())
                return msgspec.structs.replace(
                    volume, digest=ours.digest(), proof=self._proof
                )
            self._distrust(volume, wrong)
        raise errors.VerificationFailed(
            volume=volume.name,
            host=self._there.name,
            found=f"wrong in {len(wrong)} blocks",
            expected=ours.root(),
        )

    def _distrust(self, volume: model.TransferVolume, wrong: list[int]) -> None:
        LOG.warning(
            "operation=%s volume=%s %d blocks arrived wrong and are sent again",
            self._journal.operation,
            volume.name,
            len(wrong),
        )
        for index in wrong:
            self._known[volume.name].settled(index, manifest.UNKNOWN)

    def _compare(
        self,
        volume: model.TransferVolume,
        ours: manifest.Manifest,
        mover: stream.Mover,
    ) -> list[int]:
        """Return the blocks that the peer holds otherwise than they were sent."""
        if self._proof is Proof.NONE:
            return []
        self._progress.phase(f"verifying {volume.target}", ours.size)
        theirs = self._there.verify(
            self._journal.operation, self._card(volume), volume, mover, self._proof
        )
        if self._proof is Proof.SAMPLED:
            return [i for i in theirs.unlike(ours) if theirs[i] != manifest.UNKNOWN]
        return [] if theirs.root() == ours.root() else list(theirs.unlike(ours))

    def _keep(self, volume: model.TransferVolume, ours: manifest.Manifest) -> None:
        """Keep what the source's bytes are, for the day when it is retired."""
        backend, found = self._ours(volume)
        # The digests of what a guest sees are not those of its files.
        if self._here.options.keep_retired and not facts.is_converted(volume, found):
            digest = ours.digest()
            backend.update(msgspec.structs.replace(found, digest=digest))
            backend.keep_manifest(volume.source, ours)

    def _source(self, volume: model.TransferVolume) -> reading.Source:
        backend, ours = self._ours(volume)
        if facts.is_converted(volume, ours):
            return guestview.GuestView(backend.layers(ours.name), ours.size)
        return backend.source(ours, self._length(volume))

    def _target(self, volume: model.TransferVolume) -> writing.Target:
        return self._there.target(
            self._journal.operation,
            self._card(volume),
            volume,
            self._here.options.stream_length * MiB,
        )

    def _live(self, volume: model.TransferVolume) -> reading.Source | None:
        """Return a disk to read beside its guest; None where that gains nothing."""
        too_long = manifest.block_size_for(volume.length) > stream.HELD
        if too_long or volume.role in (Role.NVRAM, Role.CONFIG):
            # Long blocks are read twice, and must be the same both times.
            return None
        backend, ours = self._ours(volume)
        if facts.is_converted(volume, ours):
            return _below(backend, ours)
        return backend.live(ours, volume.length)


# Private


def _below(backend: base.Backend, top: model.Volume) -> reading.Source | None:
    """Return what stands still below the layer that a guest writes to.

    None without such layers, and where they show more than the layer does.
    """
    below = backend.chain(top.name)[1:]
    if not below or below[0].size > top.size:
        return None
    return guestview.GuestView(backend.layers(below[0].name), below[0].size)
