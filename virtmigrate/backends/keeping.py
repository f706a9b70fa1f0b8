# SPDX-License-Identifier: Apache-2.0
"""What a backend keeps of its volumes besides: manifests, leases of images, claims."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

from virtmigrate import errors, manifest, model, record, storagepool
from virtmigrate.backends import catalog
from virtmigrate.formats import DiskFormat

Holds = tuple[model.Hold, ...]

_HOLDS = 256
"""Leases that one image has at most."""

_TRIES = 5
"""Times that a record is changed again after somebody else changed it."""


@dataclass(frozen=True)
class Image:
    """What makes two images the same: what a guest sees of them is equal."""

    root: str
    """Of the manifest of the bytes."""
    format: DiskFormat
    """What the bytes are read as."""
    size: int
    """What of them is seen."""


def manifest_name(name: str) -> str:
    """Return the volume, beside the records, that keeps a volume's digests."""
    return f"{name}.manifest"


def write_manifest(pool: storagepool.Pool, name: str, found: manifest.Manifest) -> None:
    """Keep the digests of a volume; a torn write keeps none."""
    volume, data = manifest_name(name), found.digests()
    pool.delete(volume)
    pool.create_raw(volume, len(data))
    if data:
        pool.write(volume, data)


def read_manifest(
    pool: storagepool.Pool, name: str, wanted: model.Digest | None
) -> manifest.Manifest | None:
    """Return the kept digests of a volume, None unless they are those wanted."""
    if wanted is None or wanted.block_size != manifest.block_size_for(wanted.size):
        return None
    length = -(-wanted.size // wanted.block_size) * manifest.LENGTH
    try:
        data = pool.read(manifest_name(name), limit=length)
        found = manifest.Manifest(wanted.size, wanted.block_size, data)
    except (ValueError, errors.VolumeNotFound, errors.ShortTransfer):
        return None
    return found if found.digest() == wanted else None


def is_image(volume: model.Volume, wanted: Image | None = None) -> bool:
    """Tell whether a volume is an image, the one wanted, and may be built upon.

    One that stands on another is none: its bytes do not tell all that is seen.
    """
    return (
        volume.role is model.Role.IMAGE
        and volume.state is model.VolumeState.USABLE
        and volume.proof is model.Proof.FULL
        and volume.backing is None
        and volume.digest is not None
        and wanted in (None, Image(volume.digest.root, volume.format, volume.size))
    )


class Images:
    """The images of a backend that peers count on, by leases in their records.

    Safe to share between threads.
    """

    def __init__(
        self,
        backend: str,
        store: record.Store[model.Volume],
        volumes: catalog.Catalog[model.Volume],
    ) -> None:
        self._backend = backend
        self._store = store
        self._volumes = volumes

    def known_as(self, key: str, rules: int) -> Image | None:
        """Return what the image of a key is, None without one.

        Arguments:
            rules: the version of the rules that it was checked by, at least.
        """
        for stored in self._volumes.all():
            body = stored.body
            if body.image is None or body.digest is None or not is_image(body):
                continue
            if body.image.key == key and body.image.rules >= rules:
                return Image(body.digest.root, body.format, body.size)
        return None

    def hold(self, wanted: Image, hold: model.Hold) -> str | None:
        """Add or renew a lease on an image; None where it is not.

        Returns the image's name. Leases that are over go with it. Raises
        RecordConflict when others change the record all the time, Unsupported when
        it has too many leases.
        """

        def held(volume: model.Volume) -> Holds | None:
            if not is_image(volume, wanted):
                return None
            kept = _holds_without(volume, hold.operation)
            if len(kept) >= _HOLDS:
                raise errors.Unsupported(
                    backend=self._backend,
                    operation=f"hold {volume.name} once more",
                    reason=f"it has {len(kept)} leases",
                )
            return (*kept, hold)

        for stored in self._volumes.all():
            if is_image(stored.body, wanted):
                return stored.name if self._change(stored.name, held) else None
        return None

    def release(self, operation: str, root: str = "") -> int:
        """Drop an operation's leases, on the image of a root or on all.

        Returns how many there were.
        """
        released = 0
        for stored in self._volumes.all():
            digest = stored.body.digest
            fits = not root or (digest is not None and digest.root == root)
            if fits and any(h.operation == operation for h in stored.body.holds):
                released += self._change(
                    stored.name, lambda volume: _holds_without(volume, operation)
                )
        return released

    def expire(self, name: str) -> bool:
        """Drop the leases on an image that are over; False where it is gone."""
        return self._change(name, lambda volume: _holds_without(volume, ""))

    def count_on(self, name: str) -> None:
        """Say that what was recorded just now stands on an image; ImageGone.

        Whoever read the image's record before, to give the image up, fails now.
        """
        stored = self._usable(name)
        for _ in range(_TRIES):
            try:
                self._republish(stored, used=time.time())
                return
            except errors.RecordConflict:
                # Somebody else's new generation does the same, once it is there: one
                # in the making may be the one that gives the image up.
                if self._usable(name).generation > stored.generation:
                    return
        raise errors.ImageGone(host=self._store.pool.host.name, image=name)

    def change_origin(self, name: str, **changes: object) -> None:
        """Change what is kept of an image.

        Raises ImageGone, RecordConflict when others change the record all the time.
        """
        for attempt in range(1, _TRIES + 1):
            try:
                self._republish(self._usable(name), **changes)
                return
            except errors.RecordConflict:
                if attempt == _TRIES:
                    raise

    def doom(self, seen: record.Stored[model.Volume]) -> bool:
        """Let nobody count on an image any more; False when it changed meanwhile."""
        doomed = msgspec.structs.replace(seen.body, state=model.VolumeState.DOOMED)
        try:
            self._store.publish(seen.name, doomed, after=seen.generation)
        except errors.RecordConflict:
            return False
        return True

    # Private

    def _usable(self, name: str) -> record.Stored[model.Volume]:
        stored = self._store.find(name)
        if stored is None or not is_image(stored.body):
            raise errors.ImageGone(host=self._store.pool.host.name, image=name)
        return stored

    def _republish(
        self, stored: record.Stored[model.Volume], **changes: object
    ) -> None:
        """Change the origin in an image's record; RecordConflict.

        An image that came otherwise has none: its record only gets a new generation.
        """
        body = stored.body
        if body.image is not None:
            image = msgspec.structs.replace(body.image, **changes)
            body = msgspec.structs.replace(body, image=image)
        self._store.publish(stored.name, body, after=stored.generation)
        self._store.prune(stored.name)

    def _change(
        self, name: str, change: Callable[[model.Volume], Holds | None]
    ) -> bool:
        """Change the leases in a record; False when it is gone or `change` says None.

        Raises RecordConflict when others change it all the time.
        """
        for attempt in range(1, _TRIES + 1):
            stored = self._store.find(name)
            holds = change(stored.body) if stored else None
            if stored is None or holds is None:
                break
            body = msgspec.structs.replace(stored.body, holds=holds)
            try:
                self._store.publish(name, body, after=stored.generation)
            except errors.RecordConflict:
                if attempt == _TRIES:
                    raise
                continue
            self._store.prune(name)
            return True
        return False


class Claims:
    """Volumes that one thread of this process works on, and no other may."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[bool]:
        """Claim a volume; yield False when another thread has it."""
        with self._lock:
            is_ours = name not in self._names
            self._names.add(name)
        try:
            yield is_ours
        finally:
            if is_ours:
                self._names.discard(name)


# Private


def _holds_without(volume: model.Volume, operation: str) -> Holds:
    """Return the leases of others that are not over."""
    now = time.time()
    return tuple(
        hold
        for hold in volume.holds
        if hold.operation != operation and hold.until > now
    )
