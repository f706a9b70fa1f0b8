# SPDX-License-Identifier: Apache-2.0
"""What of a host's pools, records, journals and domains does not go together.

Looking changes nothing. What a finding may do about itself touches only what a
record, a journal or a transfer says is this host's; all else is for a human.
"""

import contextlib
import enum
import functools
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from oslo_log import log as logging

from virtmigrate import (
    errors,
    imagecache,
    mailbox,
    model,
    node,
    record,
    snapshottree,
    transient,
)
from virtmigrate.backends import base
from virtmigrate.model import InstanceState, TransferState, VolumeState

LOG = logging.getLogger(__name__)

Stored = record.Stored[model.Volume]

_OVER = (TransferState.WITHDRAWN, TransferState.RETURNED)
"""States in which nobody works on a transfer's volumes here any more."""

_NAME = re.compile(r"[A-Za-z0-9-]+\.([0-9a-f]{16})")
"""What an operation calls its volumes; the end is its id."""

_GENERATIONS = 2
"""Generations of a record that are kept."""


class Kind(enum.Enum):
    MISSING = "missing"
    """A record says that something is there, and it is not."""
    ORPHANED = "orphaned"
    """Called as our volumes are, and without a record."""
    HALF_MADE = "half-made"
    """Its operation is over, and it never became usable."""
    UNHELD = "held by nobody"
    """Its instance has no record here, and no open move has it."""
    OLD = "old generations"
    EXPIRED = "expired hold"
    UNREADABLE = "unreadable"


@dataclass(frozen=True)
class Finding:
    """One thing that does not go together."""

    backend: str
    """"-" for an instance."""
    name: str
    kind: Kind
    detail: str
    repair: Callable[[], str] | None = None
    """Puts it right, where that is safe, and says how; "" when it is not safe any
    more. It looks again before."""


def check(here: node.Node) -> list[Finding]:
    """Return all that is found on this host; nothing is changed."""
    operations = _Operations(here)
    found: list[Finding] = []
    for backend in here.backends.values():
        look = _Look(here, backend, operations)
        try:
            found.extend(look.findings())
        except (errors.StorageError, errors.HostError) as e:
            found.append(Finding(backend.name, "*", Kind.UNREADABLE, str(e)))
    return [*found, *_instances(here, operations)]


def repair(findings: list[Finding]) -> list[tuple[Finding, str]]:
    """Put right what may be; return each finding with what was done, "" if nothing."""
    done = []
    for each in findings:
        said = ""
        if each.repair is not None:
            try:
                said = each.repair()
            except (errors.StorageError, errors.HostError) as e:
                LOG.warning("%s %s: %s", each.backend, each.name, e)
        if said:
            LOG.info("backend=%s volume=%s %s", each.backend, each.name, said)
        done.append((each, said))
    return done


# Private


class _Operations:
    """The moves and the changes of snapshots that this host knows of.

    What cannot be read is not over.
    """

    def __init__(self, here: node.Node) -> None:
        self.journals = {path.stem for path in here.journals.glob("*.journal")}
        transfers = here.mailbox.transfers
        self._noted = {name for name in transfers.names() if name != mailbox.CARD}
        self._transfers = {s.name: s.body for s in here.mailbox.open_transfers()}
        self._changes = set(_changes(here))

    def is_open(self, operation: str) -> bool:
        """Tell whether anybody may still work on its volumes."""
        if operation in self.journals or operation in self._changes:
            return True
        return operation in self._noted and self.ended(operation) is None

    def ended(self, operation: str) -> model.Transfer | None:
        """Return the transfer of a move to this host that is over."""
        found = self._transfers.get(operation)
        ours = operation not in self.journals
        return found if found and ours and found.state in _OVER else None


