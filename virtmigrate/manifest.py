# SPDX-License-Identifier: Apache-2.0
"""Manifests: digests of a volume's blocks, and one root over them.

Version 1: BLAKE3 over blocks of 1 MiB, doubled until a volume has at most 512 Ki
of them; the last block is as long as what is left. A block of zeros is known by
a constant that no digest equals, so it needs no hashing. The root is BLAKE3 over
the version, the size, the block size and all digests. Two volumes with equal
roots are equal.
"""

from dataclasses import dataclass, field

import blake3

from virtmigrate import model
from virtmigrate.units import KiB, MiB

VERSION = 1
READS = (1,)

ZERO = b"\0" * 32
_MAX_BLOCKS = 512 * KiB


def block_size_for(size: int) -> int:
    """Return the bytes per block of a volume of size bytes."""
    block = MiB
    while -(-size // block) > _MAX_BLOCKS:
        block *= 2
    return block


@dataclass
class Manifest:
    """Digests of a volume of `size` bytes; every block is zeros until it is set.

    Not safe to share between threads while it is filled.
    """

    size: int
    block_size: int = 0
    blocks: dict[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.block_size = self.block_size or block_size_for(self.size)

    def add(self, index: int, data: bytes) -> bool:
        """Record a block's bytes; return False when they are all zeros."""
        if is_zero(data):
            self.blocks.pop(index, None)
            return False
        self.blocks[index] = blake3.blake3(data).digest()
        return True

    def root(self) -> str:
        """Return the digest over all blocks, in hex."""
        head = f"virtmigrate-manifest {VERSION} {self.size} {self.block_size}\n"
        hasher = blake3.blake3(head.encode())
        for index in range(-(-self.size // self.block_size)):
            hasher.update(self.blocks.get(index, ZERO))
        return hasher.hexdigest()

    def digest(self) -> model.Digest:
        """Return what a record keeps of it."""
        return model.Digest(
            version=VERSION,
            size=self.size,
            block_size=self.block_size,
            root=self.root(),
        )


def is_zero(data: bytes) -> bool:
    """Tell whether all bytes are zero, at the speed of memcmp."""
    return not data or (data[0] == 0 and data == bytes(len(data)))
