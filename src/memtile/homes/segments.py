"""Which bytes of a growing file are free: segments, each mapped once, and rooms within them."""

import mmap
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Final, NamedTuple

NOBODY: Final = 0
"""The number of no holder: rooms that are free for all."""


class FreeRoom:
    """The free bytes of one range, as runs that never touch each other; first fit.

    Args:
        size: how many bytes, all of them free.
    """

    def __init__(self, size: int) -> None:
        self._starts, self._sizes = [0], [size]

    @property
    def largest(self) -> int:
        """Bytes of the longest run."""
        return max(self._sizes, default=0)

    @property
    def total(self) -> int:
        """Free bytes."""
        return sum(self._sizes)

    def take(self, size: int) -> int | None:
        """The start of so many bytes, free until now; None where no run is long enough."""
        for place, free in enumerate(self._sizes):
            if free >= size:
                return self._cut(place, size)
        return None

    def give(self, start: int, size: int) -> None:
        """Makes the bytes free again, joined with the free ones at their sides."""
        place = bisect_left(self._starts, start)
        if place < len(self._starts) and start + size == self._starts[place]:
            del self._starts[place]
            size += self._sizes.pop(place)
        if place and self._starts[place - 1] + self._sizes[place - 1] == start:
            self._sizes[place - 1] += size
        else:
            self._starts.insert(place, start)
            self._sizes.insert(place, size)

    def _cut(self, place: int, size: int) -> int:
        start = self._starts[place]
        self._starts[place] += size
        self._sizes[place] -= size
        if not self._sizes[place]:
            del self._starts[place], self._sizes[place]
        return start


@dataclass
class Segment:
    """A stretch of the file that was made and mapped at once.

    Attributes:
        offset: where it begins in the file.
        memory: its shared map.
        free: its free bytes, counted from its beginning.
    """

    offset: int
    memory: mmap.mmap
    free: FreeRoom


class Extent(NamedTuple):
    """A room in a segment: bytes `start` to `start + size` of it, and for whom it is held."""

    segment: Segment
    start: int
    size: int
    holder: int = NOBODY


@dataclass
class Segments:
    """All segments of a file, safe to use from any thread.

    Attributes:
        grow: makes a segment with at least so many bytes, or raises and changes nothing.
    """

    grow: Callable[[int], Segment]
    _all: list[Segment] = field(default_factory=list)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _held: dict[int, dict[int, list[Extent]]] = field(default_factory=dict)  # by holder and size
    _holders: Iterator[int] = field(default_factory=lambda: count(1))
    # Both come back from finalizers, which run at any time, also in a thread that is inside
    # `take`: they only append here, which needs no lock.
    _returned: deque[tuple[int, int, int, int]] = field(default_factory=deque)
    _gone: deque[int] = field(default_factory=deque)

    def take(self, size: int, holder: int = NOBODY) -> Extent:
        """Room for so many bytes: what is held for the holder, the first that is free, or new."""
        with self._lock:
            self._collect()
            held = self._held.get(holder, {}).get(size)
            if held:
                return held.pop()
            return self._free(size) or self._in(self._add(size), size)

    def hold(self, sizes: Sequence[int]) -> int:
        """Sets rooms of these sizes aside; gives the holder's number, for `take`.

        Only `release` gives them back. Rooms that were taken come back to their holder.
        """
        with self._lock:
            self._collect()
            holder, found, missing = next(self._holders), list[Extent](), list[int]()
            for size in sorted(sizes, reverse=True):
                extent = self._free(size)
                if extent is None:
                    missing.append(size)
                else:
                    found.append(extent)
            try:
                segment = self._add(sum(missing)) if missing else None
            except BaseException:
                self._give(found)
                raise
            if segment is not None:
                found.extend(self._in(segment, size) for size in missing)
            rooms = self._held[holder] = {size: [] for size in sizes}
            for extent in found:
                rooms[extent.size].append(extent._replace(holder=holder))
            return holder

    def release(self, holder: int) -> None:
        """Frees what is held and not taken; it takes no lock."""
        self._gone.append(holder)

    def reserve(self, size: int) -> None:
        """Makes sure that there is one free run of so many bytes."""
        with self._lock:
            self._collect()
            if all(segment.free.largest < size for segment in self._all):
                self._add(size)

    def giver(self, extent: Extent) -> Callable[[], None]:
        """What gives the room back when it is called; it keeps no map alive and takes no lock."""
        give = self._returned.append
        room = (extent.segment.offset, extent.start, extent.size, extent.holder)
        return lambda: give(room)

    def renew_lock(self) -> None:
        """This is the child of a fork: whoever held the lock may be gone."""
        self._lock = threading.RLock()

    def drop(self) -> None:
        """Lets go of all maps; those that tensors lie over stay until the tensors are gone."""
        with self._lock:
            self._all.clear()
            self._held.clear()

    def _add(self, size: int) -> Segment:
        segment = self.grow(size)
        self._all.append(segment)
        return segment

    def _collect(self) -> None:
        while self._gone:
            rooms = self._held.pop(self._gone.popleft(), {})
            self._give(extent for held in rooms.values() for extent in held)
        by_offset = {segment.offset: segment for segment in self._all} if self._returned else {}
        while self._returned:
            offset, *room = self._returned.popleft()
            if offset in by_offset:  # after `drop` there is none
                self._give([Extent(by_offset[offset], *room)])

    def _give(self, extents: Iterable[Extent]) -> None:
        """Rooms are free again, for the holder that they were held for, if it is still there."""
        for extent in extents:
            rooms = self._held.get(extent.holder)
            if rooms is None:
                extent.segment.free.give(extent.start, extent.size)
            else:
                rooms[extent.size].append(extent)

    def _free(self, size: int) -> Extent | None:
        for segment in self._all:
            start = segment.free.take(size)
            if start is not None:
                return Extent(segment, start, size)
        return None

    def _in(self, segment: Segment, size: int) -> Extent:
        start = segment.free.take(size)
        assert start is not None
        return Extent(segment, start, size)
