"""The rooms of a home's file whose pages are mapped: those in use, and what was used before.

To drop pages interrupts each core that may know them: 70 to 100 µs, however few they are. So rooms
stay mapped after their use, and what is too much is dropped together.
"""

import errno
import mmap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from memtile.homes.kernel import HUGE_PAGE, fork_safe_lock

_POPULATE_READ: Final = 22  # madvise(2); mmap has no names for them
_POPULATE_WRITE: Final = 23


@dataclass(eq=False)
class MappedRoom:
    """Bytes `start` to `stop` of a map, and how many use them."""

    memory: mmap.mmap
    start: int
    stop: int
    users: int = 0
    is_written: bool = False  # whether its pages were mapped to be written to

    def populate(self) -> None:
        """Map its pages, so that a disk's error is an OSError now and no SIGBUS later."""
        try:
            self._advise(_POPULATE_WRITE if self.is_written else _POPULATE_READ)
        except OSError as error:
            if error.errno != errno.EINVAL:  # Linux before 5.14: pages come when they are used
                self.drop()
                raise

    def drop(self) -> None:
        """Drop its pages; contents stay."""
        self._advise(mmap.MADV_DONTNEED)

    def _advise(self, advice: int) -> None:
        first = self.start // mmap.PAGESIZE * mmap.PAGESIZE  # may be larger than PAGE
        self.memory.madvise(advice, first, self.stop - first)


class MappedPages:
    """The mapped rooms of one file by their offsets in it, the one that was used last at the end.

    A room may have been given back meanwhile, and another taken there.
    """

    def __init__(self) -> None:
        self._rooms: dict[int, MappedRoom] = {}
        # Rooms that nobody uses, of each huge page: it counts as memory whole, and once. Of tiles
        # of experts, 1.4 MB here and there, 16 MB took 26.
        self._idle = Counter[int]()
        self._lock = fork_safe_lock()

    def use(self, offset: int, memory: mmap.mmap, start: int, stop: int, written: bool) -> None:
        """Map a room's pages until `release`; OSError where the disk cannot be read."""
        with self._lock:
            room = self._take(offset)
            if room is None or room.stop != stop or (written and not room.is_written):
                users = 0 if room is None else room.users
                room = MappedRoom(memory, start, stop, users, written)
                room.populate()
            room.users += 1
            self._rooms[offset] = room

    def release(self, offset: int, kept_bytes: int | None) -> None:
        """The end of a use: where more than `kept_bytes` are idle, drop a quarter of that."""
        with self._lock:
            room = self._rooms.get(offset)
            if room is not None:
                room.users -= 1
                if not room.users:
                    self._idle.update(_huge_pages(offset, room))
            if kept_bytes is not None and self._idle_bytes > kept_bytes:
                self._drop_oldest(kept_bytes - kept_bytes // 4)

    def discard(self, offset: int) -> None:
        """A room's pages were dropped. Finalizers may call it, also inside the other methods."""
        with self._lock:
            self._take(offset)

    def clear(self) -> None:
        """All pages were dropped."""
        with self._lock:
            self._rooms.clear()
            self._idle.clear()

    @property
    def _idle_bytes(self) -> int:
        return len(self._idle) * HUGE_PAGE

    def _take(self, offset: int) -> MappedRoom | None:
        room = self._rooms.pop(offset, None)
        if room is not None and not room.users:
            for page in _huge_pages(offset, room):
                self._idle[page] -= 1
                if not self._idle[page]:
                    del self._idle[page]
        return room

    def _drop_oldest(self, left: int) -> None:
        dropped = []
        for offset in list(self._rooms):
            if self._idle_bytes <= left:
                break
            room = self._rooms.get(offset)  # None: a finalizer has discarded it meanwhile
            if room is not None and not room.users:
                self._take(offset)
                dropped.append(room)
        for run in _joined(dropped):
            run.drop()


def _huge_pages(offset: int, room: MappedRoom) -> range:
    """The numbers of those of the file that a room at this offset lies in."""
    return range(offset // HUGE_PAGE, -(-(offset + room.stop - room.start) // HUGE_PAGE))


def _joined(rooms: Iterable[MappedRoom]) -> Iterator[MappedRoom]:
    """Neighbours as one."""
    run: MappedRoom | None = None
    for room in sorted(rooms, key=lambda room: (id(room.memory), room.start)):
        if run is not None and run.memory is room.memory and run.stop == room.start:
            run.stop = room.stop
            continue
        if run is not None:
            yield run
        run = room
    if run is not None:
        yield run
