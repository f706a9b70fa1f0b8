# SPDX-License-Identifier: Apache-2.0
"""A layer over a shared disk becomes one with the disk below it, while its guest runs.

Another host that takes the instance over goes by the tenure, and must find there what
holds all that the guest wrote. So the guest stands still from when both do until the
lower one is the disk. In this order, and each step can be done again:

1. QEMU copies the layer down; what the guest writes follows.
2. The layer's record says that it is being merged, and the guest is paused: by that
   record the next attempt knows who paused it.
3. The lower one is durable, its record has the size that it grew to, and the tenure
   names it.
4. QEMU has it as the disk, and the guest goes on.
5. The instance's record names it; it is frozen no more; the layer is removed.
"""

import msgspec
from oslo_log import log as logging

from virtmigrate import errors, model, node, snapshottree
from virtmigrate.backends import base
from virtmigrate.instance import Power
from virtmigrate.migration.scrutiny import Scrutiny
from virtmigrate.model import VolumeState

LOG = logging.getLogger(__name__)


class Merge:
    """One layer that came with a move.

    Arguments:
        backend: where it lies.
        volume: the layer, and the disk that it is the top of.
    """

    def __init__(
        self,
        here: node.Node,
        scrutiny: Scrutiny,
        backend: base.Backend,
        volume: model.TransferVolume,
    ) -> None:
        self._here = here
        self._scrutiny = scrutiny
        self._backend = backend
        self._volume = volume
        self._domains = here.domains

    def run(self, uuid: str) -> bool:
        """Merge it; False when that has to wait: for its guest, which is off, or QEMU,
        for a change of snapshots that is not finished, or for the end of a destroy that
        was killed.

        One that snapshots hold, or have merged or left, is a layer like any other.
        After a failure, once the tenure may name the lower one, the guest stands still
        until the next call.
        """
        stored = self._here.entitled(uuid)
        top = self._scrutiny.recorded(self._volume)
        if top is None or top.backing is None:
            return True
        if stored.change is not None or not self._domains.exists(uuid):
            return False
        if not self._is_for_us(stored, top):
            return True
        below = self._backend.volumes.read(top.backing).body
        self._scrutiny.demand_mergeable(top, below, self._disk(stored))
        merged = msgspec.structs.replace(stored, disks=self._disks(stored, below))
        target, path = self._volume.target, self._backend.path(below)
        if not self._domains.has_top(uuid, target, path):
            if not self._is_up(uuid, top):
                return False
            if not self._domains.commit_layer(uuid, target):
                return False
            self._exchange(merged, top, below)
        if self._is_paused_by_us(uuid, top):
            self._domains.unpause(uuid)
        self._finish(merged, below)
        return True

    # Private

    def _is_for_us(self, stored: model.Instance, top: model.Volume) -> bool:
        """Tell whether nothing but a disk needs the layer, or what it is merged to."""
        held = snapshottree.volumes(stored.snapshots, *snapshottree.Place)
        used = self._disk(stored) in (top.name, top.backing)
        return used and (self._backend.name, top.name) not in held

    def _disk(self, stored: model.Instance) -> str:
        """Return the volume that the disk of this target is, by our own record."""
        target = self._volume.target
        found = [ref.volume for ref in stored.disks if ref.target == target]
        return found[0] if found else ""

    def _disks(
        self, stored: model.Instance, below: model.Volume
    ) -> tuple[model.DiskRef, ...]:
        return tuple(
            msgspec.structs.replace(ref, volume=below.name)
            if ref.volume == self._volume.name
            else ref
            for ref in stored.disks
        )

    def _is_up(self, uuid: str, top: model.Volume) -> bool:
        running = self._domains.power(uuid) is Power.RUNNING
        return running or self._is_paused_by_us(uuid, top)

    def _is_paused_by_us(self, uuid: str, top: model.Volume) -> bool:
        now = self._backend.volumes.read(top.name).body
        paused = self._domains.power(uuid) is Power.PAUSED
        return paused and now.state is VolumeState.MERGING

    def _exchange(
        self, merged: model.Instance, top: model.Volume, below: model.Volume
    ) -> None:
        """Make the lower one the disk; its guest stands still when this returns."""
        uuid, target = merged.uuid, self._volume.target
        marked = msgspec.structs.replace(top, state=VolumeState.MERGING)
        self._backend.update(marked)
        self._domains.pause(uuid)
        try:
            self._make_whole(uuid, below)
        except errors.Error:
            if top.state is not VolumeState.MERGING:
                # No earlier attempt came further, so the layer is the disk still.
                self._domains.unpause(uuid)
                self._backend.update(top)
            raise
        self._here.tenures.amend(merged)
        if not self._domains.pivot(uuid, target, self._backend.path(below)):
            raise self._stuck(uuid, "QEMU does not take the lower volume")

    def _make_whole(self, uuid: str, below: model.Volume) -> None:
        """Have the lower one hold, durable, all that the guest wrote until now."""
        if not self._domains.commit_layer(uuid, self._volume.target):
            raise self._stuck(uuid, "its last writes do not come down")
        self._backend.persist(below.pool, below.name)
        grown = msgspec.structs.replace(below, size=self._volume.size, digest=None)
        self._backend.update(grown)

    def _stuck(self, uuid: str, reason: str) -> errors.InvalidState:
        return errors.InvalidState(
            instance=uuid,
            host=self._here.name,
            state="paused",
            reason=f"merging the layer of {self._volume.target}: {reason}. Settling "
            "goes on with it",
        )

    def _finish(self, merged: model.Instance, below: model.Volume) -> None:
        # In this order: until the layer is gone, its base is frozen or the disk.
        self._here.publish_instance(merged)
        usable = msgspec.structs.replace(
            below, size=self._volume.size, state=VolumeState.USABLE, digest=None
        )
        self._backend.update(usable)
        self._backend.remove(self._volume.name)
