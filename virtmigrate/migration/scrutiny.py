# SPDX-License-Identifier: Apache-2.0
"""What is checked of a transfer's record, before anything is done for it.

A peer wrote it: it is held to its own operation's volumes, and to what is the
instance's own on storage that both hosts see.
"""

import uuid as uuids

from virtmigrate import (
    domainxml,
    errors,
    mailbox,
    model,
    node,
    qcow2,
    record,
    snapshottree,
    wire,
)
from virtmigrate.backends import base, keeping
from virtmigrate.formats import DiskFormat
from virtmigrate.migration import trees
from virtmigrate.model import VolumeState


class Scrutiny:
    """Looks at one transfer's record, as this host sees what it names."""

    def __init__(self, here: node.Node, stored: record.Stored[model.Transfer]) -> None:
        self._here = here
        self._stored = stored
        self._transfer = stored.body

    def demand(self) -> None:
        """Refuse a record that names what is not its own: a peer wrote it."""
        if not is_uuid(self._transfer.instance) and not self._is_of_nobody():
            raise self.refusal(f"{self._transfer.instance!r} is no UUID")
        ending = f".{self._transfer.operation}"
        sent = {None, *(volume.name for volume in self._transfer.volumes)}
        for volume in self._transfer.volumes:
            if volume.shared or volume.held:
                continue
            if not volume.name.endswith(ending) or volume.backing not in sent:
                raise self.refusal(f"volume {volume.name} is not of this operation")
        if self._stored.name != self._transfer.operation:
            raise self.refusal(f"it is of operation {self._transfer.operation}")
        if self._transfer.record is not None:
            self._demand_instance(self._transfer.record)

    def image(self, volume: model.TransferVolume) -> model.Volume:
        """Return the record of an image that a disk stands on here."""
        found = self._backend(volume).volumes.read(volume.name).body
        said = (volume.format, volume.size, volume.digest, None)
        same = (found.format, found.size, found.digest, found.backing) == said
        if not same or not keeping.is_image(found):
            raise self.refusal(f"volume {volume.name} is not the image that it says")
        return found

    def demand_shared(self, volume: model.TransferVolume) -> None:
        """Refuse a volume that both hosts see, and that is not the instance's."""
        volumes = self._backend(volume).volumes
        found = volumes.read(volume.name).body
        # One over which nothing was put keeps what it stands on: it is transient.
        honest = self._is_own(found) and volume.backing in (None, found.backing)
        if volume.backing is not None:
            below = volumes.read(volume.backing).body
            frozen = below.state is VolumeState.FROZEN
            honest = honest and frozen and self._is_own(below)
        if not honest:
            raise self.refusal(f"volume {volume.name} is not the instance's")

    def recorded(self, volume: model.TransferVolume) -> model.Volume | None:
        """Return the record of a volume of ours; RecordBroken if it is another's."""
        found = self._backend(volume).volumes.find(volume.name)
        if found is None:
            return None
        owner = (found.body.owner, found.body.operation)
        if owner != (self._transfer.instance, self._transfer.operation):
            raise self.refusal(f"volume {volume.name} belongs to {owner}")
        return found.body

    def demand_self_contained(self, volume: model.TransferVolume, pool: str) -> None:
        """Refuse a qcow2 volume whose data would lie in a file that it names."""
        if volume.format is not DiskFormat.QCOW2:
            return
        place, doing = self._backend(volume).pool(pool), f"looking at {volume.name}"
        with place.opened(volume.name, doing) as (session, vol):
            objection = qcow2.objection(wire.download(session, vol, qcow2.HEADER))
        if objection:
            raise self.refusal(f"volume {volume.name} {objection}")

    def demand_no_variables(self, text: str) -> None:
        """Refuse a configuration whose firmware would write to a file of no record."""
        firmware = domainxml.firmware(text)
        if firmware and firmware.nvram:
            raise self.refusal(f"no record has its variables {firmware.nvram}")

    def demand_mergeable(
        self, top: model.Volume, below: model.Volume, disk: str
    ) -> None:
        """Refuse to write into what others may stand on.

        The disk is the layer on its frozen base; or the base, if that was merged.
        """
        frozen = disk == top.name and below.state is VolumeState.FROZEN
        if not (frozen or disk == below.name) or not self._is_own(below):
            raise self.refusal(
                f"volume {below.name} is {below.state.value}, {below.role.value} of "
                f"{below.owner}: {top.name} is not merged into it"
            )

    def refusal(self, reason: str) -> errors.RecordBroken:
        return errors.RecordBroken(
            host=self._here.name,
            pool=mailbox.MAILBOX,
            record=self._stored.name,
            reason=reason,
        )

    # Private

    def _is_of_nobody(self) -> bool:
        """Tell whether it brings nothing: so a host that wants an image only introduces
        itself, in the name of its operation."""
        moving = self._transfer.volumes or self._transfer.record or self._transfer.live
        return not moving and self._transfer.instance == self._transfer.operation

    def _backend(self, volume: model.TransferVolume) -> base.Backend:
        return self._here.backend(volume.backend)

    def _demand_instance(self, wanted: model.Instance) -> None:
        """Refuse an instance that is another, or has disks that were not sent."""
        if wanted.uuid != self._transfer.instance:
            raise self.refusal(f"it holds the record of instance {wanted.uuid}")
        text = str(wanted.domain_xml)
        if domainxml.uuid(text) != wanted.uuid:
            raise self.refusal("it holds the configuration of another instance")
        sent = {(v.name, v.backend) for v in self._transfer.volumes if not v.held}
        for ref in wanted.disks:
            if (ref.volume, ref.backend) not in sent:
                raise self.refusal(f"disk {ref.target} is not of this operation")
        self._demand_snapshots(wanted, sent)

    def _demand_snapshots(
        self, wanted: model.Instance, sent: set[tuple[str, str]]
    ) -> None:
        """Refuse a tree that holds what was not sent, and is not the instance's."""
        if wanted.change is not None or wanted.detached:
            raise self.refusal("its snapshots are not settled")
        problem = snapshottree.problem(wanted.snapshots, wanted.current)
        if problem:
            raise self.refusal(f"its snapshots are no tree: {problem}")
        held = snapshottree.volumes(wanted.snapshots, *snapshottree.Place)
        for backend, volume in sorted(held | snapshottree.memories(wanted.snapshots)):
            if (volume, backend) in sent:
                continue
            found = self._here.backend(backend).volumes.find(volume)
            if found is None or not self._is_own(found.body):
                raise self.refusal(f"snapshots hold {volume}, not of this operation")
        for each in wanted.snapshots:
            found_amiss = trees.obstacles(wanted, each)
            if found_amiss:
                raise self.refusal(f"snapshot {each.name}: {'; '.join(found_amiss)}")

    def _is_own(self, volume: model.Volume) -> bool:
        return (
            volume.owner == self._transfer.instance
            and volume.role is not model.Role.IMAGE
        )


def is_uuid(text: str) -> bool:
    """Tell whether a text is a UUID in its usual form."""
    try:
        return str(uuids.UUID(text)) == text
    except ValueError:
        return False
