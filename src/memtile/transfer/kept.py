"""`KeptTiles`: the most used experts of a home, in memory that a budget leaves over.

Only experts are kept. Every other tile is used once in each forward, so it makes no difference
which of those is in memory, and a plan decides that beforehand.

Counts decide what is kept, and are halved now and then, so that old uses weigh less. A tile is
copied from the slab that it was read into: keeping it costs no read. Once the room is used up, a
tile is kept only in place of tiles that were used less.

Source: admission by frequency with ageing is TinyLFU (Einziger, Friedman and Manes, 2017).
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Final
from weakref import WeakKeyDictionary

from torch import Tensor

from memtile.errors import HomeFullError
from memtile.homes import Allocation, fork_safe_lock
from memtile.homes.kernel import private_view, tensor_over

AGEING: Final = 10  # uses for each tile that is known, after which counts are halved
LEAD: Final = 2  # uses that a tile must have more than those that it replaces


class KeptTiles:
    """Copies of the most used tiles of one home, at most `limit` bytes; safe to use from threads.

    Attributes:
        used_bytes: of all tiles that were asked for, each time.
        hit_bytes: of those that were kept then.
        epoch: counts how often all copies were dropped, since something was written.
        limit: bytes; 0: nothing is kept.
    """

    def __init__(self, limit: int) -> None:
        self.used_bytes = self.hit_bytes = self.epoch = 0
        self.limit = limit
        self._nbytes = 0
        self._least = 0  # no kept tile was used less
        self._since_ageing = 0
        self._counts: WeakKeyDictionary[Allocation, int] = WeakKeyDictionary()
        self._kept: WeakKeyDictionary[Allocation, Tensor] = WeakKeyDictionary()
        self._lock = fork_safe_lock()

    def __contains__(self, allocation: Allocation) -> bool:
        return allocation in self._kept

    def find(self, allocation: Allocation) -> Tensor | None:
        """The tile's values where it is kept, only to be read. Counts a use of it."""
        with self._lock:
            self._count(allocation)
            found = self._kept.get(allocation)
            if found is not None and not allocation.is_untouched():
                self._drop(allocation)
                return None
            if found is not None:
                self.hit_bytes += allocation.nbytes
            return found

    def offer(self, allocation: Allocation, values: Tensor, epoch: int) -> None:
        """Keep a copy of values that were just read, where there is room or it is used most.

        `epoch` is the one before they were asked for: what was read in an older one may be stale.
        """
        if allocation.room > self.limit or not allocation.is_untouched():
            return
        with self._lock, suppress(HomeFullError):  # no memory for it: it is read the next time too
            if epoch != self.epoch or allocation in self._kept:
                return
            if self._make_room(allocation):
                copy = tensor_over(private_view(allocation.room), values.shape, values.dtype)
                self._kept[allocation] = copy.copy_(values)
                self._nbytes += allocation.room

    def clear(self) -> None:
        """Drop all copies, which may be out of date; counts stay."""
        with self._lock:
            self.epoch += 1
            self._kept.clear()
            self._nbytes = self._least = 0

    def _count(self, allocation: Allocation) -> None:
        self.used_bytes += allocation.nbytes
        self._counts[allocation] = self._counts.get(allocation, 0) + 1
        self._since_ageing += 1
        if self._since_ageing > AGEING * len(self._counts):
            self._since_ageing = 0
            self._least //= 2
            for each, uses in list(self._counts.items()):
                self._counts[each] = uses // 2

    def _make_room(self, allocation: Allocation) -> bool:
        """Whether there is room for it, after dropping tiles that were used less."""
        if self._nbytes + allocation.room <= self.limit:
            return True
        enough = self._counts[allocation] - LEAD
        if enough < self._least:
            return False
        by_uses = sorted(self._kept, key=lambda each: self._counts[each])
        self._nbytes = sum(each.room for each in by_uses)  # some may have gone with their model
        self._least = self._counts[by_uses[0]] if by_uses else 0
        replaced = list(self._first(by_uses, self._nbytes + allocation.room - self.limit))
        if any(self._counts[each] > enough for each in replaced):
            return False
        for each in replaced:
            self._drop(each)
        return True

    def _first(self, allocations: Sequence[Allocation], nbytes: int) -> Iterator[Allocation]:
        """As many of the first of them as have so many bytes."""
        for each in allocations:
            if nbytes <= 0:
                return
            nbytes -= each.room
            yield each

    def _drop(self, allocation: Allocation) -> None:
        del self._kept[allocation]
        self._nbytes -= allocation.room
