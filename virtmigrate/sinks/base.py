# SPDX-License-Identifier: Apache-2.0
"""What a sink of images is, and how what went there is told from anything else."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from virtmigrate import errors, manifest
from virtmigrate.sources.base import STRONG
from virtmigrate.units import MiB

CHUNK = MiB
"""Bytes of a piece, at most; zeros may be more."""

MANIFEST = "manifest"
"""The digest of manifest.py, which passes over zeros without hashing them."""

Piece = bytes | int
"""Bytes that follow, or how many zeros do."""

Digest = Callable[[str], str]
"""Returns the digest of all that was sent, by an algorithm, in hex."""


@dataclass(frozen=True)
class Announced:
    """An image that is about to come."""

    name: str
    """For people."""
    format: str
    """raw or qcow2."""
    size: int
    """Bytes as they are sent."""
    virtual_size: int
    """Bytes of the disk in it."""
    properties: Mapping[str, str] = field(default_factory=dict)
    """What an image service is to keep beside it."""


class Sink(Protocol):
    """One image somewhere. Used by one thread."""

    @property
    def place(self) -> str:
        """What names the image among all others, and names no secret."""
        ...

    @property
    def algorithm(self) -> str:
        """The digest that prove() will ask for, if all goes as expected."""
        ...

    def look(self) -> None:
        """Raise ImageNotTaken where no image can be made; nothing is touched.

        What is there already is somebody's: only after this abort() may remove it.
        """
        ...

    def begin(self, coming: Announced) -> None:
        """Make the image, without any bytes. Raises ImageNotTaken."""
        ...

    def take(self, pieces: Iterator[Piece]) -> None:
        """Take all bytes, in order.

        What the iterator raises goes on, and the image never becomes one then. Raises
        ImageNotTaken, DiskFull.
        """
        ...

    def prove(self, digest: Digest) -> str:
        """Prove that what is there is what was sent.

        Returns what abort() tells it by once it is published; "" where nothing is
        needed. Raises ImageNotTaken; then it is not to be used.
        """
        ...

    def publish(self) -> None:
        """Let others have it, where they do not see it already."""
        ...

    def abort(self, mark: str = "") -> None:
        """Remove what there is; can be called again, and for what was never begun.

        Arguments:
            mark: what prove() returned, if it did.

        Raises ImageNotTaken when it may still be there.
        """
        ...


class Service(Protocol):
    """An image service: returns one of its images, which is to be filled.

    Arguments:
        is_new: it is made, too; else it is there, and queued.

    Raises ConfigurationError, ImageNotTaken where there is none.
    """

    def __call__(self, image_id: str, *, is_new: bool) -> Sink: ...


class Print:
    """The digest of bytes that pass, by one algorithm. Belongs to one thread.

    Arguments:
        algorithm: MANIFEST, or as hashlib names it.
        size: bytes that will pass.
    """

    def __init__(self, algorithm: str, size: int) -> None:
        self.algorithm = algorithm
        self._size, self._position = size, 0
        self._manifest = manifest.Manifest(size)
        self._fold = manifest.Fold()
        self._hash = None
        if algorithm != MANIFEST:
            self._hash = hashlib.new(algorithm, usedforsecurity=False)

    def add(self, piece: Piece) -> None:
        """Take what passes."""
        if self._hash is None:
            self._add_folded(piece)
        elif isinstance(piece, bytes):
            self._hash.update(piece)
        else:
            for zeros in padded(piece):
                self._hash.update(zeros)

    def hex(self) -> str:
        """Return the digest, once all has passed."""
        if self._hash is not None:
            return self._hash.hexdigest()
        if self._position != self._size:
            raise errors.ShortTransfer(
                volume="the image",
                host="its sink",
                reason=f"{self._position} bytes instead of {self._size}",
            )
        return self._manifest.root()

    # Private

    def _add_folded(self, piece: Piece) -> None:
        """Fold what passes into blocks."""
        done, length = 0, piece if isinstance(piece, int) else len(piece)
        while done < length:
            block = self._manifest.block_size
            index, at = divmod(self._position, block)
            count = min(block - at, length - done)
            if isinstance(piece, int):
                self._fold.skip(count)
            else:
                self._fold.add(piece[done : done + count])
            done += count
            self._position += count
            if at + count == block or self._position == self._size:
                self._manifest[index] = self._fold.digest()
                self._fold = manifest.Fold()


def padded(count: int) -> Iterator[bytes]:
    """Yield so many zeros, in pieces."""
    for start in range(0, count, CHUNK):
        length = min(CHUNK, count - start)
        yield _ZEROS if length == CHUNK else _ZEROS[:length]


def algorithms() -> tuple[str, ...]:
    """Return the digests that prove an image."""
    return (MANIFEST, *STRONG)


# Private

_ZEROS = bytes(CHUNK)
