# SPDX-License-Identifier: Apache-2.0
"""What a backend is: few primitives, defaults that are right everywhere.

A backend is one configured place for volumes on one host. Differences between
kinds are data, asked before acting: `capabilities`.
"""

import abc
import contextlib
import functools
from collections.abc import Callable

from oslo_log import log as logging

from virtmigrate import (
    domainxml,
    errors,
    manifest,
    model,
    reading,
)
from virtmigrate.backends import keeping, layout, making
from virtmigrate.backends.terms import Reuse, Settings
from virtmigrate.host import Host
from virtmigrate.locks import FileLocks, Locks, Mechanism

LOG = logging.getLogger(__name__)

_LOWER = (model.VolumeState.FROZEN, model.VolumeState.RETIRED)
"""States of volumes, images aside, that others may stand on."""


class Backend(making.Making):
    """One place for volumes on one host. Safe to share between threads.

    Volumes are found through their records; what has no record does not exist
    for us, and is never touched.
    """

    def __init__(self, host: Host, settings: Settings) -> None:
        super().__init__(host, settings)
        self.layout = layout.Keeper(self.name, self._records, settings.record_grace)
        self.tenures = layout.Tenures(self._records, settings.record_grace)
        """Who may run the instances whose disks lie here, where hosts share them."""
        self.images = keeping.Images(self.name, self.volumes, self.catalog)
        """What peers count on."""
        self.claims = keeping.Claims()
        """On retired volumes that are being reused or removed."""

    def close(self) -> None:
        """Close connections of its own."""

    @functools.cached_property
    def locks(self) -> Locks:
        """Locks by name, which reach as far as `capabilities.locks` says."""
        return Locks(self._lock_mechanism(), self.host.name, self.name)

    # What a kind must say

    @abc.abstractmethod
    def ensure(self) -> None:
        """Make the pools if they are not there; nothing happens the second time.

        A kind makes its pools, then calls this one. Raises LayoutRefused for
        volumes and records that are laid out otherwise than this release knows.
        """
        self.layout.ensure()

    @abc.abstractmethod
    def layer(self, volume: model.Volume) -> domainxml.Layer:
        """Return how a domain names the volume."""

    @abc.abstractmethod
    def accept(self, name: str) -> tuple[str, str]:
        """Move a proven volume from incoming to where disks lie.

        Returns the pool's name and the path where it lies now. Can be called
        again. Where this process lacks the right, the volume stays where it is.
        """

    @abc.abstractmethod
    def persist(self, pool: str, name: str) -> bool:
        """Fsync a volume; False when this process cannot."""

    @property
    def records(self) -> str:
        """The name of the pool of the records; that of the disks, if they lie there."""
        return self._records.name

    # Other hosts

    def clients(self, name: str) -> set[str]:
        """Return what the storage calls those that have a volume open to write to it.

        This process is left out. Raises Unsupported.
        """
        raise self._unsupported(f"tell who has {name} open")

    def fence(self, clients: set[str]) -> None:
        """Have the storage refuse what these write from now on.

        It has done so when this returns; what they wrote before stays. Raises
        Unsupported.
        """
        raise self._unsupported("keep another host from writing")

    # Records

    def keep_state(self, name: str, operation: str) -> None:
        """Keep a volume as it is now, for an operation; nothing happens twice.

        Nobody may be writing to it. Raises Unsupported.
        """
        raise self._unsupported(f"keep the state of {name}")

    def restore_state(self, name: str, operation: str, *, keep: bool = False) -> None:
        """Make a volume what it was when an operation kept it.

        Drops what was kept, unless it is to be kept on. Nothing happens without such a
        state. Nobody may be using the volume. Other states of it stay.
        """
        raise self._unsupported(f"restore the state of {name}")

    def drop_state(self, name: str, operation: str) -> None:
        """Drop what an operation kept of a volume; can be called again."""
        raise self._unsupported(f"drop the state of {name}")

    def state(self, name: str, operation: str, size: int) -> reading.Source:
        """Return what an operation kept of a volume, to read. Raises Unsupported.

        Arguments:
            size: bytes that the volume had then.
        """
        raise self._unsupported(f"read a state of {name}")

    def update(self, volume: model.Volume) -> model.Volume:
        """Publish a new generation of a volume's record."""
        stored = self.volumes.find(volume.name)
        after = stored.generation if stored else 0
        self.volumes.publish(volume.name, volume, after=after)
        self.volumes.prune(volume.name)
        return volume

    def remove(self, name: str) -> None:
        """Delete a volume, its manifest, then its record; can be called again.

        Where its bytes are wiped it is doomed at once, and gone later: see drain().
        Raises VolumeInUse for one that others stand on, and touches nothing then. Only
        an image stays for retired copies: those that stand on anything else go first.
        """
        self._demand_unused(name)
        self._drop_retired(name)
        self._delete(name)

    def drain(self, timeout: float = 3600.0) -> bool:
        """Wait until what was removed is gone; False when `timeout` seconds are over.

        What could not be wiped stays doomed until the next sweep().
        """
        return True

    def sweep(self) -> None:
        """Remove what killed proofs of this host left in the backend's pools.

        Goes on with what is doomed.
        """
        for pool in (self.disks, self.incoming, self._records):
            pool.remove_nonces()

    def chain(self, name: str) -> tuple[model.Volume, ...]:
        """Return a volume and all below it, top first, from their records."""
        chain: list[model.Volume] = []
        following: str | None = name
        while following is not None:
            if any(volume.name == following for volume in chain):
                raise errors.RecordBroken(
                    **self._where(name), reason="its backing chain is a circle"
                )
            chain.append(self.volumes.read(following).body)
            following = chain[-1].backing
        return tuple(chain)

    def layers(self, name: str) -> tuple[domainxml.Layer, ...]:
        """Return the chain of a volume as a domain names it."""
        return tuple(self.layer(volume) for volume in self.chain(name))

    def granularity(self) -> int:
        """Return the bytes that sizes of raw volumes are multiples of."""
        return 1

    def storage(self) -> str:
        """Return what tells the storage that this takes room from from all others."""
        return f"{self.host.name}/{self.disks.name}"

    def room(self) -> int:
        """Return the bytes that may still be promised, before reservations."""
        return max(0, self.disks.room().free - self.settings.reserved)

    # Manifests

    def keep_manifest(self, name: str, found: manifest.Manifest) -> None:
        """Keep the digests of a volume's blocks; the last one of a name stays."""
        keeping.write_manifest(self._records, name, found)

    def manifest(self, name: str) -> manifest.Manifest | None:
        """Return the kept manifest of a volume; None where it proves nothing.

        It is believed when its root is the one in the record, and that came by a
        full proof.
        """
        stored = self.volumes.find(name)
        if stored is None or stored.body.proof is not model.Proof.FULL:
            return None
        return keeping.read_manifest(self._records, name, stored.body.digest)

    # What earlier moves left

    def retired(self, owner: str | None = None) -> list[model.Volume]:
        """Return retired volumes, of one instance or all; the oldest first."""
        found = [
            fresh
            for stored in self.catalog.all()
            if _is_retired(stored.body, owner)
            # What is acted upon is what stands there now, not what was remembered.
            and (fresh := self.volumes.find(stored.name)) is not None
            and _is_retired(fresh.body, owner)
        ]
        found.sort(key=self.volumes.written)
        return [stored.body for stored in found]

    def set_aside(
        self, retired: model.Volume, aside: str, name: str, size: int
    ) -> Reuse:
        """Move a retired volume to the name `aside` in incoming, of size bytes.

        Its bytes are cut, or zeros are added. The record stays, for the caller to
        remove. Can be called again, also after switch() made it `name`. Raises
        Unsupported where only libvirt could do that: it has no switch() that never
        replaces what the source made meanwhile.
        """
        raise self._unsupported(f"rename {retired.name}")

    def switch(self, aside: str, name: str) -> None:
        """Make what was set aside the incoming volume `name`, in one step.

        Raises VolumeExists when there is one of this name: it is never replaced.
        """
        raise self._unsupported(f"rename {aside}")

    def reclaim(self, enough: Callable[[int], bool], last: str = "") -> int:
        """Remove retired volumes, the oldest first, until it is enough.

        Arguments:
            enough: asked with the bytes that were freed, before each.
            last: the instance whose volumes go after all others.

        Returns the bytes that were freed.
        """
        freed = 0
        for volume in sorted(self.retired(), key=lambda each: each.owner == last):
            if enough(freed):
                break
            with self.claims.of(volume.name) as is_ours:
                if is_ours:
                    # What others stand on frees nothing.
                    with contextlib.suppress(errors.VolumeInUse):
                        freed += self._reclaim(volume)
        return freed

    # Private

    def _lock_mechanism(self) -> Mechanism:
        # Not beside the volumes: not every process of this host may write there.
        return FileLocks(self.settings.lock_path)

    def _demand_unused(self, name: str) -> None:
        """Raise VolumeInUse for one that volumes of others stand on.

        Only an image is one, or what was frozen below a layer, retired by now or not.
        """
        volume = self._lower(name)
        if volume is None:
            return
        users = self.users(name) - self._of_owner(volume.owner)
        if users and not making.is_image(volume):
            users -= {each.name for each in self.retired()}
        if users:
            raise self._in_use(volume, users)

    def _drop_retired(self, name: str) -> None:
        """Remove retired copies of others that stand on a volume; VolumeInUse for one
        that is being brought out."""
        volume = self._lower(name)
        if volume is None or making.is_image(volume):
            return
        users = self.users(name) - self._of_owner(volume.owner)
        for retired in [each for each in self.retired() if each.name in users]:
            with self.claims.of(retired.name) as is_ours:
                if not is_ours:
                    raise self._in_use(volume, {retired.name})
                self._reclaim(retired)

    def _lower(self, name: str) -> model.Volume | None:
        """Return a volume that others may stand on; None for any other."""
        with contextlib.suppress(errors.RecordBroken):
            stored = self.volumes.find(name)
            is_lower = stored and (
                making.is_image(stored.body) or stored.body.state in _LOWER
            )
            return stored.body if stored and is_lower else None
        return None

    def _in_use(self, volume: model.Volume, users: set[str]) -> errors.VolumeInUse:
        return errors.VolumeInUse(
            host=self.host.name,
            pool=volume.pool,
            volume=volume.name,
            users=", ".join(sorted(users)),
        )

    def _of_owner(self, owner: str) -> set[str]:
        """Return the volumes of an instance; they go together, in any order."""
        found = (stored.body for stored in self.catalog.all())
        return {each.name for each in found if owner and each.owner == owner}

    def _reclaim(self, volume: model.Volume) -> int:
        """Remove a retired volume; return the bytes that it took."""
        stored, freed = self.volumes.find(volume.name), 0
        if stored is None or not _is_retired(stored.body, volume.owner):
            return 0
        with contextlib.suppress(errors.VolumeNotFound):
            freed = self.pool(volume.pool).allocated(volume.name)
        self.remove(volume.name)
        LOG.info("host=%s retired volume=%s removed", self.host.name, volume.name)
        return freed

    def _where(self, name: str) -> dict[str, str]:
        return {
            "host": self.host.name,
            "pool": self._records.name,
            "record": name,
        }


# Private


def _is_retired(volume: model.Volume, owner: str | None) -> bool:
    return volume.state is model.VolumeState.RETIRED and owner in (None, volume.owner)
