"""A home on disk: one unnamed file, whose tensors are mapped, and read and written directly.

Linux only. A parked tensor lies over a shared map of the file, so anything may read and write it.
Where the whole file fits into the page cache, tiles are worked on there, through the map. Where it
does not, they are read and written past the page cache (`O_DIRECT`), into slabs.
"""

import logging
import os
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, Final

import torch
from torch import Tensor

from memtile.errors import HomeError, UnsupportedPlatformError
from memtile.geometry import HUGE_PAGE
from memtile.homes import disk_io
from memtile.homes.endings import Ending
from memtile.homes.filesystems import overwrites_in_place, usable_folder
from memtile.homes.home import Allocation, Home, Reservation, Rooms
from memtile.homes.kernel import tensor_over
from memtile.homes.kernel_moves import RoomMove, start_kernel_moves
from memtile.homes.limits import page_cache_fit
from memtile.homes.live_file import LiveFile
from memtile.homes.mapped_pages import MappedPages, Windows
from memtile.homes.segments import NOBODY, Segments

_log = logging.getLogger("memtile.homes")

PAGE_CACHE: Final = "page cache"
DIRECT: Final = "direct"
BUFFERED: Final = "buffered"

_ZEROS: Final = memoryview(bytes(HUGE_PAGE))


class DiskHome(Home):
    """Parks tensors in a file on disk, which has no name and ends with the process.

    Args:
        folder: where; None: the first that is usable of $TMPDIR, /var/tmp, the system's folder for
            temporary files and the working directory. One in memory (tmpfs) is refused.

    Attributes:
        folder: where the file is.
        path: how tiles come to memory. "page cache": the whole file fits into half of the free
            memory, and tiles are worked on there; "direct": it does not, and they are read and
            written past it; "buffered": read and written through it, where one of the two cannot
            be. Decided when the file grows; never back to "page cache".

    Raises:
        ArgumentError: the folder is no path.
        HomeError: the folder is unusable, or its filesystem maps no files.
        HomeFullError: the disk is full.
        UnsupportedPlatformError: this is not Linux.

    Examples:
        >>> home = memtile.DiskHome("/var/tmp")
        >>> model = memtile.tile(model, max_tile_bytes=64 << 10, home=home)
    """

    works_in_place: ClassVar[bool] = False

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        if sys.platform != "linux":
            raise UnsupportedPlatformError(
                f"a DiskHome on {sys.platform}: it needs Linux; park tiles in a HostHome"
            )
        self.folder = usable_folder(folder)
        self._owner = os.getpid()
        self._thread = _ThreadHolder()
        self._file = LiveFile(self.folder)
        self._mapped = MappedPages()
        self._segments = Segments(self._file.extend)
        self._cleanup = weakref.finalize(self, _clean_up, self._file, self._segments)
        self._is_overwritten = overwrites_in_place(self.folder)
        self.path, self._chosen_at = "", 0
        self._choose_path()

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Allocation:
        """Room for one tensor; see `Home.allocate`."""
        with self._growing():
            return _DiskAllocation(self, shape, dtype)

    def hold(self, rooms: Sequence[int]) -> Reservation:
        """Allocates the rooms on the disk now, for one owner; see `Home.hold`."""
        with self._growing():
            return _DiskReservation(self, [room for room in rooms if room])

    @contextmanager
    def _growing(self) -> Iterator[None]:
        with self.transferring():
            self._check_process()
            yield
            self._choose_path()

    def watch_writes(self) -> bool:
        """Watches the whole file; see `Home.watch_writes`. A fork does not watch."""
        with self.transferring():
            if self._is_unwritten():
                return False
            if os.getpid() == self._owner and self._file.tells_of_writes:
                self._file.watch(self._unmap_pages)
            return True

    def _unmap_pages(self) -> None:
        self._segments.unmap_pages()
        self._mapped.clear()

    def _is_unwritten(self) -> bool:
        return os.getpid() == self._owner and self._file.is_unwritten()

    @property
    def is_mapped(self) -> bool:
        """Whether tiles are worked on in the page cache; see `Home.is_mapped`."""
        return self.path == PAGE_CACHE and os.getpid() == self._owner

    def _choose_path(self) -> None:
        """Decide how tiles come to memory, again whenever the file has grown.

        Never back to work in the page cache: slabs may hold what is newer than the file.
        """
        size = self._file.size
        if size == self._chosen_at:
            return
        self._chosen_at, (fits, reason) = size, page_cache_fit(size)
        if fits and self._is_overwritten and self.path in ("", PAGE_CACHE):
            path = PAGE_CACHE
        elif fits or self._file.direct_fd is None:
            path = BUFFERED
        else:
            path = DIRECT
        if self._file.direct_fd is None:
            reason += "; direct I/O is refused here, or does not agree with the mapping"
        if path != self.path:
            self.path = path
            _log.info("home in %s: tiles come to memory by %s: %s", self.folder, path, reason)

    def _make_pages(self, start: int, end: int) -> None:
        """Write zeros to these bytes of the file where tiles are worked on in the page cache.

        A write of a huge page makes one. To map a MiB of it and drop it takes 3 µs, of smaller ones
        20 and more. To make it writable takes 20 µs, and 780 after writes of a MiB, all of which
        ext4 looks through for each 4 KiB.
        """
        self._choose_path()
        if self.is_mapped:
            for at in range(start - start % HUGE_PAGE, end, HUGE_PAGE):
                first = max(at, start)
                disk_io.drain(self._file.fd, _ZEROS[: min(at + HUGE_PAGE, end) - first], first)

    def _check_process(self) -> None:
        if os.getpid() != self._owner:
            raise HomeError(
                f"{self!r} belongs to process {self._owner}, this is {os.getpid()}: a forked "
                "process may read its tiles, and neither writes them nor parks new ones; park in a "
                "home of its own"
            )

    def start_moves(self, rooms: Rooms, writes: bool, ending: Ending) -> bool:
        """By the kernel, where they go past the page cache; see `Home.start_moves`."""
        if self.path != DIRECT or os.getpid() != self._owner:
            return False
        direct, moves = self._file.direct_fd, list[RoomMove]()
        for allocation, memory in rooms:
            if direct is None or not isinstance(allocation, _DiskAllocation):
                return False
            moves.append(RoomMove(allocation, memory, direct, allocation.offset))
        return start_kernel_moves(self, moves, writes, ending)

    def _release(self) -> None:
        self._cleanup()
        self._mapped.clear()  # it keeps maps

    @property
    def _fd(self) -> int:
        direct = self._file.direct_fd
        return direct if self.path == DIRECT and direct is not None else self._file.fd

    def __repr__(self) -> str:
        return f"DiskHome({str(self.folder)!r})"


