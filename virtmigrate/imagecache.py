# SPDX-License-Identifier: Apache-2.0
"""The images of a backend: fetched once, counted on by records, dropped when idle.

Policy only; bytes are the backend's and the door's business. Three records decide,
each by compare-and-swap, for all processes and hosts that have the backend:

- The *slot* of an image says who fetches it, with signs of life, or which volume it
  became. Who loses it loses the right to publish.
- The *volume's record* of an image says that it may be counted on. Its state and
  the leases of peers change there, and each new reference makes a new generation.
- The *record of a disk* names the image that it stands on. It is published before
  the image is counted on; so of a clone and a removal at the same moment one sees
  the other, and gives way.
"""

import time
from collections.abc import Callable

from oslo_log import log as logging

from virtmigrate import (
    address,
    door,
    errors,
    fetching,
    limit,
    model,
    neighbours,
    node,
    shelf,
    slots,
    sources,
    staging,
    stream,
)
from virtmigrate.backends import base, keeping
from virtmigrate.progress import Progress
from virtmigrate.record import Stored
from virtmigrate.units import MiB

LOG = logging.getLogger(__name__)

_TRIES = 5
"""Times that an image is asked for anew because it went away."""

_LOOK = 0.2
"""Seconds between two looks at what another one fetches."""


