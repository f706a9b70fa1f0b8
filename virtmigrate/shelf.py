# SPDX-License-Identifier: Apache-2.0
"""The images that lie in one backend: what counts on them, and how one goes.

Whoever makes a disk publishes its record, which names the image, before counting on
the image, and that makes a new generation of the image's record. Whoever drops an
image reads its generation before looking at all records, and gives it up only if it
is still the newest. So of the two at the same moment one sees the other.
"""

import collections
import dataclasses
import time
from collections.abc import Iterable, Iterator

from oslo_log import log as logging

from virtmigrate import errors, model, slots
from virtmigrate.backends import base, keeping
from virtmigrate.model import VolumeState
from virtmigrate.record import Stored

LOG = logging.getLogger(__name__)


@dataclasses.dataclass
class Counters:
    """What this process saw since it began."""

    hits: int = 0
    misses: int = 0
    fetched: int = 0
    """Bytes of volumes that were made."""
    evictions: int = 0
    waits: int = 0
    """Times that somebody waited for what another one fetched."""


@dataclasses.dataclass(frozen=True)
class Cached:
    """One image, as it is now."""

    volume: model.Volume
    references: tuple[str, ...]
    """Volumes that stand on it."""

    @property
    def origin(self) -> model.Origin:
        assert self.volume.image is not None
        return self.volume.image

    @property
    def holders(self) -> tuple[str, ...]:
        """The operations of peers that count on it, by leases that are not over."""
        now = time.time()
        return tuple(h.operation for h in self.volume.holds if h.until > now)

    @property
    def is_held(self) -> bool:
        """Tell whether a peer counts on it for a move."""
        return bool(self.holders)

    @property
    def is_idle(self) -> bool:
        return not (self.references or self.is_held or self.origin.pinned)


Users = dict[str, list[str]]
"""The volumes that stand on each volume."""


