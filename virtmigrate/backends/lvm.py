# SPDX-License-Identifier: Apache-2.0
"""Volumes as logical volumes of a volume group that one host has.

Disks, records and what arrives lie in the group, in one pool of libvirt: an upload
makes libvirt list the group, and open no volume. A volume takes all of its size at
once and shows what was there before, so it is zeroed before anybody uses it.
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec
from oslo_log import log as logging

from virtmigrate import (
    domainxml,
    errors,
    known,
    model,
    poolxml,
    reading,
    storagepool,
    stream,
)
from virtmigrate.backends import base, clearing, group, keeping, terms
from virtmigrate.formats import DiskFormat
from virtmigrate.host import Host
from virtmigrate.model import VolumeState

LOG = logging.getLogger(__name__)


class LvmBackend(base.Backend):
    """A volume group of this host."""

    kind = "lvm"
    capabilities = terms.Capabilities(
        formats=(DiskFormat.RAW,),
        overlays=False,
        snapshots=True,
        shared=False,
        streams=True,
        thick=True,
        files=False,
        nested=False,
    )
    cloning: Mapping[str, terms.Clones] = {
        "auto": terms.Clones.COPY,
        "copy": terms.Clones.COPY,
        "snapshot": terms.Clones.SNAPSHOT,
    }

    def __init__(self, host: Host, settings: terms.Settings) -> None:
        self.group: str = settings.options["lvm_group"]
        self._clear: str = settings.options["volume_clear"]
        self._clearing = clearing.Clearing(self._wipe)
        self._volumes = group.GroupPool(
            host,
            f"virtmigrate-{settings.name}-disks",
            self.group,
            settings.ownership,
            settings.busy_timeout,
        )
        super().__init__(host, settings)
        # An upload makes libvirt open no other volume.
        self.incoming = self._volumes
        self.disks = self._volumes

    def pool(self, name: str) -> storagepool.Pool:
        if name == self._volumes.name:
            return self._volumes
        if name == f"virtmigrate-{self.name}-records":
            ours = self._volumes
            return group.RecordPool(
                self.host, ours.name, self.group, ours.ownership, ours.busy_timeout
            )
        return super().pool(name)

    @property
    def records(self) -> str:
        return self.disks.name

    def ensure(self) -> None:
        try:
            self.disks.ensure_defined(poolxml.logical(self.disks.name, self.group))
        except errors.LibvirtFailed as e:
            raise errors.ConfigurationError(
                reason=f"backend {self.name}: libvirt on {self.host.name} has no pool "
                f"of volume group {self.group} for it: see that the group is there, "
                f"and that no other pool of libvirt has it (virsh pool-list --all): {e}"
            ) from e
        # A killed process may have renamed a volume, or made it longer.
        self.disks.refresh()
        super().ensure()

    def close(self) -> None:
        self._clearing.close()

    def storage(self) -> str:
        return f"{self.host.name}/lvm {self.group}"

    def granularity(self) -> int:
        return self._volumes.extent()

    def layer(self, volume: model.Volume) -> domainxml.Layer:
        return domainxml.Layer(
            type=domainxml.SourceType.BLOCK,
            source=self.path(volume),
            fmt=volume.format,
        )

    def path(self, volume: model.Volume) -> str:
        return self.disks.volume_path(volume.name)

    def accept(self, name: str) -> tuple[str, str]:
        return self.disks.name, self.disks.volume_path(name)

    def persist(self, pool: str, name: str) -> bool:
        if not self.disks.is_local():
            return False
        with self._volumes.device(name, os.O_RDONLY) as fd:
            if fd is None:
                # Waits for all of the machine's storage, and needs no right.
                os.sync()
            else:
                os.fsync(fd)
        return True

    def local_file(self, pool: storagepool.Pool, name: str) -> Path | None:
        if pool.name != self.disks.name:
            return None
        with (
            contextlib.suppress(errors.VolumeNotFound),
            self._volumes.device(name, os.O_RDONLY) as fd,
        ):
            if fd is not None:
                return Path(self._volumes.volume_path(name))
        return None

    # Records

    def chain(self, name: str) -> tuple[model.Volume, ...]:
        found = super().chain(name)
        for volume in found:
            if volume.state is VolumeState.DOOMED:
                raise errors.VolumeNotFound(
                    host=self.host.name, pool=self.disks.name, volume=volume.name
                )
        return found

    # Clones

    def users(self, name: str) -> set[str]:
        found = super().users(name)
        # LVM removes a volume's snapshots with it, and asks nobody.
        clones = self._volumes.snapshots(name)
        return found | {each for each in clones if not group.is_state(each)}

    # States

    def keep_state(self, name: str, operation: str) -> None:
        stored = self.volumes.find(name)
        if stored is not None and stored.body.parent is not None:
            raise self._refused(f"keep the state of {name}", "it is a snapshot itself")
        state = group.state_name(name, operation)
        self._await_wiped({state})
        # libvirt does not see one that overflowed.
        self._demand_whole(state)
        with contextlib.suppress(errors.VolumeExists):
            self._volumes.keep(name, state)

    def restore_state(self, name: str, operation: str, *, keep: bool = False) -> None:
        state = group.state_name(name, operation)
        # One that is being wiped was restored.
        if self.volumes.find(state) is None and state in self._volumes.states(name):
            self._demand_whole(state)
            self._copy_back(name, state)
            self.persist(self.disks.name, name)
        if not keep:
            self.drop_state(name, operation)

    def drop_state(self, name: str, operation: str) -> None:
        state = group.state_name(name, operation)
        if state in self._volumes.states(name):
            self._drop(name, state)

    def state(self, name: str, operation: str, size: int) -> reading.Source:
        kept = group.state_name(name, operation)
        # One that overflowed fails each read from then on.
        self._demand_whole(kept)
        return self._reader(kept, size)

    # Removing

    def remove(self, name: str) -> None:
        self._demand_unused(name)
        self._drop_retired(name)
        for state in self._volumes.states(name):
            self._drop(name, state)
        stored = None
        with contextlib.suppress(errors.RecordBroken):
            stored = self.volumes.find(name)
        if stored is None or self._clear == "none" or not self.disks.has(name):
            super().remove(name)
            return
        if stored.body.state is not VolumeState.DOOMED:
            doomed = msgspec.structs.replace(
                stored.body, state=VolumeState.DOOMED, holds=()
            )
            self.update(doomed)
            self._records.delete(keeping.manifest_name(name))
        self._clearing.add(name)

    def drain(self, timeout: float = 3600.0) -> bool:
        return self._clearing.wait(timeout)

    def sweep(self) -> None:
        super().sweep()
        for stored in self.catalog.all():
            if stored.body.state is VolumeState.DOOMED:
                self._clearing.add(stored.name)

    # What earlier moves left

    def set_aside(
        self, retired: model.Volume, aside: str, name: str, size: int
    ) -> terms.Reuse:
        # A snapshot of LVM cannot change its size, and what arrives has no record that
        # says on what it stands.
        self._demand(retired.parent is None, f"rename {retired.name}, a clone")
        self._demand_managed(f"rename {retired.name}")
        self._demand_no_state(retired.name)
        # Who was killed may not have told libvirt.
        self.disks.refresh()
        present, found = set(self.disks.names()), terms.Reuse.MOVED
        if retired.name in present:
            self._volumes.rename(retired.name, aside)
        elif aside in present:
            found = terms.Reuse.UNPROVEN
        else:
            return terms.Reuse.SWITCHED if name in present else terms.Reuse.GONE
        self._volumes.resize(aside, size)
        return found

    def switch(self, aside: str, name: str) -> None:
        self._demand_managed(f"rename {aside}")
        self._volumes.rename(aside, name)

    def grow(self, name: str, size: int) -> None:
        """Make an incoming volume longer; zeros are added. Raises Unsupported."""
        self._demand_managed(f"grow {name}")
        self._demand_no_state(name)
        self._volumes.resize(name, max(size, self.disks.physical(name)))

    # Private

    def _copy_back(self, name: str, state: str) -> None:
        """Make a volume what its state is; what is equal already is not written."""
        size = self.disks.physical(name)
        with stream.Mover() as mover:
            now = mover.survey(self._reader(name, size))
            before = mover.copy(
                self._reader(state, size), self.target(name, size), known.Known(now)
            )
            found = mover.survey(self._reader(name, size))
        if found.root() != before.root():
            raise errors.VerificationFailed(
                volume=state,
                host=self.host.name,
                found=found.root(),
                expected=before.root(),
            )

    def _reader(self, name: str, size: int) -> reading.Source:
        path = self.local_file(self.disks, name)
        if path is not None:
            return reading.FileSource(path, size)
        return reading.VolumeSource(self.disks, name, size)

    def _drop(self, name: str, state: str) -> None:
        """Delete a state, wiped where volumes are; can be called again."""
        if self._volumes.is_overflowed(state):
            self._volumes.remove_overflowed(state)
        elif self._doom(name, state):
            self._clearing.add(state)
        else:
            self.disks.delete(state)

    def _doom(self, name: str, state: str) -> bool:
        """Note that a state is none any more, before it is wiped; False where it need
        not or cannot be wiped."""
        stored = None
        with contextlib.suppress(errors.RecordBroken):
            stored = self.volumes.find(name)
        if stored is None or self._clear == "none":
            return False
        doomed = msgspec.structs.replace(
            stored.body,
            name=state,
            path=self.disks.volume_path(state),
            state=VolumeState.DOOMED,
            holds=(),
        )
        if self.volumes.find(state) is None:
            try:
                self.update(doomed)
            except errors.NoSpace as e:
                LOG.warning("volume=%s goes without being wiped: %s", state, e)
                return False
        return True

    def _await_wiped(self, states: set[str]) -> None:
        """Wait until those of some states that were dropped are gone."""
        if any(self.volumes.find(state) for state in states):
            self.drain()
        for state in states:
            if self.volumes.find(state) is not None:
                raise errors.StorageError(
                    host=self.host.name,
                    pool=self.disks.name,
                    reason=f"{state} was dropped, and is not wiped yet; see the log",
                )

    def _demand_whole(self, state: str) -> None:
        if self._volumes.is_overflowed(state):
            raise errors.StorageError(
                host=self.host.name,
                pool=self.disks.name,
                reason=f"{state} ran out of room: what it kept is lost. The volume is "
                "as it was; drop the state",
            )

    def _demand_no_state(self, name: str) -> None:
        self._await_wiped(self._volumes.states(name))
        if states := self._volumes.states(name):
            raise self._refused(
                f"change the size of {name}, or its name",
                f"{', '.join(sorted(states))} is kept, and is a snapshot of it",
            )

    def _refused(self, operation: str, reason: str) -> errors.Unsupported:
        return errors.Unsupported(backend=self.name, operation=operation, reason=reason)

    def _clone_record(self, image: model.Volume, volume: model.Volume) -> model.Volume:
        found = super()._clone_record(image, volume)
        snapshots = self.capabilities.clones is terms.Clones.SNAPSHOT
        if not snapshots or image.size < volume.size or not self._volumes.is_managed():
            return found
        return msgspec.structs.replace(found, parent=image.name)

    def _create_clone(
        self, image: model.Volume, volume: model.Volume, mover: stream.Mover
    ) -> None:
        if volume.parent:
            self._volumes.create_snapshot(image.name, volume.name)
        else:
            super()._create_clone(image, volume, mover)

    def _reclaim(self, volume: model.Volume) -> int:
        freed = super()._reclaim(volume)
        # The room is free when the volume is gone.
        self.drain()
        return freed

    def _wipe(self, name: str) -> None:
        """Wipe and delete a doomed volume; can be called again."""
        stored = self.volumes.find(name)
        if stored is None or stored.body.state is not VolumeState.DOOMED:
            return
        self._demand_unused(name)
        with contextlib.suppress(errors.VolumeNotFound):
            if self._volumes.is_open(name):
                raise errors.StorageError(
                    host=self.host.name,
                    pool=self.disks.name,
                    reason=f"{name} is removed, and somebody still has it open",
                )
            if self._clear != "discard" or not self._volumes.discard(name):
                self._volumes.wipe(name, self.disks.physical(name))
        super().remove(name)

    def _demand_managed(self, operation: str) -> None:
        if not self._volumes.is_managed():
            raise errors.Unsupported(
                backend=self.name,
                operation=operation,
                reason="libvirt cannot do that, and LVM's own commands need root on "
                f"{self.host.name}",
            )
