# SPDX-License-Identifier: Apache-2.0
"""All records of a store, for those who look for one by what it says.

A generation is written once, so one that was read is remembered: a look at all
costs one listing, and one read for each record that changed.
"""

import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

import msgspec
from oslo_log import log as logging

from virtmigrate import errors, record

LOG = logging.getLogger(__name__)

T = TypeVar("T", bound=msgspec.Struct)


class Catalog(Generic[T]):
    """The newest valid records of one kind. Safe to share between threads."""

    def __init__(self, store: record.Store[T]) -> None:
        self._store = store
        self._known: dict[str, record.Stored[T]] = {}
        self._lock = threading.Lock()

    def all(self, *, strict: bool = False) -> Iterator[record.Stored[T]]:
        """Yield all records by name; one that cannot be read is logged, and stays.

        Arguments:
            strict: raise RecordError instead, for who must not miss one.
        """
        newest = self._store.newest()
        with self._lock:
            self._known = {n: s for n, s in self._known.items() if n in newest}
        for name, generation in newest.items():
            stored = self._stored(name, generation, strict)
            if stored is not None:
                yield stored

    def find(self, name: str) -> record.Stored[T] | None:
        """Return the newest valid record of a name, None without one.

        What is remembered says where to look, and is not believed: that one record is
        read. Raises as Store.find().
        """
        with self._lock:
            known = self._known.get(name)
        found = self._store.still(known) if known is not None else None
        if found is None:
            found = self._store.find(name)
        if found is not None:
            with self._lock:
                self._known[name] = found
        return found

    def stamp(self) -> int | None:
        """Return what is another one as soon as a record changes; None: unknown."""
        return self._store.stamp()

    # Private

    def _stored(
        self, name: str, generation: int, strict: bool
    ) -> record.Stored[T] | None:
        with self._lock:
            known = self._known.get(name)
        # A name that was removed may be used once more, from the first generation on.
        if known is not None and known.generation == generation > 1:
            return known
        try:
            found = self._store.load(name, generation) or self._store.find(name)
        except errors.RecordError as e:
            if strict:
                raise
            LOG.error("passed over: %s", e)
            return None
        if found is not None:
            with self._lock:
                self._known[name] = found
        return found