class _Look:
    """One backend."""

    def __init__(
        self, here: node.Node, backend: base.Backend, operations: _Operations
    ) -> None:
        self._here = here
        self._backend = backend
        self._operations = operations
        self._images = imagecache.ImageCache(here, backend)
        self._pools: dict[str, set[str]] = {}

    def findings(self) -> Iterator[Finding]:
        # In this order: a record is made before its volume, and goes after it.
        volumes = {
            (pool, name)
            for pool in {self._backend.incoming.name, self._backend.disks.name}
            for name in self._names(pool)
        }
        for left in self._images.shelf.leftovers():
            yield self._found(
                left.name,
                Kind.HALF_MADE,
                "an image that nobody fetches or drops any more",
                functools.partial(self._clear, left),
            )
        beside = self._backend.volumes.pool.names()
        recorded = set(self._backend.volumes.names())
        for name in sorted(recorded):
            try:
                stored = self._backend.volumes.find(name)
                if stored is not None:
                    yield from self._of_record(stored, beside)
            except errors.RecordError as e:
                yield self._found(name, Kind.UNREADABLE, str(e))
        for pool, name in sorted(volumes):
            if name not in recorded:
                yield from self._of_volume(pool, name)

    # Private

    def _found(
        self, name: str, kind: Kind, detail: str, then: Callable[[], str] | None = None
    ) -> Finding:
        return Finding(self._backend.name, name, kind, detail, then)

    def _names(self, pool: str) -> set[str]:
        if pool not in self._pools:
            try:
                self._pools[pool] = set(self._backend.pool(pool).names())
            except errors.PoolNotFound:
                self._pools[pool] = set()
        return self._pools[pool]

    def _of_record(self, stored: Stored, beside: list[str]) -> Iterator[Finding]:
        volume = stored.body
        if self._operations.is_open(volume.operation) or not self._is_ours(volume):
            return
        if volume.image is not None and volume.state is not VolumeState.USABLE:
            # It is being fetched, or was found above.
            return
        if volume.state is VolumeState.INCOMPLETE:
            yield from self._half_made(stored)
            return
        if volume.state is VolumeState.DOOMED:
            # Settling goes on with it.
            return
        yield from self._below(volume)
        if volume.name not in self._names(volume.pool):
            # What was listed before it was made or moved is there now.
            if not self._backend.pool(volume.pool).has(volume.name):
                yield self._missing(stored)
        elif self._is_unheld(volume):
            detail = f"instance {volume.owner} is not here; {volume.size} bytes"
            yield self._found(volume.name, Kind.UNHELD, detail)
        yield from self._leftovers(stored, beside)

    def _below(self, volume: model.Volume) -> Iterator[Finding]:
        """What a volume stands on, or shares blocks with, and nobody knows."""
        for below in filter(None, (volume.backing, volume.parent)):
            if self._backend.volumes.find(below) is None:
                detail = f"it stands on {below}, which has no record"
                yield self._found(volume.name, Kind.MISSING, detail)
        for detail in transient.amiss(self._here, volume):
            yield self._found(volume.name, Kind.MISSING, detail)

    def _is_ours(self, volume: model.Volume) -> bool:
        """Tell whether a volume is this host's: others may have the same storage."""
        if not volume.owner:
            return volume.origin == self._here.name
        stored = self._here.instances.find(volume.owner)
        if stored is not None:
            return stored.body.host == self._here.name
        # What came here by a move has the source as its origin.
        known = self._operations.ended(volume.operation) is not None
        return known or volume.origin == self._here.name

    def _is_unheld(self, volume: model.Volume) -> bool:
        """Tell whether no instance has a volume; not asked where others may know."""
        gone = volume.owner and self._here.instances.find(volume.owner) is None
        if not gone or volume.state is VolumeState.RETIRED:
            return False
        if self._here.domains.exists(volume.owner):
            return False
        alone = not self._backend.capabilities.shared
        return alone or self._backend.storage() == self._here.files.storage()

    def _half_made(self, stored: Stored) -> Iterator[Finding]:
        volume = stored.body
        with self._here.locks.only(f"instance-{volume.owner}") as is_idle:
            # A new instance that is being made has no journal, but its lock.
            if is_idle and self._backend.volumes.find(stored.name) == stored:
                detail = f"operation {volume.operation} of {volume.origin} is over"
                then = (lambda: self._remove(stored)) if volume.owner else None
                yield self._found(volume.name, Kind.HALF_MADE, detail, then)

    def _clear(self, stored: Stored) -> str:
        if self._backend.volumes.find(stored.name) != stored:
            return ""
        return "removed" if self._images.shelf.clear(stored) else ""

    def _remove(self, stored: Stored) -> str:
        volume, backend = stored.body, self._backend
        with self._here.locks.only(f"instance-{volume.owner}") as is_idle:
            still = is_idle and backend.volumes.find(stored.name) == stored
            now = _Operations(self._here)
            if not still or now.is_open(volume.operation):
                return ""
            for pool in {backend.incoming.name, backend.disks.name}:
                # It may be moved already, and its record not say so yet.
                if volume.pool in (backend.incoming.name, backend.disks.name):
                    backend.pool(pool).delete(volume.name)
            backend.remove(volume.name)
        return "removed"

    def _missing(self, stored: Stored) -> Finding:
        volume = stored.body
        detail = f"it is not in pool {volume.pool}; instance {volume.owner or 'none'}"
        if volume.state is not VolumeState.RETIRED:
            return self._found(volume.name, Kind.MISSING, detail)

        def forget() -> str:
            if self._backend.volumes.find(stored.name) != stored:
                return ""
            self._backend.remove(volume.name)
            return "forgotten: it was retired"

        return self._found(volume.name, Kind.MISSING, detail, forget)

    def _leftovers(self, stored: Stored, beside: list[str]) -> Iterator[Finding]:
        """What a record has besides: generations, and holds that are over."""
        name, now = stored.name, time.time()
        numbers = [n[len(name) + 5 :] for n in beside if n.startswith(f"{name}.rec.")]
        count = sum(number.isdecimal() for number in numbers)
        if count > _GENERATIONS:

            def prune() -> str:
                self._backend.volumes.prune(name)
                return "pruned"

            yield self._found(name, Kind.OLD, f"{count} of its record", prune)
        over = [hold.operation for hold in stored.body.holds if hold.until <= now]
        if over:

            def expire() -> str:
                return "dropped" if self._backend.images.expire(name) else ""

            yield self._found(name, Kind.EXPIRED, ", ".join(over), expire)

    def _of_volume(self, pool: str, name: str) -> Iterator[Finding]:
        matched = _NAME.fullmatch(name)
        if not matched or self._operations.is_open(matched[1]):
            return
        transfer = self._operations.ended(matched[1])
        if transfer is not None and self._was_sent(transfer, pool, name):
            detail = f"the move {matched[1]} is {transfer.state.value}"
            yield self._found(
                name, Kind.HALF_MADE, detail, lambda: self._remove_sent(transfer, name)
            )
        elif not self._may_be_anothers(pool, name):
            detail = f"pool {pool}: no record or open move of this host knows it"
            yield self._found(name, Kind.ORPHANED, detail)

    def _was_sent(self, transfer: model.Transfer, pool: str, name: str) -> bool:
        return pool == self._backend.incoming.name and any(
            (each.name, each.backend) == (name, self._backend.name)
            and not (each.shared or each.held)
            for each in transfer.volumes
        )

    def _remove_sent(self, transfer: model.Transfer, name: str) -> str:
        with self._here.locks.only(f"instance-{transfer.instance}") as is_idle:
            if not is_idle or self._backend.volumes.find(name) is not None:
                return ""
            if _Operations(self._here).ended(transfer.operation) != transfer:
                return ""
            self._backend.incoming.delete(name)
        return "removed"

    def _may_be_anothers(self, pool: str, name: str) -> bool:
        """Tell whether another host of this storage may be receiving a volume."""
        if not self._backend.capabilities.shared:
            return False
        age = time.time() - self._backend.pool(pool).written(name)
        return age < float(self._here.options.reclaim_age)


