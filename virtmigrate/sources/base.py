# SPDX-License-Identifier: Apache-2.0
"""What a source of images is, and how it is read."""

import hashlib
import hmac
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from oslo_log import log as logging

from virtmigrate import errors
from virtmigrate.units import MiB

LOG = logging.getLogger(__name__)

CHUNK = MiB
"""Bytes that a source hands on at a time, at most."""

STRONG = ("sha512", "sha384", "sha256", "sha3_256", "sha3_512", "blake2b", "blake2s")
"""Algorithms that prove content."""
WEAK = ("md5",)
"""Those that tell an accident only; for old images of an image service."""

Write = Callable[[bytes], object]
Check = Callable[[], object]


@dataclass(frozen=True)
class Checksum:
    """The digest of an image as it is sent. Raises ValueError when it is none."""

    algorithm: str
    """As hashlib names it."""
    hex: str
    """In small letters."""

    def __post_init__(self) -> None:
        if self.algorithm not in STRONG + WEAK:
            raise ValueError(f"{self.algorithm!r} is no digest that is known here")
        length = hashlib.new(self.algorithm, usedforsecurity=False).digest_size * 2
        if not re.fullmatch(rf"[0-9a-f]{{{length}}}", self.hex):
            raise ValueError(f"{self.hex!r} is no {self.algorithm} in small hex digits")

    @property
    def is_weak(self) -> bool:
        return self.algorithm in WEAK


@dataclass(frozen=True)
class Described:
    """What a source says of an image; none of it is proven."""

    name: str
    """For people."""
    format: str
    """What it was declared as: raw, iso, qcow2, vmdk, vdi, vhd, vhdx, or other."""
    size: int | None = None
    """Bytes as sent."""
    checksum: Checksum | None = None
    min_disk: int = 0
    """Bytes that a disk made of it has at least."""
    virtual_size: int | None = None
    """Bytes of the disk in it."""
    locations: tuple[str, ...] = ()
    """Where the service says that it stores it, such as rbd://FSID/POOL/IMAGE/SNAP."""
    version: str = ""
    """What changes when the image does, where there is no checksum."""


@dataclass(frozen=True)
class Received:
    """What was read by verified()."""

    size: int
    checksum: Checksum
    """The one promised; where none was, sha256 of what came."""


class Source(Protocol):
    """One image somewhere."""

    @property
    def origin(self) -> str:
        """What names this image among all others, and names no secret."""
        ...

    def described(self) -> Described:
        """Return what is said of the image. Raises ImageError."""
        ...

    def read(self, write: Write, check: Check, start: int = 0) -> None:
        """Hand the bytes from start to the end to write, in order, each once.

        Arguments:
            write: gets at most CHUNK bytes at a time.
            check: raises what ends the work, as Progress.check does; called once per
                chunk, and before each attempt.

        Raises ImageError: ImageUnavailable when trying again may help. What was
        handed on by then is a beginning of the image.
        """
        ...


def verified(source: Source, write: Write, check: Check, *, max_size: int) -> Received:
    """Read a whole image, and prove that it is the promised one.

    Arguments:
        write, check: see Source.read().
        max_size: bytes that it may have, whatever is said of it.

    Raises ImageRefused when size or digest are not what was promised; else as
    Source.read() does. After any error what was written is not to be used.
    """
    described = source.described()
    _check_promise(source, described, max_size)
    meter = _Meter(source, described, write, max_size)
    source.read(meter.take, check)
    return meter.proven()


# Private


def _check_promise(source: Source, described: Described, max_size: int) -> None:
    if described.size is not None and described.size > max_size:
        reason = f"it has {described.size} bytes, and {max_size} are allowed"
        raise errors.ImageRefused(image=source.origin, reason=reason)
    if described.checksum is not None and described.checksum.is_weak:
        LOG.warning(
            "Image %s has no digest but %s, which proves little",
            source.origin,
            described.checksum.algorithm,
        )


class _Meter:
    """Counts and digests what passes."""

    def __init__(
        self, source: Source, described: Described, write: Write, max_size: int
    ) -> None:
        self._origin, self._write = source.origin, write
        self._promised, self._expected = described.checksum, described.size
        self._most = max_size if described.size is None else described.size
        self._algorithm = (
            described.checksum.algorithm if described.checksum else "sha256"
        )
        self._digest = hashlib.new(self._algorithm, usedforsecurity=False)
        self._size = 0

    def take(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > self._most:
            self._refuse(f"it has more than {self._most} bytes")
        self._digest.update(data)
        self._write(data)

    def proven(self) -> Received:
        found = self._digest.hexdigest()
        if self._expected is not None and self._size != self._expected:
            self._refuse(
                f"it has {self._size} bytes, and {self._expected} are promised"
            )
        if self._promised and not hmac.compare_digest(found, self._promised.hex):
            promised = self._promised.hex
            self._refuse(f"its {self._algorithm} is {found}, promised was {promised}")
        return Received(self._size, Checksum(self._algorithm, found))

    def _refuse(self, reason: str) -> None:
        raise errors.ImageRefused(image=self._origin, reason=reason)