class Shelf:
    """The images of one backend. Safe to share between threads."""

    def __init__(self, backend: base.Backend, held: slots.Slots, lease: float) -> None:
        self._backend = backend
        self._slots = held
        self._lease = lease
        self._index: tuple[int | None, Users] = None, {}
        """What the directory of the records said before they were read, and what they
        said."""
        self.counters = Counters()

    def all(self) -> list[Cached]:
        """Return all images, the least recently used first.

        Raises RecordBroken for any record that cannot be read: it may be what
        stands on an image.
        """
        return self._cached(self._backend.catalog.all(strict=True))

    def leftovers(self) -> list[Stored[model.Volume]]:
        """Return what killed fetchers left, and what was being dropped."""
        images = [s for s in self._backend.catalog.all() if s.body.image is not None]
        # After the images: a slot is there before they are.
        held = self._slots.all() if images else {}
        left = [each for each in images if self._is_left(each.body, held)]
        # A slot's name is used again: what was remembered may be of an earlier life.
        return [each for each in left if self._is_left(each.body, self._slot_of(each))]

    def clear(self, stored: Stored[model.Volume]) -> bool:
        """Remove one leftover; False when something counts on it."""
        if stored.body.state is VolumeState.USABLE:
            # No slot names it, so nobody comes to count on it any more.
            return bool(self.drop([Cached(stored.body, ())]))
        is_doomed = stored.body.state is VolumeState.DOOMED
        # It may have become one that is counted on.
        if not is_doomed and not self._backend.images.doom(stored):
            return False
        return self._erase(stored)

    def beyond(self, cached: list[Cached]) -> Iterator[Cached]:
        """Yield what the limits want dropped, of the idle ones."""
        limits, now = self._backend.settings.images, time.time()
        count = len(cached)
        counts_bytes = limits.bytes or limits.free
        taken = {
            each.volume.name: self._taken(each.volume) if counts_bytes else 0
            for each in cached
        }
        total, free = sum(taken.values()), self._backend.room()
        for each in cached:
            over = (
                (limits.count and count > limits.count)
                or (limits.bytes and total > limits.bytes)
                or (limits.age and now - each.origin.used > limits.age)
                or free < limits.free
            )
            if over and each.is_idle:
                size = taken[each.volume.name]
                count, total, free = count - 1, total - size, free + size
                yield each

    def is_used(self, name: str) -> bool:
        """Tell whether something counts on an image, or it is pinned.

        For who asks often. An index says which record is to be read, and "yes" is what
        that record says now. "No" is as old as the question where nothing changed for
        `record_grace`; else all records are listed for it. Who drops an image looks at
        all records in any case. Raises ImageGone, RecordError.
        """
        stored = self._backend.catalog.find(name)
        if stored is None or not keeping.is_image(stored.body):
            raise errors.ImageGone(host=self._backend.host.name, image=name)
        if not Cached(stored.body, ()).is_idle:
            return True
        stamp, users = self._index
        if self._is_stood_upon(name, users):
            return True
        if stamp is not None and stamp == self._backend.catalog.stamp():
            return False
        return self._is_stood_upon(name, self._indexed())

    def drop(self, wanted: list[Cached]) -> list[Cached]:
        """Drop what is idle of these; return what was.

        In this order: the generation that is given up was read before the look at
        what stands on it, so that what began to do so since then is seen.
        """
        names = {each.volume.name for each in wanted}
        seen = {
            s.name: s for s in self._backend.catalog.all(strict=True) if s.name in names
        }
        now = {
            c.volume.name: c
            for c in self._cached(self._backend.catalog.all(strict=True))
        }
        dropped = []
        for name, stored in seen.items():
            if name in now and now[name].is_idle and self._doom(stored):
                dropped.append(now[name])
        return dropped

    # Private

    def _cached(self, records: Iterable[Stored[model.Volume]]) -> list[Cached]:
        volumes = [stored.body for stored in records]
        users = _users(volumes)
        found = [
            Cached(each, tuple(users.get(each.name, ())))
            for each in volumes
            if each.image is not None and keeping.is_image(each)
        ]
        return sorted(found, key=lambda each: each.origin.used)

    def _indexed(self) -> Users:
        """Read what changed since the index was made, and make it anew."""
        # First: what changes meanwhile is looked at the next time.
        stamp = self._backend.catalog.stamp()
        users = _users(s.body for s in self._backend.catalog.all(strict=True))
        self._index = stamp, users
        return users

    def _is_stood_upon(self, name: str, users: Users) -> bool:
        """Tell whether one of those that an index names stands on an image now."""
        for user in users.get(name, ()):
            found = self._backend.catalog.find(user)
            if found is not None and name in _below(found.body):
                return True
        return False

    def _slot_of(self, stored: Stored[model.Volume]) -> dict[str, Stored[model.Slot]]:
        assert stored.body.image is not None
        found = self._slots.find(stored.body.image.key)
        return {stored.body.image.key: found} if found is not None else {}

    def _is_left(
        self, volume: model.Volume, held: dict[str, Stored[model.Slot]]
    ) -> bool:
        if volume.state is VolumeState.DOOMED:
            return True
        assert volume.image is not None
        found = held.get(volume.image.key)
        return self._slots.is_over(found, volume, self._lease)

    def _taken(self, volume: model.Volume) -> int:
        try:
            return self._backend.pool(volume.pool).allocated(volume.name)
        except errors.VolumeNotFound:
            return 0

    def _doom(self, stored: Stored[model.Volume]) -> bool:
        if not self._backend.images.doom(stored):
            return False
        self.counters.evictions += 1
        self._erase(stored)
        return True

    def _erase(self, stored: Stored[model.Volume]) -> bool:
        """Remove what nobody can count on any more; False when that has to wait."""
        try:
            self._backend.remove(stored.name)
        except errors.VolumeInUse as e:
            # By a clone that began at the same moment, and is giving way.
            LOG.info("%s; it goes with a later sweep", e)
            return False
        image = stored.body.image
        if image is not None:
            self._slots.forget(image.key, stored.name)
            LOG.info(
                "backend=%s image=%s volume=%s dropped",
                self._backend.name,
                image.source,
                stored.name,
            )
        return True


# Private


def _below(volume: model.Volume) -> set[str]:
    """Return what a volume stands on, or shares blocks with."""
    return {each for each in (volume.backing, volume.parent) if each is not None}


def _users(volumes: Iterable[model.Volume]) -> Users:
    users: Users = collections.defaultdict(list)
    for volume in volumes:
        for below in _below(volume):
            users[below].append(volume.name)
    return users
