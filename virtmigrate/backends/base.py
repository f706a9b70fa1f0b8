# SPDX-License-Identifier: Apache-2.0
"""What a backend is: few primitives, defaults that are right everywhere.

A backend is one configured place for volumes on one host. Differences between
kinds are data, asked before acting: `capabilities`.
"""

import abc
import contextlib
from dataclasses import dataclass
from pathlib import Path

from oslo_log import log as logging

from virtmigrate import domainxml, errors, model, record, storagepool
from virtmigrate.formats import DiskFormat
from virtmigrate.host import Host

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Capabilities:
    """What a kind of backend can do."""

    formats: tuple[DiskFormat, ...]
    """Formats that its volumes may have."""
    overlays: bool
    """A volume can be frozen below a new layer, and the layer dropped or merged."""
    files: bool
    """It can hold NVRAM, memory images and records of instances."""


@dataclass(frozen=True)
class Settings:
    """A backend's group of options."""

    name: str
    path: str
    ownership: storagepool.Ownership
    reserved: int
    busy_timeout: float
    record_grace: float


class Backend(abc.ABC):
    """One place for volumes on one host. Safe to share between threads.

    Volumes are found through their records; what has no record does not exist
    for us, and is never touched.
    """

    kind: str
    capabilities: Capabilities

    def __init__(self, host: Host, settings: Settings) -> None:
        self.host = host
        self.settings = settings
        self.name = settings.name
        self.disks = self.pool(f"virtmigrate-{self.name}-disks")
        self.incoming = self.pool(f"virtmigrate-{self.name}-incoming")
        self._records = self.pool(f"virtmigrate-{self.name}-records")
        self.volumes = record.Store(
            self._records, model.Volume, grace=settings.record_grace
        )

    # What a kind must say

    @abc.abstractmethod
    def ensure(self) -> None:
        """Make the pools if they are not there; nothing happens the second time."""

    @abc.abstractmethod
    def layer(self, volume: model.Volume) -> domainxml.Layer:
        """Return how a domain names the volume."""

    @abc.abstractmethod
    def path(self, volume: model.Volume) -> str:
        """Return where this host's QEMU finds the volume."""

    @abc.abstractmethod
    def accept(self, name: str) -> tuple[str, str]:
        """Move a proven volume from incoming to where disks lie.

        Returns the pool's name and the path where it lies now. Can be called
        again. Where this process lacks the right, the volume stays where it is.
        """

    @abc.abstractmethod
    def persist(self, pool: str, name: str) -> bool:
        """Fsync a volume; False when this process cannot."""

    @abc.abstractmethod
    def local_file(self, pool: storagepool.Pool, name: str) -> Path | None:
        """Return the volume's file if this process may read it directly."""

    # Records

    def allocate(self, volume: model.Volume) -> model.Volume:
        """Publish the record as incomplete, then create the volume, raw and sparse.

        On failure nothing of it stays.
        """
        self.volumes.publish(volume.name, volume)
        try:
            self.pool(volume.pool).create_raw(volume.name, volume.size)
        except BaseException:
            self.volumes.remove(volume.name)
            raise
        return volume

    def overlay(self, volume: model.Volume, base: model.Volume) -> model.Volume:
        """Create a qcow2 layer over base, which must not change any more.

        Raises Unsupported. On failure nothing of it stays.
        """
        self._demand(self.capabilities.overlays, "put a layer over a volume")
        self.volumes.publish(volume.name, volume)
        try:
            self.pool(volume.pool).create_overlay(
                volume.name, volume.size, self.path(base), base.format.value
            )
        except BaseException:
            self.volumes.remove(volume.name)
            raise
        return volume

    def update(self, volume: model.Volume) -> model.Volume:
        """Publish a new generation of a volume's record."""
        stored = self.volumes.find(volume.name)
        after = stored.generation if stored else 0
        self.volumes.publish(volume.name, volume, after=after)
        self.volumes.prune(volume.name)
        return volume

    def remove(self, name: str) -> None:
        """Delete a volume and then its record; can be called again."""
        with contextlib.suppress(errors.RecordBroken):
            # A record that was never whole is older than any volume of its name.
            stored = self.volumes.find(name)
            if stored is not None:
                self.pool(stored.body.pool).delete(name)
        self.volumes.remove(name)

    def sweep(self) -> None:
        """Remove what killed proofs of this host left in the backend's pools."""
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

    def room(self) -> int:
        """Return the bytes that may still be promised, before reservations."""
        return max(0, self.disks.room().free - self.settings.reserved)

    def pool(self, name: str) -> storagepool.Pool:
        """Return one of the host's pools by name."""
        return storagepool.Pool(
            self.host,
            name,
            ownership=self.settings.ownership,
            busy_timeout=self.settings.busy_timeout,
        )

    # Private

    def _demand(self, capability: bool, operation: str) -> None:
        if not capability:
            raise errors.Unsupported(
                backend=self.name, operation=operation, reason=f"kind {self.kind}"
            )

    def _where(self, name: str) -> dict[str, str]:
        return {
            "host": self.host.name,
            "pool": self._records.name,
            "record": name,
        }
