"""A home on disk: one unnamed file, whose tensors are mapped, and read and written directly.

Linux only. A parked tensor lies over a shared map of the file, so anything may read and write it.
`read` and `write` go to the file itself: through the page cache where the whole file fits there,
past it (`O_DIRECT`) where it does not.
"""

import logging
import mmap
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
from memtile.homes import disk_io
from memtile.homes.filesystems import usable_folder
from memtile.homes.home import Allocation, Home, Reservation
from memtile.homes.kernel import tensor_over
from memtile.homes.limits import free_bytes
from memtile.homes.live_file import LiveFile
from memtile.homes.segments import NOBODY, Segments

_log = logging.getLogger("memtile.homes")

PAGE_CACHE: Final = "page cache"
DIRECT: Final = "direct"


class DiskHome(Home):
    """Parks tensors in a file on disk, which has no name and ends with the process.

    Args:
        folder: where; None: the first that is usable of $TMPDIR, /var/tmp, the system's folder for
            temporary files and the working directory. One in memory (tmpfs) is refused.

    Attributes:
        folder: where the file is.
        path: what `read` and `write` use: "page cache" or "direct". Decided when the file grows.

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
        self._segments = Segments(self._file.extend)
        self._cleanup = weakref.finalize(self, _clean_up, self._file, self._segments)
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
                self._file.watch(self._segments.unmap_pages)
            return True

    def _is_unwritten(self) -> bool:
        return os.getpid() == self._owner and self._file.is_unwritten()

    def _choose_path(self) -> None:
        """Decide by what `read` and `write` go, again whenever the file has grown."""
        size = self._file.size
        if size == self._chosen_at:
            return
        self._chosen_at, free = size, free_bytes()
        fits = free is not None and size <= free // 2
        path = PAGE_CACHE if fits or self._file.direct_fd is None else DIRECT
        fit = "fit" if fits else "do not fit"
        reason = f"its {size} bytes {fit} into half of {free} bytes of free memory"
        if self._file.direct_fd is None:
            reason = "direct I/O is refused here, or does not agree with the mapping"
        if path != self.path:
            self.path = path
            _log.info("home in %s: reads and writes go by %s: %s", self.folder, path, reason)

    def _check_process(self) -> None:
        if os.getpid() != self._owner:
            raise HomeError(
                f"{self!r} belongs to process {self._owner}, this is {os.getpid()}: a forked "
                "process may read its tiles, and neither writes them nor parks new ones; park in a "
                "home of its own"
            )

    def _release(self) -> None:
        self._cleanup()

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
        self.offset = 0
        if self.room:
            extent = home._segments.take(self.room, home._thread.holder)
            self._memory, self._start = extent.segment.memory, extent.start
            self.offset = extent.segment.offset + extent.start
            self._view = memoryview(self._memory)[extent.start : extent.start + self.room]
            home._segments.give_with(self._view, extent)
        self.address = self.tensor().data_ptr()

    def tensor(self) -> Tensor:
        return tensor_over(self._view, self.shape, self.dtype)

    def evict(self) -> None:
        """Drops the pages that tensors brought into this process's memory; contents stay."""
        if self.room:
            aligned = self._start // mmap.PAGESIZE * mmap.PAGESIZE  # may be larger than PAGE
            length = self._start + self.room - aligned
            self._memory.madvise(mmap.MADV_DONTNEED, aligned, length)

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