class ImageCache:
    """The images of one backend. Safe to share between threads."""

    def __init__(self, here: node.Node, backend: base.Backend) -> None:
        self._here = here
        self._backend = backend
        self._slots = slots.Slots(backend.volumes.pool, here.options.record_grace)
        self._lease: float = here.options.image_lease
        self._patience: float = here.options.image_wait_timeout
        self.backend = backend.name
        self.shelf = shelf.Shelf(backend, self._slots, self._lease)
        self.counters = self.shelf.counters

    def obtain(
        self, source: sources.Source, progress: Progress | None = None
    ) -> model.Volume:
        """Return the image of a source, fetched if it is not there.

        Others that want it at the same time wait, on whatever host of the backend,
        and go on fetching if the one who does it dies. It may be dropped again at
        any time until something is cloned from it.

        Raises ImageRefused, ImageNotFetched, ImageStalled, NoSpace, Cancelled.
        """
        progress, described = progress or Progress(), source.described()
        name = slots.key_of(source.origin, described)
        wait = _Wait(self._lease)
        while True:
            found = self._slots.find(name)
            image = self._published(found)
            if image is not None:
                self.counters.hits += not wait.waited
                return image
            if found is not None and wait.goes_on(found):
                self._wait(found.body, progress, wait)
                continue
            claim = self._slots.claim(name, source.origin, found, self._here.name)
            if claim is None:
                continue
            self.counters.misses += 1
            try:
                image = self._fetch(claim, source, described, progress)
            except slots.Lost:
                LOG.warning("image=%s: another one fetches it now", source.origin)
                continue
            return image

    def has(self, key: str) -> bool:
        """Tell whether the image of a key is there now."""
        return self._published(self._slots.find(key)) is not None

    def clone(
        self,
        source: sources.Source,
        wanted: Callable[[model.Volume], model.Volume],
        mover: stream.Mover,
        progress: Progress | None = None,
    ) -> model.Volume:
        """Make an incoming volume from an image, which is fetched if need be.

        Arguments:
            wanted: returns the volume to be made of an image.

        Returns its record, incomplete. On failure nothing of the volume stays.
        Raises as obtain(), DiskTooSmall, and what the backend's clone does.
        """
        for _ in range(_TRIES):
            image = self.obtain(source, progress)
            volume = wanted(image)
            _demand_fit(image, volume)
            try:
                return self._backend.clone(
                    image,
                    volume,
                    mover,
                    lambda: self._backend.images.count_on(image.name),  # noqa: B023
                )
            except errors.ImageGone as e:
                LOG.info("%s; it is fetched again", e)
        raise errors.ImageGone(host=self._here.name, image=source.origin)

    def pin(self, cached: shelf.Cached, *, pinned: bool) -> None:
        """Keep an image whatever the limits say, or no more; ImageGone."""
        self._backend.images.change_origin(cached.volume.name, pinned=pinned)

    def remove(self, cached: shelf.Cached) -> None:
        """Drop an image now; ImageInUse where something counts on it."""
        if self.shelf.is_used(cached.volume.name) or not self.shelf.drop([cached]):
            raise errors.ImageInUse(
                host=self._here.name,
                image=cached.origin.source,
                reason=", ".join(cached.references)
                or ("it is pinned" if cached.origin.pinned else "it is counted on"),
            )

    def prune(self, *, dry_run: bool = False) -> list[shelf.Cached]:
        """Drop idle images beyond the backend's limits; return them.

        The least recently used goes first. One that is referenced, held, pinned or
        being fetched stays, whatever the limits say. With them go old slots of what
        was not fetched, or is gone.
        """
        beyond = list(self.shelf.beyond(self.shelf.all()))
        if dry_run:
            return beyond
        self._slots.sweep(self._backend.volumes.newest, self._lease)
        return self.shelf.drop(beyond)

    def check(self, cached: shelf.Cached, progress: Progress) -> str:
        """Read an image again; return what is wrong with it, "" if nothing.

        That its bytes are those of the record, and by today's rules what was
        declared, where they came as they are. It is noted when nothing is wrong.
        """
        said = fetching.recheck(self._here, self._backend, cached.volume, progress)
        if not said:
            self._backend.images.change_origin(
                cached.volume.name, rules=door.RULES, checked=time.time()
            )
        return said

    def sweep(self) -> None:
        """Remove all leftovers, and what lies in staging without a fetcher."""
        staging.sweep(self._here)
        for stored in self.shelf.leftovers():
            self.shelf.clear(stored)

    # Private

    def _clear_others(self, claim: slots.Claim) -> None:
        """Remove what those left who had the slot before, or leave it to a sweep."""
        for stored in self._backend.catalog.all():
            image = stored.body.image
            if image is None or image.key != claim.key:
                continue
            try:
                self.shelf.clear(stored)
            except errors.StorageError as e:
                LOG.warning("volume=%s stays for now: %s", stored.name, e)

    def _published(self, found: Stored[model.Slot] | None) -> model.Volume | None:
        """Return the image that a slot names; None where it is gone."""
        if found is None or not found.body.volume:
            return None
        stored = self._backend.catalog.find(found.body.volume)
        return stored.body if stored and keeping.is_image(stored.body) else None

    def _wait(self, slot: model.Slot, progress: Progress, wait: "_Wait") -> None:
        """Wait a moment for another one.

        Raises ImageNotFetched when that one failed, ImageStalled when it does not
        advance.
        """
        if slot.failed:
            raise errors.ImageNotFetched(
                image=slot.source, host=slot.host, reason=slot.failed
            )
        if wait.stalled(slot) > self._patience:
            raise errors.ImageStalled(
                image=slot.source,
                host=slot.host,
                operation=slot.operation,
                done=slot.done,
                total=slot.total,
                seconds=self._patience,
            )
        if not wait.waited:
            self.counters.waits += 1
            progress.phase("waiting for an image", slot.total)
        progress.advance(max(0, slot.done - wait.done))
        wait.waited, wait.done = True, max(slot.done, wait.done)
        time.sleep(min(_LOOK, self._lease / 5))

    def _fetch(
        self,
        claim: slots.Claim,
        source: sources.Source,
        described: sources.Described,
        progress: Progress,
    ) -> model.Volume:
        with claim.beating(self._lease, progress):
            self._clear_others(claim)
            near = neighbours.Neighbours(self._here)
            fetcher = fetching.Fetcher(self._here, self._backend, near)
            image = fetcher.fetch(claim, source, described, progress)
        self.counters.fetched += image.size
        LOG.info("image=%s is volume=%s now", source.origin, image.name)
        return image


