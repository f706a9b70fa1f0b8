# SPDX-License-Identifier: Apache-2.0
"""A standalone qcow2 image that is written from its first byte to its last.

QEMU's tools write such a file here and there, so that it has to be a file first. Where
it is known beforehand which parts of a disk hold data, all tables can be told before
the data: header, counts of references, the two levels of tables, then the data in the
order of the disk. So it can be sent as it is made, and its length is known.
"""

import struct
from collections.abc import Callable, Iterator

from virtmigrate.units import KiB, MiB

_CLUSTER = 64 * KiB
_LARGEST = 2 * MiB
_MAX_CLUSTERS = 16 * MiB
"""Of a disk; for a larger one they are longer, so that one byte for each is 16 MiB."""

_MAGIC = 0x514649FB
_VERSION = 3
_HEADER = 104
_REFERENCES = 4
"""Bits of a count of references, as a power of two: 16."""
_SOLE = 1 << 63
"""Of an entry of a table: nobody else refers to that cluster."""
_SECTOR = 512


class Layout:
    """Where everything of such an image lies.

    Arguments:
        size: bytes that a guest sees; a multiple of 512.
        skip: returns, of a position in the disk, where the next data begins; `size`
            when there is none.

    Raises ValueError for a size that no qcow2 image has.
    """

    def __init__(self, size: int, skip: Callable[[int], int]) -> None:
        if size <= 0 or size % _SECTOR:
            raise ValueError(f"no qcow2 image shows {size} bytes")
        self.size = size
        self.cluster = _cluster_for(size)
        self._used = bytearray(-(-size // self.cluster))
        self._mark(skip)
        self._arrange()

    @property
    def length(self) -> int:
        """Return the bytes of the whole file."""
        return self._count * self.cluster

    def tables(self) -> Iterator[bytes]:
        """Yield all that comes before the data, in pieces of one cluster."""
        yield self._padded(self._header())
        blocks = range(self._first_block, self._first_block + self._blocks)
        yield from self._packed((each * self.cluster for each in blocks), "Q")
        yield from self._counts()
        yield from self._packed(self._first_level(), "Q")
        yield from self._second_level()

    def spans(self, most: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of the disk that follow the tables, in this order.

        Each begins at a cluster and has at most `most` bytes, which is a multiple of
        a cluster. The end of the last cluster may lie behind that of the disk: what is
        missing there is zeros.
        """
        number = self._used.find(1)
        while number >= 0:
            end = self._used.find(0, number)
            end = len(self._used) if end < 0 else end
            for start in range(number * self.cluster, end * self.cluster, most):
                yield start, min(start + most, end * self.cluster)
            number = self._used.find(1, end)

    # Private

    def _mark(self, skip: Callable[[int], int]) -> None:
        """Note which clusters hold data."""
        position = skip(0)
        while position < self.size:
            number = position // self.cluster
            self._used[number] = 1
            following = (number + 1) * self.cluster
            if following >= self.size:
                return
            position = skip(following)

    def _arrange(self) -> None:
        """Number the clusters of the file."""
        per_table = self.cluster // 8
        used = self._used
        starts = range(0, len(used), per_table)
        self._tables = [s for s in starts if used.find(1, s, s + per_table) >= 0]
        self._first_entries = len(starts)
        first = -(-self._first_entries * 8 // self.cluster)
        fixed = 1 + first + len(self._tables) + used.count(1)
        self._blocks, counts = 0, 0
        while True:
            self._count = fixed + counts + self._blocks
            blocks = -(-self._count // (self.cluster // 2))
            if blocks == self._blocks:
                break
            # More of them count themselves, too.
            self._blocks, counts = blocks, -(-blocks * 8 // self.cluster)
        self._count_tables = counts
        self._first_block = 1 + counts
        self._first_table = self._first_block + self._blocks
        self._second_table = self._first_table + first
        self._data = self._second_table + len(self._tables)

    def _header(self) -> bytes:
        return struct.pack(
            ">IIQIIQIIQQIIQQQQII",
            *(_MAGIC, _VERSION, 0, 0),
            *(self.cluster.bit_length() - 1, self.size, 0),
            *(self._first_entries, self._first_table * self.cluster),
            *(self.cluster, self._count_tables, 0, 0),
            *(0, 0, 0, _REFERENCES, _HEADER),
        )

    def _counts(self) -> Iterator[bytes]:
        """Yield the counts of references: one for each cluster of the file."""
        per_block, left = self.cluster // 2, self._count
        for _ in range(self._blocks):
            yield self._padded(b"\0\1" * min(per_block, left))
            left -= min(per_block, left)

    def _first_level(self) -> Iterator[int]:
        per_table, found = self.cluster // 8, 0
        for number in range(self._first_entries):
            if found < len(self._tables) and self._tables[found] == number * per_table:
                yield (self._second_table + found) * self.cluster | _SOLE
                found += 1
            else:
                yield 0

    def _second_level(self) -> Iterator[bytes]:
        per_table, position = self.cluster // 8, self._data
        for start in self._tables:
            entries = []
            for used in self._used[start : start + per_table]:
                entries.append(position * self.cluster | _SOLE if used else 0)
                position += used
            yield from self._packed(iter(entries), "Q")

    def _packed(self, numbers: Iterator[int], kind: str) -> Iterator[bytes]:
        """Yield numbers as whole clusters."""
        kept = list(numbers)
        per_cluster = self.cluster // struct.calcsize(kind)
        for start in range(0, len(kept), per_cluster):
            part = kept[start : start + per_cluster]
            yield self._padded(struct.pack(f">{len(part)}{kind}", *part))

    def _padded(self, data: bytes) -> bytes:
        return data.ljust(self.cluster, b"\0")


# Private


def _cluster_for(size: int) -> int:
    cluster = _CLUSTER
    while cluster < _LARGEST and -(-size // cluster) > _MAX_CLUSTERS:
        cluster *= 2
    return cluster
