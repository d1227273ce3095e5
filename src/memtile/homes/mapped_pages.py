"""The pages of a home's file that are mapped: those in use, and what was used before.

They are mapped and dropped by huge pages of the file, since each counts as memory whole: of tiles
of experts, 1.4 MB here and there, 16 MB took 26. To drop pages interrupts each core that may know
them: 70 to 100 µs, however few they are. So they stay mapped after their use, and what is too much
is dropped together.
"""

import errno
import mmap
import weakref
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Final

from memtile.geometry import HUGE_PAGE
from memtile.homes.kernel import fork_safe_lock
from memtile.homes.segments import Segment

_POPULATE_READ: Final = 22  # madvise(2); mmap has no names for them
_POPULATE_WRITE: Final = 23


@dataclass(eq=False)
class MappedWindow:
    """Bytes `start` to `stop` of a map, in one huge page of the file, and how many use them."""

    memory: mmap.mmap
    start: int
    stop: int
    users: int = 0
    is_mapped: bool = False
    is_written: bool = False  # whether they were mapped to be written to

    def populate(self, written: bool) -> None:
        """Map its pages, so that a disk's error is an OSError now and no SIGBUS later."""
        try:
            self._advise(_POPULATE_WRITE if written else _POPULATE_READ)
        except OSError as error:
            if error.errno != errno.EINVAL:  # Linux before 5.14: pages come when they are used
                self.drop()
                raise
        self.is_mapped, self.is_written = True, written

    def drop(self) -> None:
        """Drop its pages; contents stay."""
        self._advise(mmap.MADV_DONTNEED)
        self.mark_dropped()

    def mark_dropped(self) -> None:
        """Its pages were dropped."""
        self.is_mapped = self.is_written = False

    def _advise(self, advice: int) -> None:
        self.memory.madvise(advice, self.start, self.stop - self.start)


Windows = Sequence[MappedWindow]


class MappedPages:
    """The mapped windows of one file."""

    def __init__(self) -> None:
        # By offset of the segment, and number of the huge page. Allocations keep them, and `_idle`.
        self._windows = weakref.WeakValueDictionary[tuple[int, int], MappedWindow]()
        self._idle: dict[MappedWindow, None] = {}  # mapped, and used by nobody; the oldest first
        self._used = set[MappedWindow]()
        self._lock = fork_safe_lock()

    def windows(self, segment: Segment, start: int, stop: int) -> Windows:
        """Those that bytes `start` to `stop` of a segment lie in."""
        offset, size = segment.offset, len(segment.memory)
        numbers = range((offset + start) // HUGE_PAGE, -(-(offset + stop) // HUGE_PAGE))
        with self._lock:
            found = []
            for number in numbers:
                first = max(0, number * HUGE_PAGE - offset)
                last = min(size, (number + 1) * HUGE_PAGE - offset)
                window = MappedWindow(segment.memory, first, last)
                found.append(self._windows.setdefault((offset, number), window))
            return found

    def use(self, windows: Windows, written: bool) -> None:
        """Map these until `release`; OSError where the disk cannot be read."""
        with self._lock:
            for window in windows:
                if not window.is_mapped or (written and not window.is_written):
                    window.populate(written)
                    if not window.users:  # unless the next one cannot be mapped
                        self._idle[window] = None
            for window in windows:
                window.users += 1
                self._used.add(window)
                self._idle.pop(window, None)

    def release(self, windows: Windows, kept_bytes: int | None) -> None:
        """The end of a use: where more than `kept_bytes` are idle, drop half of that."""
        with self._lock:
            for window in windows:
                window.users -= 1
                if not window.users:
                    self._used.discard(window)
                    if window.is_mapped:
                        self._idle[window] = None
            if kept_bytes is not None and len(self._idle) * HUGE_PAGE > kept_bytes:
                self._drop_oldest(kept_bytes // 2 // HUGE_PAGE)

    def evict(self, windows: Windows) -> None:
        """Drop those that nobody uses. Finalizers may call it, also inside the other methods."""
        with self._lock:
            for window in windows:
                if not window.users:
                    self._idle.pop(window, None)
                    window.drop()

    def clear(self) -> None:
        """All pages were dropped."""
        with self._lock:
            for window in self._windows.values():
                window.mark_dropped()
            self._idle.clear()

    def _drop_oldest(self, left: int) -> None:
        oldest = list(self._idle)[: len(self._idle) - left]
        for window in oldest:
            self._idle.pop(window, None)  # a finalizer may have dropped it meanwhile
            window.mark_dropped()
        for run in _runs(oldest, {*self._idle, *self._used}):
            run.drop()


def _runs(dropped: Windows, mapped: Set[MappedWindow]) -> list[MappedWindow]:
    """What is to be dropped, as one where nothing else is mapped in between."""
    runs, last = list[MappedWindow](), None
    for window in sorted({*dropped, *mapped}, key=lambda each: (id(each.memory), each.start)):
        if window in mapped:
            last = None
        elif last is not None and last.memory is window.memory:
            last.stop = window.stop
        else:
            last = MappedWindow(window.memory, window.start, window.stop)
            runs.append(last)
    return runs
