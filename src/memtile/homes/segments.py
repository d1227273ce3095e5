"""Which bytes of a growing file are free. It grows by segments, each of which is mapped once."""

import mmap
import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Final, NamedTuple

from memtile.geometry import HUGE_PAGE, round_up
from memtile.homes.kernel import fork_safe_lock

NOBODY: Final = 0
"""The number of no holder: rooms that are free for all."""


class FreeRoom:
    """The free bytes of one segment; first fit.

    `runs` of free bytes are (start, stop), in order; no run touches another.
    """

    def __init__(self, size: int) -> None:
        self.runs = [(0, size)]

    def take(self, size: int) -> int | None:
        """The start of so many bytes, free until now; None where no run is long enough."""
        for place, (start, stop) in enumerate(self.runs):
            if stop - start >= size:
                rest = (start + size, stop)
                self.runs[place : place + 1] = [rest] if rest[0] < stop else []
                return start
        return None

    def give(self, start: int, size: int) -> None:
        """Makes the bytes free again, joined with the free ones at their sides."""
        stop = start + size
        place = bisect_left(self.runs, (start, stop))
        if place < len(self.runs) and self.runs[place][0] == stop:
            stop = self.runs.pop(place)[1]
        if place and self.runs[place - 1][1] == start:
            place -= 1
            start = self.runs.pop(place)[0]
        self.runs.insert(place, (start, stop))


@dataclass(eq=False)
class Segment:
    """A part of the file that was made and mapped at once."""

    offset: int  # where it begins in the file
    memory: mmap.mmap  # shared
    free: FreeRoom  # counted from its beginning
    made: int = 0  # bytes of it, from its beginning, whose pages were made

    def take(self, size: int) -> "Extent | None":
        """A room of so many bytes; None where there is none."""
        start = self.free.take(size)
        return None if start is None else Extent(self, start, size)


class Extent(NamedTuple):
    """A room in a segment: bytes `start` to `start + size` of it, and for whom it is held."""

    segment: Segment
    start: int
    size: int
    holder: int = NOBODY


class Segments:
    """All segments of a file, safe to use from any thread.

    `grow` makes a segment with at least so many bytes, or raises and changes nothing.
    """

    def __init__(self, grow: Callable[[int], Segment]) -> None:
        self._grow = grow
        self._all: list[Segment] = []
        self._lock = fork_safe_lock()
        self._held: dict[int, dict[int, list[Extent]]] = {}  # by holder and size
        self._holders = count(1)
        # Both are filled by finalizers, which run at any time, also in a thread that is inside
        # `take`: appending needs no lock.
        self._returned: deque[tuple[weakref.ref[Segment], int, int, int]] = deque()
        self._gone: deque[int] = deque()

    def take(
        self, size: int, make_pages: Callable[[int, int], None], holder: int = NOBODY
    ) -> Extent:
        """Room for so many bytes: what is held for the holder, the first that is free, or new.

        Before, `make_pages` may write to bytes of the file that were never taken, from an offset to
        another: those of the room, and what lies before it and up to the end of its huge page.
        """
        with self._lock:
            self._collect()
            held = self._held.get(holder, {}).get(size)
            found = held.pop() if held else self._first_free(size) or self._new([size])[0]
            try:
                _make(found, make_pages)
            except BaseException:
                self._give([found])
                raise
            return found

    def hold(self, sizes: Sequence[int]) -> int:
        """Sets rooms of these sizes aside; gives the holder's number, for `take`.

        Only `release` gives them back. Rooms that were taken come back to their holder.
        """
        with self._lock:
            self._collect()
            found, missing = list[Extent](), list[int]()
            for size in sorted(sizes, reverse=True):
                extent = self._first_free(size)
                if extent is None:
                    missing.append(size)
                else:
                    found.append(extent)
            try:
                found += self._new(missing)
            except BaseException:
                self._give(found)
                raise
            holder = next(self._holders)
            self._held[holder] = {size: [] for size in sizes}
            self._give(extent._replace(holder=holder) for extent in found)
            return holder

    def release(self, holder: int) -> None:
        """Frees what is held and not taken; it takes no lock."""
        self._gone.append(holder)

    def give_with(self, view: memoryview, extent: Extent) -> None:
        """Gives the room back once the view is gone, unless the file is gone before."""
        room = weakref.ref(extent.segment), extent.start, extent.size, extent.holder
        weakref.finalize(view, self._returned.append, room).atexit = False

    def unmap_pages(self) -> None:
        """The next read or write through a map goes by the kernel; contents stay."""
        with self._lock:
            for segment in self._all:
                segment.memory.madvise(mmap.MADV_DONTNEED)

    def drop(self) -> None:
        """Drops all maps; those that tensors lie over stay until the tensors are gone."""
        with self._lock:
            self._all.clear()
            self._held.clear()

    def _collect(self) -> None:
        while self._gone:
            rooms = self._held.pop(self._gone.popleft(), {})
            self._give(extent for held in rooms.values() for extent in held)
        while self._returned:
            reference, start, size, holder = self._returned.popleft()
            segment = reference()
            if segment is not None:  # None after `drop`
                self._give([Extent(segment, start, size, holder)])

    def _give(self, extents: Iterable[Extent]) -> None:
        """Rooms are free again, for the holder that they were held for, if it is still there."""
        for extent in extents:
            rooms = self._held.get(extent.holder)
            if rooms is None:
                extent.segment.free.give(extent.start, extent.size)
            else:
                rooms[extent.size].append(extent)

    def _first_free(self, size: int) -> Extent | None:
        for segment in self._all:
            extent = segment.take(size)
            if extent is not None:
                return extent
        return None

    def _new(self, sizes: Sequence[int]) -> list[Extent]:
        """Rooms of these sizes in a new segment."""
        if not sizes:
            return []
        segment = self._grow(sum(sizes))
        self._all.append(segment)
        return [extent for size in sizes if (extent := segment.take(size))]


def _make(extent: Extent, make_pages: Callable[[int, int], None]) -> None:
    segment, stop = extent.segment, extent.start + extent.size
    if stop > segment.made:  # all that was ever taken of it lies before
        end = round_up(segment.offset + stop, HUGE_PAGE)
        end = min(end, segment.offset + len(segment.memory))
        make_pages(segment.offset + segment.made, end)
        segment.made = end - segment.offset