class _ThreadHolder(threading.local):
    """The holder whose reserved room this thread uses."""

    holder = NOBODY


class _DiskReservation(Reservation):
    home: DiskHome

    def __init__(self, home: DiskHome, rooms: Sequence[int]) -> None:
        super().__init__(home)
        self._holder = home._segments.hold(rooms)
        weakref.finalize(self, home._segments.release, self._holder).atexit = False

    @contextmanager
    def used_by_this_thread(self) -> Iterator[None]:
        thread = self.home._thread
        before, thread.holder = thread.holder, self._holder
        try:
            yield
        finally:
            thread.holder = before


class _DiskAllocation(Allocation):
    home: DiskHome

    def __init__(self, home: DiskHome, shape: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__(home, shape, dtype)
        self._view: memoryview | None = None
        self._windows: Windows = ()
        self.offset = 0
        if self.room:
            extent = home._segments.take(self.room, home._make_pages, home._thread.holder)
            start, stop = extent.start, extent.start + self.room
            self.offset = extent.segment.offset + start
            self._windows = home._mapped.windows(extent.segment, start, stop)
            self._view = memoryview(extent.segment.memory)[start:stop]
            home._segments.give_with(self._view, extent)
        self._tensor = self.tensor()  # for all uses: to make one takes 10 µs
        self.address = self._tensor.data_ptr()

    def tensor(self) -> Tensor:
        return tensor_over(self._view, self.shape, self.dtype)

    def populate(self, written: bool = False) -> Tensor:
        """Maps its pages, so that a disk's error is no SIGBUS later; see `Allocation.populate`."""
        try:
            self.home._mapped.use(self._windows, written)
        except OSError as error:
            raise disk_io.failed("read", self.room, self.offset, error) from error
        return self._tensor

    def release(self) -> None:
        """Drops pages where more are mapped than the home keeps; see `Allocation.release`."""
        self.home._mapped.release(self._windows, self.home.mapped_bytes)

    def evict(self) -> None:
        """Drops the pages that tensors brought into this process's memory; contents stay.

        Those of its huge pages that are in use stay mapped.
        """
        self.home._mapped.evict(self._windows)

    def is_untouched(self) -> bool:
        """Whether nothing was written to the whole file since the last `watch_writes`."""
        with self.home.transferring():
            return self.home._is_unwritten()

    def _read_into(self, into: Tensor, start: int) -> None:
        disk_io.fill(self.home._fd, disk_io.bytes_of(into), self.offset + start)

    def _write_from(self, source: Tensor, start: int) -> None:
        self.home._check_process()
        disk_io.drain(self.home._fd, disk_io.bytes_of(source), self.offset + start)


def _clean_up(file: LiveFile, segments: Segments) -> None:
    file.close()
    segments.drop()
