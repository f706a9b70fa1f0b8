# SPDX-License-Identifier: Apache-2.0
"""Volumes of one instance that volumes of others stand on: what clones are made over.

Who owns a volume is in its record, and what stands on it is in the records of those. A
frozen volume stays as long as any does: when its owner goes, it is handed to one of
those that stand on it, and so on, until the last one goes, and it with that. Retired
copies are kept for a return only: nothing stays for them, and they inherit nothing.
"""

import contextlib
from collections.abc import Iterator

import msgspec
from oslo_log import log as logging

from virtmigrate import model
from virtmigrate.backends import base

LOG = logging.getLogger(__name__)

_LOCK = "lending"
"""While somebody inherits, no heir may be on its way out."""


def lent(backend: base.Backend, uuid: str) -> dict[str, str]:
    """Return the volumes of an instance that others stand on, each with an heir.

    Directly, or by layers of its own that others stand on. An heir is the UUID of one
    of those others. Raises RecordError for a record that cannot be read, where the
    instance has frozen volumes: it might name one.
    """
    frozen = any(
        stored.body.owner == uuid and stored.body.state is model.VolumeState.FROZEN
        for stored in backend.catalog.all()
    )
    if not frozen:
        return {}
    volumes = {each.name: each.body for each in backend.catalog.all(strict=True)}
    heirs: dict[str, str] = {}
    for each in sorted(volumes.values(), key=lambda volume: volume.name):
        is_retired = each.state is model.VolumeState.RETIRED
        if each.owner and each.owner != uuid and not is_retired:
            for name in _below(each, volumes, uuid):
                heirs.setdefault(name, each.owner)
    return heirs


@contextlib.contextmanager
def settled(backend: base.Backend, uuid: str, timeout: float) -> Iterator[set[str]]:
    """Hand what an instance has lent to its heirs, while it is being removed.

    Yields the names of the volumes that are not its any more. Can be called again.
    Raises LockBusy, RecordError: nothing was changed.

    Arguments:
        timeout: seconds to wait for others that do the same in this backend.
    """
    if not _is_concerned(backend, uuid):
        yield set()
        return
    with backend.locks.held({_LOCK}, timeout=timeout):
        heirs = lent(backend, uuid)
        for name, heir in sorted(heirs.items()):
            volume = backend.volumes.read(name).body
            backend.update(msgspec.structs.replace(volume, owner=heir))
            LOG.info("instance=%s volume=%s handed to %s", uuid, name, heir)
        yield set(heirs)


# Private


def _is_concerned(backend: base.Backend, uuid: str) -> bool:
    """Tell whether it has lent anything, or may be an heir."""
    frozen = model.VolumeState.FROZEN
    return any(
        stored.body.owner == uuid
        and (stored.body.backing is not None or stored.body.state is frozen)
        for stored in backend.catalog.all()
    )


def _below(
    volume: model.Volume, volumes: dict[str, model.Volume], owner: str
) -> Iterator[str]:
    """Yield what of an owner's a volume stands on, or shares blocks with."""
    waiting, seen = [volume], {volume.name}
    while waiting:
        each = waiting.pop()
        for name in filter(None, (each.backing, each.parent)):
            below = volumes.get(name)
            if below is None or name in seen:
                continue
            seen.add(name)
            waiting.append(below)
            if below.owner == owner:
                yield name
