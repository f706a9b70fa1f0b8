# SPDX-License-Identifier: Apache-2.0
"""Where at the peer each disk of an instance comes to, and whether it is there
already."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

from virtmigrate import errors, guestview, model, node
from virtmigrate.backends import base
from virtmigrate.formats import DiskFormat
from virtmigrate.migration.inspection import NVRAM
from virtmigrate.model import Role
from virtmigrate.peer import Peer
from virtmigrate.placement import ANY, Demand

_Card = model.BackendCard


@dataclass(frozen=True)
class Landing:
    """A backend of the peer for one disk."""

    card: _Card
    shared: bool
    """Both hosts see it: nothing is copied."""
    converted: bool = False
    """What its guest sees is sent, as one raw volume, and not its layers."""


def choose(
    here: node.Node,
    there: Peer,
    record: model.Instance,
    card: model.HostCard,
    wanted: Demand = ANY,
    memories: Iterable[model.DiskRef] = (),
) -> dict[str, Landing]:
    """Return where the disks of an instance come to, by their targets.

    Arguments:
        card: the peer's.
        wanted: what its disks ask of the peer's backend.
        memories: files of memory of its snapshots, with targets of their own.

    Raises MigrationRefused.
    """
    chooser = _Chooser(here, there, record, card, wanted)
    wanted_places = (*record.disks, *memories)
    return {ref.target: chooser.landing(ref) for ref in wanted_places}


# Private


class _Chooser:
    def __init__(
        self,
        here: node.Node,
        there: Peer,
        record: model.Instance,
        card: model.HostCard,
        wanted: Demand,
    ) -> None:
        self._here = here
        self._there = there
        self._record = record
        self._card = card
        self._wanted = wanted
        self._seen: dict[str, model.BackendCard | None] = {}

    def landing(self, ref: model.DiskRef) -> Landing:
        backend = self._here.backend(ref.backend)
        seen = self._seen_there(backend)
        # NVRAM is written by both hosts' QEMU, and kept as it was by being copied.
        if (
            seen is not None
            and ref.target != NVRAM
            and self._lies_in(ref, backend)
            and _is_kept(ref, backend)
            and (_is_file(ref) or self._wanted.fits(seen.name, seen.traits))
        ):
            return Landing(seen, shared=True)
        return self._copied(ref, backend)

    # Private

    def _refuse(self, reason: str) -> errors.MigrationRefused:
        return errors.MigrationRefused(instance=self._record.uuid, reason=reason)

    def _seen_there(self, backend: base.Backend) -> model.BackendCard | None:
        """Return the peer's backend that is this one.

        A volume with a name that only we know, made here, is looked for there:
        paths, names and ids prove nothing.
        """
        if backend.name not in self._seen:
            self._seen[backend.name] = self._look(backend)
        return self._seen[backend.name]

    def _look(self, backend: base.Backend) -> model.BackendCard | None:
        with backend.disks.nonce() as nonce, _noted(backend) as note:
            for each in self._card.backends:
                seen = self._there.sees(each.disks, nonce)
                if note and seen != self._there.sees(each.records, note):
                    raise self._refuse(
                        f"backend {each.name} of {self._card.host} shares "
                        f"{'disks' if seen else 'records'} with {backend.name}, and "
                        "not both"
                    )
                if seen:
                    return each
        return None

    @staticmethod
    def _lies_in(ref: model.DiskRef, backend: base.Backend) -> bool:
        """Tell whether all of a disk lies in the pool that was proven.

        What does not, adopted volumes, is copied: that is right wherever they lie.
        """
        return all(v.pool == backend.disks.name for v in backend.chain(ref.volume))

    def _copied(self, ref: model.DiskRef, backend: base.Backend) -> Landing:
        """Return where a disk comes to that is sent: as it is, if that can be held.

        Files go where files are kept.
        """
        fitting = [
            each
            for each in self._card.backends
            if (each.files if _is_file(ref) else self._fits(each))
        ]
        formats = {volume.format for volume in backend.chain(ref.volume)}
        holding = [each for each in fitting if formats <= set(each.formats)]
        layered = DiskFormat.QCOW2 in formats
        if layered and (not holding or self._here.options.flatten_disks):
            return self._converted(ref, backend, fitting)
        return Landing(self._nearest(ref, backend, holding, formats), shared=False)

    def _converted(
        self, ref: model.DiskRef, backend: base.Backend, fitting: list[_Card]
    ) -> Landing:
        """Return where what the guest sees of a disk comes to."""
        holding = [each for each in fitting if DiskFormat.RAW in each.formats]
        formats = {volume.format for volume in backend.chain(ref.volume)}
        nearest = self._nearest(ref, backend, holding, formats)
        if reason := _unreadable(ref, backend):
            raise self._refuse(f"disk {ref.target} cannot be made raw: {reason}")
        return Landing(nearest, shared=False, converted=True)

    def _nearest(
        self,
        ref: model.DiskRef,
        backend: base.Backend,
        holding: list[_Card],
        formats: set[DiskFormat],
    ) -> _Card:
        """Return the backend of this name; one of this kind; any."""
        if not holding:
            wanted = ANY if _is_file(ref) else self._wanted
            raise self._refuse(
                f"host {self._card.host} has no {wanted} for disk {ref.target} "
                f"({', '.join(sorted(f.value for f in formats))})"
            )
        return min(holding, key=lambda each: self._distance(each, backend))

    def _fits(self, card: model.BackendCard) -> bool:
        return self._wanted.fits(card.name, card.traits)

    @staticmethod
    def _distance(card: model.BackendCard, backend: base.Backend) -> tuple[bool, bool]:
        return card.name != backend.name, card.kind != backend.kind


def _is_file(ref: model.DiskRef) -> bool:
    return ref.role in (Role.NVRAM, Role.CONFIG, Role.MEMORY)


def _is_kept(ref: model.DiskRef, backend: base.Backend) -> bool:
    """Tell whether a disk stays what it is, in its place, until the confirm."""
    can = backend.capabilities
    # Within one host's own storage a copy is better: it can grow, which LVM's volumes
    # with snapshots cannot.
    keeps = can.snapshots and can.shared
    return ref.role is Role.CONFIG or can.overlays or keeps


def _unreadable(ref: model.DiskRef, backend: base.Backend) -> str | None:
    """Return why this process cannot read what the guest sees of a disk."""
    chain = backend.chain(ref.volume)
    for each in chain:
        if backend.local_file(backend.pool(each.pool), each.name) is None:
            return f"this process may not read volume {each.name} directly"
    return guestview.obstacle(backend.layers(ref.volume), chain[0].size)


def _noted(backend: base.Backend) -> contextlib.AbstractContextManager[str]:
    """Prove the records likewise, where they lie apart from the disks."""
    if backend.records == backend.disks.name:
        return contextlib.nullcontext("")
    return backend.volumes.pool.nonce()