class Caches:
    """The image caches of a host, one for each of its backends."""

    def __init__(self, here: node.Node) -> None:
        self._here = here
        self._caches = {
            name: ImageCache(here, backend) for name, backend in here.backends.items()
        }
        self._pace = limit.Limiter(here.options.image_seed_bandwidth_mib * MiB)

    def of(self, backend: base.Backend) -> ImageCache:
        return self._caches[backend.name]

    def up(self) -> list[ImageCache]:
        """Return those whose backend is there."""
        return [self.of(backend) for backend in self._here.up()]

    def find(
        self, key: str, backend: str | None = None
    ) -> tuple[ImageCache, shelf.Cached]:
        """Return an image by its key, or by the beginning of it.

        Arguments:
            backend: where it is; None where any may have it, but only one.

        Raises ImageNotFound.
        """
        found = [
            (cache, cached)
            for cache in self.up()
            if backend in (None, cache.backend)
            for cached in cache.shelf.all()
            if key and cached.origin.key.startswith(key)
        ]
        if len(found) != 1:
            raise errors.ImageNotFound(
                host=self._here.name, backend=backend or "any", image=key
            )
        return found[0]

    def seed(
        self, source: sources.Source, progress: Callable[[], Progress] = Progress
    ) -> bool:
        """Have an image in all backends, one after the other; False where it was.

        Within the limits of what is fetched before it is needed. Raises as
        ImageCache.obtain(), HostBusy when no turn came in time.
        """
        key = slots.key_of(source.origin, source.described())
        missing = [cache for cache in self.up() if not cache.has(key)]
        if not missing:
            return False
        options, told = self._here.options, progress()
        told.phase("waiting for the turn")
        with self._here.locks.slot(
            "image-seed", options.image_seed_max, options.queue_timeout, told.check
        ):
            for cache in missing:
                cache.obtain(sources.Limited(source, self._pace), told)
        return True

    def tend(self) -> list[str]:
        """Drop what the limits want dropped, and what killed fetchers left.

        Returns what could not be done. From afar nothing is: that is the business of
        the host's own service.
        """
        problems: list[str] = []
        if not address.parse(self._here.options.uri).is_local:
            return problems
        for cache in self.up():
            try:
                cache.sweep()
                cache.prune()
            except (errors.StorageError, errors.HostError, OSError) as e:
                LOG.warning("host=%s images: %s", self._here.name, e)
                problems.append(f"images: {e}")
        return problems


class _Wait:
    """How long a slot gave no sign of life, by this process's own clock."""

    def __init__(self, lease: float) -> None:
        self._lease = lease
        self._generation = -1
        self._since = 0.0
        self._operations: set[str] = set()
        self._place: tuple[str, int, int] | None = None
        self._moved = 0.0
        self.waited = False
        self.done = 0

    def goes_on(self, found: Stored[model.Slot]) -> bool:
        """Tell whether to wait for the one that has the slot.

        One who failed while we waited is believed; one who failed before is not.
        """
        slot = found.body
        if slot.volume or (slot.failed and slot.operation not in self._operations):
            return False
        self._operations.add(slot.operation)
        if found.generation != self._generation:
            self._generation, self._since = found.generation, time.monotonic()
        return time.monotonic() - self._since < self._lease

    def stalled(self, slot: model.Slot) -> float:
        """Return the seconds for which the fetcher was seen not to advance."""
        place = (slot.operation, slot.done, slot.total)
        if place != self._place:
            self._place, self._moved = place, time.monotonic()
        return time.monotonic() - self._moved


def _demand_fit(image: model.Volume, volume: model.Volume) -> None:
    least = max(image.size, image.image.min_disk if image.image else 0)
    if volume.size < least:
        raise errors.DiskTooSmall(
            volume=volume.name, size=volume.size, image=image.name, least=least
        )
