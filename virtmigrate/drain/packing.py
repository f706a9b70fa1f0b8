# SPDX-License-Identifier: Apache-2.0
"""Where instances find room: pure, and the same for the same input.

Best fit, the largest first: an instance goes to the host whose memory it fills most,
so that what is large later still finds room. Or spread: to the host that has most left.
No host is ever filled beyond its memory or a backend's room, and members of a group
never meet. A host that is full is not looked at again, so it is quick: 20,000 instances
on 500 hosts take seconds.
"""

import bisect
import enum
from collections.abc import Iterable, Iterator, Sequence

from virtmigrate.drain.values import Item, Packing, Placement, Share, Target


class Order(enum.Enum):
    FILL = "fill"
    """Few hosts, full ones first: what is large later still finds room."""
    SPREAD = "spread"
    """All hosts alike."""


def pack(
    items: Iterable[Item], targets: Iterable[Target], order: Order = Order.FILL
) -> Packing:
    """Return where instances go; those with the largest memory are placed first."""
    return fill(Bins(targets, order), items)


def fill(bins: "Bins", items: Iterable[Item]) -> Packing:
    """Place instances on hosts that may have some already; see pack()."""
    placed: list[Placement] = []
    left: dict[str, str] = {}
    for item in sorted(items, key=lambda each: (-each.memory, _size(each), each.uuid)):
        found = bins.place(item)
        if found is None:
            left[item.uuid] = bins.reason(item)
        else:
            placed.append(Placement(uuid=item.uuid, target=found))
    return Packing(placed=tuple(placed), left=left)


class Bins:
    """Hosts, and what they have left. Not safe to share between threads."""

    def __init__(self, targets: Iterable[Target], order: Order = Order.FILL) -> None:
        self._order = order
        self._bins: dict[str, _Bin] = {}
        self._by_memory: list[tuple[int, str]] = []
        for target in targets:
            self.add(target)

    def add(self, target: Target) -> None:
        """Take one more host; in the place of one of the same name."""
        if known := self._bins.pop(target.name, None):
            self._forget(known)
        added = self._bins[target.name] = _Bin(target)
        bisect.insort(self._by_memory, (added.memory, target.name))

    def place(self, item: Item) -> str | None:
        """Give an instance a place, and return the host; None where it has none."""
        for name in self._candidates(item):
            chosen = self._bins[name]
            if chosen.misses(item) is None:
                self._forget(chosen)
                chosen.take(item)
                bisect.insort(self._by_memory, (chosen.memory, name))
                return name
        return None

    def reason(self, item: Item) -> str:
        """Return why an instance has no place, host by host."""
        names = [name for name in item.only or self._bins if name in self._bins]
        if not names:
            return "no host to go to"
        shown = [f"{name}: {self._bins[name].misses(item)}" for name in names[:_SHOWN]]
        more = len(names) - len(shown)
        return "; ".join([*shown, *([f"and {more} more"] if more else [])])

    # Private

    def _candidates(self, item: Item) -> Iterator[str]:
        """Yield hosts with enough memory, best first; the list may change after."""
        first = bisect.bisect_left(self._by_memory, (item.memory, ""))
        if self._order is Order.FILL:
            yield from self._names(range(first, len(self._by_memory)), item)
        else:
            yield from self._names(range(len(self._by_memory) - 1, first - 1, -1), item)

    def _names(self, places: Sequence[int], item: Item) -> Iterator[str]:
        for place in places:
            name = self._by_memory[place][1]
            if name not in item.refused and (not item.only or name in item.only):
                yield name

    def _forget(self, known: "_Bin") -> None:
        entry = (known.memory, known.name)
        del self._by_memory[bisect.bisect_left(self._by_memory, entry)]


# Private

_SHOWN = 4


class _Bin:
    """One host, as far as it is filled."""

    def __init__(self, target: Target) -> None:
        self.name = target.name
        self.memory = target.memory
        self._rooms = {share.backend: share.size for share in target.rooms}
        self._groups = set(target.groups)

    def misses(self, item: Item) -> str | None:
        """Return what it lacks for an instance, None when nothing."""
        if self.name in item.refused:
            return "it cannot take it"
        if item.memory > self.memory:
            return f"{item.memory - self.memory} bytes of memory too little"
        if self._groups and (met := self._groups.intersection(item.apart)):
            return f"it has a member of group {min(met)}"
        for backend, size in _sums(item.needs(self.name)).items():
            if size > self._rooms.get(backend, 0):
                short = size - self._rooms.get(backend, 0)
                return f"{short} bytes too little room in {backend}"
        return None

    def take(self, item: Item) -> None:
        self.memory -= item.memory
        self._groups.update(item.apart)
        for share in item.needs(self.name):
            if share.size:
                self._rooms[share.backend] -= share.size


def _size(item: Item) -> int:
    """Return a key that sorts large disks first."""
    return -sum(share.size for share in item.disks)


def _sums(shares: tuple[Share, ...]) -> dict[str, int]:
    found: dict[str, int] = {}
    for share in shares:
        found[share.backend] = found.get(share.backend, 0) + share.size
    return found
