# SPDX-License-Identifier: Apache-2.0
"""The one place that an image has in a backend: who fetches it, what it became.

A slot is a record, so that of all processes and hosts one wins it. Who fetches
gives signs of life, each a new generation; who sees none for as long as a lease,
by a clock of its own, takes the slot over. The former holder finds that out at its
next sign or at the end, and what it made is its own to remove.
"""

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Container, Iterator

import blake3
import msgspec
from oslo_log import log as logging

from virtmigrate import errors, model, record, sources, storagepool
from virtmigrate.backends import catalog, layout
from virtmigrate.progress import Progress

LOG = logging.getLogger(__name__)

PREFIX = f"{layout.RESERVED}image-"


_PATIENCE = 10
"""Leases without a sign of life after which nobody is believed to fetch, by who does
not wait for it and has no clock of his own. Also how long a failure is remembered."""


class Lost(Exception):
    """Another one has the slot."""


def key_of(origin: str, described: sources.Described) -> str:
    """Return what tells an image from all others: also from what it was before."""
    checksum = described.checksum
    content = f"{checksum.algorithm}:{checksum.hex}" if checksum else described.version
    words = (origin, content, described.format)
    return blake3.blake3("\0".join(words).encode()).hexdigest()[:32]


class _Store(record.Store[model.Slot]):
    """The records of slots, and no others."""

    def newest(self) -> dict[str, int]:
        found = super().newest()
        return {n: g for n, g in found.items() if n.startswith(PREFIX)}


class Slots:
    """The slots of one backend. Safe to share between threads."""

    def __init__(self, pool: storagepool.Pool, grace: float) -> None:
        self._store = _Store(pool, model.Slot, grace=grace)
        self._catalog = catalog.Catalog(self._store)

    def find(self, key: str) -> record.Stored[model.Slot] | None:
        # One that was torn when it was made first is made again.
        with contextlib.suppress(errors.RecordBroken):
            return self._catalog.find(PREFIX + key)
        return None

    def claim(
        self, key: str, source: str, found: record.Stored[model.Slot] | None, host: str
    ) -> "Claim | None":
        """Win a slot that was seen as `found`; None when another one was faster."""
        slot = model.Slot(
            key=key, source=source, operation=uuid.uuid4().hex[:16], host=host
        )
        after = found.generation if found else 0
        try:
            stored = self._store.publish(PREFIX + key, slot, after=after)
        except errors.RecordConflict:
            return None
        return Claim(self._store, stored)

    def all(self) -> dict[str, record.Stored[model.Slot]]:
        """Return all slots by the keys of their images."""
        return {stored.body.key: stored for stored in self._catalog.all()}

    def is_over(
        self,
        found: record.Stored[model.Slot] | None,
        volume: model.Volume,
        lease: float,
    ) -> bool:
        """Tell whether the slot of an image neither names a volume nor is to."""
        if found is None or found.body.operation != volume.operation:
            return True
        if found.body.volume or found.body.failed:
            return found.body.volume != volume.name
        return self._is_old(found, lease)

    def forget(self, key: str, volume: str) -> None:
        """Remove the slot of an image that is gone."""
        found = self.find(key)
        if found is not None and found.body.volume == volume:
            self._store.remove(found.name, until=found.generation)

    def sweep(self, volumes: Callable[[], Container[str]], lease: float) -> int:
        """Remove old slots that name no volume; return how many there were.

        Of fetches that failed, were refused, or whose fetcher is dead, and of images
        that are gone. Who waited for them has heard of it.

        Arguments:
            volumes: returns the names of all volumes that have a record; asked after
                the slots were read, so that what one of these names is there, or gone.
        """
        slots = self.all()
        known = volumes() if slots else ()
        over = [s for s in slots.values() if s.body.volume not in known]
        gone = [stored for stored in over if self._is_old(stored, lease)]
        # A name is used again: what was remembered may be of an earlier life.
        gone = [stored for stored in gone if self.find(stored.body.key) == stored]
        for stored in gone:
            self._store.remove(stored.name, until=stored.generation)
            LOG.info("slot=%s removed: %s", stored.body.key, stored.body.source)
        return len(gone)

    # Private

    def _is_old(self, stored: record.Stored[model.Slot], lease: float) -> bool:
        # By the clock of the storage's host, which may be another one's. Without it
        # there is a newer sign of life.
        written = self._store.written(stored)
        return written > 0 and time.time() - written > _PATIENCE * lease


class Claim:
    """The right to fill a slot, until another one takes it over."""

    def __init__(
        self, store: record.Store[model.Slot], stored: record.Stored[model.Slot]
    ) -> None:
        self._store = store
        self._stored = stored
        self._lost = False
        self._lock = threading.Lock()
        self.key = stored.body.key
        self.operation = stored.body.operation

    @contextlib.contextmanager
    def beating(self, lease: float, progress: Progress) -> Iterator[None]:
        """Give signs of life, three in a lease; say at the end when it failed."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(lease / 3):
                report = progress.report()
                try:
                    self._publish(done=report.done, total=report.total)
                except Lost:
                    return
                except errors.Error as e:
                    LOG.warning("slot=%s: no sign of life: %s", self.key, e)

        thread = threading.Thread(target=beat, name="image-beat", daemon=True)
        thread.start()
        try:
            yield
        except Lost:
            raise
        except errors.Error as e:
            ended.set()
            thread.join()
            self._say_failed(e)
            raise
        finally:
            ended.set()
            thread.join()

    def demand(self) -> None:
        """Raise Lost once it is known that another one has it."""
        if self._lost:
            raise Lost

    def fill(self, volume: str) -> None:
        """Publish what the image became; Lost where another one has the slot."""
        self._publish(volume=volume)

    # Private

    def _say_failed(self, error: errors.Error) -> None:
        """Tell those who wait; Lost where that is why it failed.

        Who is cancelled tells nothing: another one goes on when the lease is over.
        """
        try:
            self._publish(failed=str(error))
        except Lost:
            raise Lost from error
        except errors.Error as e:
            LOG.warning("slot=%s: nobody is told that it failed: %s", self.key, e)

    def _publish(self, **changes: object) -> None:
        with self._lock:
            self.demand()
            before = self._stored.generation
            try:
                self._change(changes)
            except errors.Error:
                # It may be written all the same, and is then what the next one follows.
                if not self._is_ours():
                    self._lost = True
                    raise Lost from None
                if self._stored.generation == before:
                    self._change(changes)
            self._store.prune(self._stored.name)

    def _change(self, changes: dict[str, object]) -> None:
        if self._stored.body.volume:
            return
        # Also where nothing else changes: that it is new is the sign.
        body = msgspec.structs.replace(self._stored.body, **changes)
        self._stored = self._store.publish(
            self._stored.name, body, after=self._stored.generation
        )

    def _is_ours(self) -> bool:
        found = self._store.find(self._stored.name)
        if found is None or found.body.operation != self.operation:
            return False
        self._stored = found
        return True
