# SPDX-License-Identifier: Apache-2.0
"""The memory of a snapshot, where it is kept in a file of its own."""

import msgspec

from virtmigrate import errors, model
from virtmigrate.formats import DiskFormat
from virtmigrate.model import Role, VolumeState
from virtmigrate.snapshot.work import Work
from virtmigrate.snapshottree import Memory, Snapshot


def planned(work: Work, snapshot: Snapshot) -> model.Volume:
    """Return the record of a file that is to be written."""
    pool = work.here.files.disks
    return model.Volume(
        name=snapshot.memory_volume,
        pool=pool.name,
        path=pool.volume_path(snapshot.memory_volume),
        format=DiskFormat.RAW,
        role=Role.MEMORY,
        size=0,
        state=VolumeState.INCOMPLETE,
        owner=work.uuid,
        operation=snapshot.id,
        origin=work.here.name,
    )


def path(work: Work, snapshot: Snapshot) -> str | None:
    """Return where a snapshot's file of memory is; None if it is lost.

    Lost with the host that had it, or removed behind our back. Raises HostError where
    that cannot be told now.
    """
    backend = work.here.backends.get(snapshot.memory_backend)
    stored = backend.volumes.find(snapshot.memory_volume) if backend else None
    if stored is None or stored.body.state is not VolumeState.USABLE:
        return None
    return stored.body.path if work.states.has_memory(stored.body.path) else None


def demand(work: Work, snapshot: Snapshot, doing: str) -> None:
    """Raise SnapshotRefused for a snapshot whose file of memory is lost."""
    if snapshot.memory is Memory.EXTERNAL and path(work, snapshot) is None:
        raise work.refused(
            doing,
            f"the memory of {snapshot.name} is lost: {snapshot.memory_volume} is not "
            f"in backend {snapshot.memory_backend}, or not whole. Its disks are there: "
            "they come back with power off (`--power off`)",
        )


def persist(work: Work, snapshot: Snapshot) -> bool:
    """Have a file that was written on its storage; False where we cannot."""
    files = work.here.files
    return files.persist(files.disks.name, snapshot.memory_volume)


def publish(work: Work, snapshot: Snapshot) -> None:
    """Publish that a file is whole."""
    files = work.here.files
    volume = files.volumes.read(snapshot.memory_volume).body
    size = files.disks.physical(volume.name)
    durable = files.persist(volume.pool, volume.name)
    files.update(
        msgspec.structs.replace(
            volume, state=VolumeState.USABLE, size=size, durable=durable
        )
    )


def lost(work: Work, snapshot: Snapshot) -> errors.SnapshotError:
    """Return what is said of a way back that goes on without its memory."""
    return errors.SnapshotError(
        instance=work.uuid,
        host=work.here.name,
        reason=f"the memory of snapshot {snapshot.name} was lost while it was gone "
        "back to. Its disks are back, and the guest is off: starting it boots it",
    )
