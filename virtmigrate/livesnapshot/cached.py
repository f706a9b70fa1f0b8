# SPDX-License-Identifier: Apache-2.0
"""An image cache as a sink: what an instance was becomes an image of its host.

It comes in as every image does: staged, looked at by the door, filled in and read back.
It is pinned, since nobody could fetch it again.
"""

import dataclasses
from collections.abc import Iterator

from virtmigrate import errors, imagecache, shelf, slots, sources
from virtmigrate.sinks import Announced, Digest, Piece, padded
from virtmigrate.sources.base import Check, Write


class CacheSink:
    """An image of one backend's cache.

    Arguments:
        name: what the image is called; that and the operation tell it from all others.
    """

    algorithm = "sha256"

    def __init__(self, cache: imagecache.ImageCache, name: str, operation: str) -> None:
        self._cache = cache
        self._name = f"{name}.{operation}"
        self._coming: _Coming | None = None

    @property
    def place(self) -> str:
        return f"cache:{self._cache.backend}/{self._name}"

    def look(self) -> None:
        """A cache takes what its backend has room for."""

    def begin(self, coming: Announced) -> None:
        if coming.format != "raw":
            raise self._refused("an image cache takes raw ones")
        self._coming = _Coming(self._name, coming)

    def take(self, pieces: Iterator[Piece]) -> None:
        assert self._coming is not None
        self._coming.pieces = pieces
        self._cache.obtain(self._coming)

    def prove(self, digest: Digest) -> str:
        cached = self._found()
        if cached is None:
            raise self._refused("it was dropped meanwhile")
        found, expected = cached.origin.checksum, f"sha256:{digest('sha256')}"
        if found != expected:
            raise self._refused(f"it is {found}, and {expected} was sent")
        return ""

    def publish(self) -> None:
        cached = self._found()
        if cached is None:
            raise self._refused("it was dropped meanwhile")
        self._cache.pin(cached, pinned=True)

    def abort(self, mark: str = "") -> None:
        cached = self._found()
        if cached is not None:
            self._cache.pin(cached, pinned=False)
            self._cache.remove(cached)

    # Private

    def _found(self) -> shelf.Cached | None:
        source = sources.SavedImage(self._name)
        key = slots.key_of(source.origin, source.described())
        for cached in self._cache.shelf.all():
            if cached.origin.key == key:
                return cached
        return None

    def _refused(self, reason: str) -> errors.ImageNotTaken:
        return errors.ImageNotTaken(image=self.place, reason=reason)


# Private


class _Coming(sources.SavedImage):
    """The image on its way: it can be read once."""

    def __init__(self, name: str, coming: Announced) -> None:
        super().__init__(name)
        self._size = coming.size
        self.pieces: Iterator[Piece] | None = None

    def described(self) -> sources.Described:
        return dataclasses.replace(super().described(), size=self._size)

    def read(self, write: Write, check: Check, start: int = 0) -> None:
        pieces, self.pieces = self.pieces, None
        if pieces is None or start:
            super().read(write, check, start)
            return
        for piece in pieces:
            check()
            for data in padded(piece) if isinstance(piece, int) else (piece,):
                write(data)
