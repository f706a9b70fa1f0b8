# SPDX-License-Identifier: Apache-2.0
"""How a backend's volumes and records are laid out, by a record among the records.

It is written when the backend is made, once, whichever of its hosts comes first. A
release that knows only older layouts touches nothing.
"""

import contextlib
import uuid

import msgspec

from virtmigrate import errors, model, record, storagepool

_TRIES = 5

VERSION = 1
"""The layout that this release makes and works with."""

RESERVED = "virtmigrate-"
"""What records are called that are no volume's."""

NAME = f"{RESERVED}layout"


class Volumes(record.Store[model.Volume]):
    """The records of a backend's volumes, and no others."""

    def newest(self) -> dict[str, int]:
        found = super().newest()
        return {n: g for n, g in found.items() if not n.startswith(RESERVED)}


class Tenures:
    """Who may run which instance, by its UUID. Safe to share between threads."""

    def __init__(self, pool: storagepool.Pool, grace: float) -> None:
        self._store = record.Store(pool, model.Tenure, grace=grace)

    def find(self, uuid: str) -> record.Stored[model.Tenure] | None:
        """Return the record of an instance, None without one."""
        return self._store.find(f"{RESERVED}tenure-{uuid}")

    def publish(self, uuid: str, body: model.Tenure, *, after: int) -> None:
        """Publish the next generation; RecordConflict."""
        name = f"{RESERVED}tenure-{uuid}"
        self._store.publish(name, body, after=after)
        self._store.prune(name)

    def remove(self, uuid: str) -> None:
        """Remove it; nothing happens without one."""
        self._store.remove(f"{RESERVED}tenure-{uuid}")


class Keeper:
    """The record of a backend's layout. Safe to share between threads.

    Arguments:
        backend: its name, for errors.
        pool: where the records are.
    """

    def __init__(self, backend: str, pool: storagepool.Pool, grace: float) -> None:
        self._backend = backend
        self._store = record.Store(pool, model.Layout, grace=grace)
        self._id: str | None = None

    def ensure(self) -> None:
        """Write the record if there is none; LayoutRefused for another layout."""
        found = self.find()
        if found is None:
            found = self._made()
        self.demand_known(found)
        if found.body.version < VERSION or found.body.upgrading:
            begun = " (an upgrade was begun)" if found.body.upgrading else ""
            raise self._refused(
                found.body.version,
                f"{begun}: no host may use it; stop the services of all hosts that "
                "have it and run `virtmigrate storage upgrade` on one",
            )

    def id(self) -> str:
        """Return what tells this storage from all others, the same on every host."""
        if self._id is None:
            self._id = self.read().body.id
        return self._id

    def find(self) -> record.Stored[model.Layout] | None:
        """Return the record, None without one; LayoutRefused for a newer one."""
        try:
            return self._store.find(NAME)
        except errors.RecordTooNew as e:
            raise self._refused("unknown", _NEWER) from e

    def read(self) -> record.Stored[model.Layout]:
        """Return the record; raises RecordMissing, and as find()."""
        try:
            return self._store.read(NAME)
        except errors.RecordTooNew as e:
            raise self._refused("unknown", _NEWER) from e

    def demand_known(self, found: record.Stored[model.Layout]) -> None:
        """Raise LayoutRefused for a layout that a newer release made."""
        if max(found.body.version, found.body.upgrading or 0) > VERSION:
            raise self._refused(found.body.version, _NEWER)

    def change(
        self, found: record.Stored[model.Layout], **changes: object
    ) -> record.Stored[model.Layout]:
        """Publish a new generation of the record; RecordConflict."""
        body = msgspec.structs.replace(found.body, **changes)
        changed = self._store.publish(NAME, body, after=found.generation)
        self._store.prune(NAME)
        return changed

    # Private

    def _made(self) -> record.Stored[model.Layout]:
        """Write the record, or return the one of another host that was first.

        Who comes second waits, where it is still being written.
        """
        made = model.Layout(version=VERSION, id=str(uuid.uuid4()))
        for _ in range(_TRIES):
            with contextlib.suppress(errors.RecordConflict):
                return self._store.publish(NAME, made)
            found = self.find()
            if found is not None:
                return found
        return self.read()

    def _refused(self, version: object, reason: str) -> errors.LayoutRefused:
        return errors.LayoutRefused(
            host=self._store.pool.host.name,
            pool=self._store.pool.name,
            backend=self._backend,
            version=version,
            known=VERSION,
            reason=reason,
        )


_NEWER = ": a newer release made it; upgrade virtmigrate on this host"