def _changes(here: node.Node) -> Iterator[str]:
    """Yield the operations of changes of snapshots that settling goes on with."""
    for name in here.instances.names():
        # Volumes of one that cannot be read are looked at no further than that.
        with contextlib.suppress(errors.RecordError):
            stored = here.instances.find(name)
            if stored is not None and stored.body.change is not None:
                yield stored.body.change.operation


def _instances(here: node.Node, operations: _Operations) -> Iterator[Finding]:
    """Instances of this host whose domain, journal or volumes are not there."""
    for name in here.instances.names():
        with here.locks.only(f"instance-{name}") as is_idle:
            if not is_idle:
                continue
            try:
                stored = here.instances.find(name)
            except errors.RecordError as e:
                yield Finding("-", name, Kind.UNREADABLE, str(e))
                continue
            if stored is not None and stored.body.host == here.name:
                yield from _of_instance(here, stored.body, operations)


def _of_instance(
    here: node.Node, found: model.Instance, operations: _Operations
) -> Iterator[Finding]:
    def missing(detail: str) -> Finding:
        return Finding("-", found.uuid, Kind.MISSING, detail)

    leaving = found.state in (InstanceState.LEAVING, InstanceState.AWAY)
    if leaving and found.operation not in operations.journals:
        yield missing(
            f"it is {found.state.value}, and operation {found.operation} has no journal"
        )
    if found.state not in (InstanceState.HERE, InstanceState.ARRIVED):
        return
    if not operations.is_open(found.operation) and not here.domains.exists(found.uuid):
        yield missing("it has no domain; `destroy` removes it")
    for said, name, volume in _held(found):
        backend = here.backends.get(name)
        if backend is None:
            yield missing(f"{said}: there is no backend {name}")
            continue
        with contextlib.suppress(errors.RecordBroken, errors.RecordTooNew):
            if backend.volumes.find(volume) is None:
                yield missing(f"{said}: {volume} has no record")


def _held(found: model.Instance) -> Iterator[tuple[str, str, str]]:
    """Yield what holds a volume, its backend and its name; each volume once."""
    disks = {(ref.backend, ref.volume) for ref in found.disks}
    for ref in found.disks:
        yield f"disk {ref.target}", ref.backend, ref.volume
    frozen = snapshottree.volumes(found.snapshots, *snapshottree.Place)
    frozen |= snapshottree.memories(found.snapshots)
    for backend, volume in sorted(frozen - disks):
        yield "its snapshots", backend, volume
