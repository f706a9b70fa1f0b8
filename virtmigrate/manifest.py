# SPDX-License-Identifier: Apache-2.0
"""Manifests: digests of a volume's blocks, and one root over them.

Version 1: BLAKE3 over blocks of 1 MiB, doubled until a volume has at most 512 Ki
of them; the last block is as long as what is left. A block of zeros is known by
a constant that no digest equals, so it needs no hashing. The root is BLAKE3 over
the version, the size, the block size and all digests. Two volumes with equal
roots are equal.

A manifest may also say what is not known of a volume: see UNKNOWN.
"""

from collections.abc import Iterator

import blake3

from virtmigrate import model
from virtmigrate.units import KiB, MiB

VERSION = 1
READS = (1,)

LENGTH = 32
"""Bytes of a digest."""

ZERO = b"\0" * LENGTH
"""Stands for a block of zeros."""

UNKNOWN = b"\xff" * LENGTH
"""Stands for a block whose content nobody vouches for; it equals no digest."""

_MAX_BLOCKS = 512 * KiB


def block_size_for(size: int) -> int:
    """Return the bytes per block of a volume of size bytes."""
    block = MiB
    while -(-size // block) > _MAX_BLOCKS:
        block *= 2
    return block


class Manifest:
    """Digests of a volume of `size` bytes; every block is zeros until it is set.

    Different blocks may be set by several threads at once.

    Arguments:
        digests: of all blocks, in order; ValueError when they are not as many. A
            bytearray is taken over, not copied.
    """

    def __init__(
        self, size: int, block_size: int = 0, digests: bytes | bytearray | None = None
    ) -> None:
        self.size = size
        self.block_size = block_size or block_size_for(size)
        self.count = -(-size // self.block_size)
        if digests is None:
            digests = bytearray(self.count * LENGTH)
        if len(digests) != self.count * LENGTH:
            raise ValueError(f"{len(digests)} bytes for {self.count} blocks")
        # There may be 16 MiB of them: one array is enough.
        self._digests = (
            digests if isinstance(digests, bytearray) else bytearray(digests)
        )

    @classmethod
    def unknown(cls, size: int, block_size: int = 0) -> "Manifest":
        """Return the manifest of a volume of which nothing is known."""
        block = block_size or block_size_for(size)
        return cls(size, block, bytearray(b"\xff") * (-(-size // block) * LENGTH))

    def __getitem__(self, index: int) -> bytes:
        return bytes(self._digests[index * LENGTH : (index + 1) * LENGTH])

    def __setitem__(self, index: int, digest: bytes) -> None:
        if not 0 <= index < self.count or len(digest) != LENGTH:
            raise IndexError(index)
        self._digests[index * LENGTH : (index + 1) * LENGTH] = digest

    def add(self, index: int, data: bytes) -> bool:
        """Record a block's bytes; return False when they are all zeros."""
        self[index] = digest = digest_of(data)
        return digest != ZERO

    def span(self, index: int) -> tuple[int, int]:
        """Return where a block begins and ends, in bytes."""
        start = index * self.block_size
        return start, min(start + self.block_size, self.size)

    def unlike(self, other: "Manifest") -> Iterator[int]:
        """Yield the blocks that differ from another manifest's, or are unknown."""
        for index in range(self.count):
            mine = self[index]
            if mine == UNKNOWN or index >= other.count or mine != other[index]:
                yield index

    def fitted(self, size: int) -> "Manifest":
        """Return the manifest of this volume when it is cut or grown to `size` bytes.

        What is added is zeros. The block at the end that was cut, or grew, is unknown.
        """
        found = Manifest(size)
        if found.block_size != self.block_size:
            return Manifest.unknown(size)
        for index in range(min(found.count, self.count)):
            same = found.span(index) == self.span(index)
            found[index] = self[index] if same else UNKNOWN
        return found

    def known(self) -> int:
        """Return the bytes of the blocks that are known."""
        spans = (self.span(i) for i in range(self.count) if self[i] != UNKNOWN)
        return sum(end - start for start, end in spans)

    def slice(self, first: int, last: int) -> bytes:
        """Return the digests of the blocks from first up to last."""
        return bytes(self._digests[first * LENGTH : last * LENGTH])

    def digests(self) -> bytes:
        """Return the digests of all blocks, in order."""
        return bytes(self._digests)

    def root(self) -> str:
        """Return the digest over all blocks, in hex."""
        head = f"virtmigrate-manifest {VERSION} {self.size} {self.block_size}\n"
        return blake3.blake3(head.encode()).update(self._digests).hexdigest()

    def digest(self) -> model.Digest:
        """Return what a record keeps of it."""
        return model.Digest(
            version=VERSION,
            size=self.size,
            block_size=self.block_size,
            root=self.root(),
        )


class Fold:
    """The digest of one block, from its pieces; zeros in front wait to be hashed."""

    def __init__(self) -> None:
        self._zeros = 0
        self._hasher: blake3.blake3 | None = None

    def add(self, data: bytes) -> bool:
        """Take a piece; return False when it is all zeros."""
        if is_zero(data):
            self.skip(len(data))
            return False
        self._begun().update(data)
        return True

    def skip(self, length: int) -> None:
        """Take a hole."""
        self._zeros += length

    def digest(self) -> bytes:
        """Return what digest_of() says of the whole block."""
        return ZERO if self._hasher is None else self._begun().digest()

    # Private

    def _begun(self) -> blake3.blake3:
        """Return the hasher, with all zeros so far in it."""
        self._hasher = self._hasher or blake3.blake3()
        while self._zeros:
            length = min(self._zeros, len(_ZEROS))
            self._hasher.update(_ZEROS[:length])
            self._zeros -= length
        return self._hasher


def digest_of(data: bytes) -> bytes:
    """Return the digest of a block, ZERO when it holds nothing but zeros."""
    return ZERO if is_zero(data) else blake3.blake3(data).digest()


def is_zero(data: bytes) -> bool:
    """Tell whether all bytes are zero, at the speed of memcmp."""
    if len(data) == MiB:
        return data == _ZEROS
    return not data or (data[0] == 0 and data == bytes(len(data)))


_ZEROS = bytes(MiB)
