# SPDX-License-Identifier: Apache-2.0
"""UEFI variables: a copy of their file belongs to each snapshot, and comes back.

QEMU writes each change of a variable to the file at once, so a copy is made while the
guest is off, or stands still. Beside memory there need not be one: QEMU 7.2 has the
variables in it, and writes them to the file when it goes on. A copy is kept there for
those who go back without that memory, if nothing changed while it was written.
"""

import msgspec
from oslo_log import log as logging

from virtmigrate import errors, model
from virtmigrate.backends import base
from virtmigrate.formats import DiskFormat
from virtmigrate.model import Role, VolumeState
from virtmigrate.snapshot.work import Work
from virtmigrate.snapshottree import Memory, Snapshot
from virtmigrate.units import MiB

LOG = logging.getLogger(__name__)

_LIMIT = 16 * MiB
"""Bytes of such a file at most; those of OVMF have half a MiB."""


def name(found: model.Instance, operation: str) -> str:
    """Return what the copy is called, "" for an instance without such variables."""
    return f"variables.{operation}" if _ref(found) is not None else ""


def copy(work: Work, snapshot: Snapshot) -> None:
    """Make the copy; nothing happens for a snapshot without one.

    On failure the record may be left, for drop_made().
    """
    if not snapshot.variables_volume:
        return
    data, backend = _current(work, work.found), _backend(work, snapshot)
    volume = model.Volume(
        name=snapshot.variables_volume,
        pool=backend.disks.name,
        path=backend.disks.volume_path(snapshot.variables_volume),
        format=DiskFormat.RAW,
        # A file that belongs to a snapshot, and that no domain names.
        role=Role.MEMORY,
        size=len(data),
        state=VolumeState.INCOMPLETE,
        owner=work.uuid,
        operation=snapshot.id,
        origin=work.here.name,
    )
    backend.allocate(volume)
    _write(work, backend, volume.name, data)
    backend.update(msgspec.structs.replace(volume, state=VolumeState.USABLE))


def settled(work: Work, snapshot: Snapshot) -> Snapshot:
    """Return a snapshot that was taken, without a copy that is of another moment.

    Only beside memory it can be. Can be called again.
    """
    if not snapshot.variables_volume or snapshot.memory is Memory.NONE:
        return snapshot
    backend, name = _backend(work, snapshot), snapshot.variables_volume
    if backend.volumes.find(name) is not None:
        if _current(work, work.found) == _copied(work, snapshot):
            return snapshot
        backend.remove(name)
    LOG.info("snapshot=%s has its UEFI variables in its memory only", snapshot.name)
    return msgspec.structs.replace(snapshot, variables_volume="", variables_backend="")


def demand(work: Work, snapshot: Snapshot, doing: str) -> None:
    """Raise SnapshotRefused for a snapshot whose copy is lost."""
    if not snapshot.variables_volume:
        return
    try:
        _copied(work, snapshot)
    except (errors.VolumeNotFound, errors.RecordError) as e:
        raise work.refused(
            doing,
            f"the UEFI variables of {snapshot.name} are lost ({e}): its disks alone "
            "come back without the configuration (`--no-configuration`)",
        ) from e


def bring_back(work: Work, found: model.Instance, snapshot: Snapshot) -> None:
    """Make the variables of a guest that has ended what they were; can be called again.

    Nothing happens for a snapshot without a copy, or an instance without variables.
    """
    ref = _ref(found)
    if not snapshot.variables_volume or ref is None:
        return
    _write(work, work.backend(ref), ref.volume, _copied(work, snapshot))


# Private


def _ref(found: model.Instance) -> model.DiskRef | None:
    return next((ref for ref in found.disks if ref.role is Role.NVRAM), None)


def _backend(work: Work, snapshot: Snapshot) -> base.Backend:
    return work.here.backend(snapshot.variables_backend)


def _current(work: Work, found: model.Instance) -> bytes:
    ref = _ref(found)
    return _read(work.backend(ref), ref.volume) if ref is not None else b""


def _copied(work: Work, snapshot: Snapshot) -> bytes:
    return _read(_backend(work, snapshot), snapshot.variables_volume)


def _read(backend: base.Backend, volume: str) -> bytes:
    found = backend.volumes.read(volume).body
    return backend.pool(found.pool).read(volume, limit=_LIMIT)


def _write(work: Work, backend: base.Backend, volume: str, data: bytes) -> None:
    """Write all of a volume, and have it on its storage."""
    found = backend.volumes.read(volume).body
    pool = backend.pool(found.pool)
    pool.write(volume, data)
    if pool.read(volume, limit=_LIMIT)[: len(data)] != data:
        raise errors.DiskFull(
            host=work.here.name,
            pool=pool.name,
            reason=f"the UEFI variables were not written to {volume}",
        )
    backend.persist(found.pool, volume)
