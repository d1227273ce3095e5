"""A home on disk: one file without a name, its tiles page-aligned, read and written past the map.

Linux only. A parked tensor lies over a shared map of the file, so anything may read and write it;
`read` and `write` go to the file itself, through the page cache where all of the file fits there,
and past it (`O_DIRECT`) where it does not.
"""

import logging
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Final

import torch
from torch import Tensor

from memtile.errors import ArgumentError, HomeError, SealError, UnsupportedPlatformError
from memtile.homes import disk_io, sealing
from memtile.homes.buffers import tensor_over
from memtile.homes.filesystems import usable_folder
from memtile.homes.free_memory import free_bytes
from memtile.homes.home import Berth, Home, Reservation, whole_pages
from memtile.homes.live_file import LiveFile
from memtile.homes.sealed_file import SealedFile
from memtile.homes.segments import NOBODY, Extent, Segments

_log = logging.getLogger("memtile.homes")

PAGE_CACHE: Final = "page cache"
DIRECT: Final = "direct"


class DiskHome(Home):
    """A file in a folder, which nobody else can open and which is gone when the process is.

    Args:
        folder: where; None: the first that is usable of $TMPDIR, /var/tmp, the system's folder for
            temporary files and the working directory. One in memory (tmpfs) is refused.
        keep: at closing, seal what has a label into `tiles.memtile` in the folder. A block that is
            left by an exception, and a home that is dropped without `close`, seal nothing.

    Attributes:
        folder: where the file is.
        keep: whether it will be sealed.
        path: what `read` and `write` use: "page cache" or "direct". Decided when the file grows.
        sealed: what `reopen` found, to copy tiles from; closed with the home.

    Raises:
        HomeError: the folder is unusable, its filesystem maps no files, or `keep` and it holds a
            sealed file already.
        HomeFullError: the disk is full.
        UnsupportedPlatformError: this is not Linux.
    """

    works_in_place: ClassVar[bool] = False

    def __init__(self, folder: str | os.PathLike[str] | None = None, keep: bool = False) -> None:
        super().__init__()
        if keep and folder is None:
            raise ArgumentError(
                "DiskHome(keep=True) keeps a file under a name, so it needs a folder of its own: "
                "DiskHome(folder, keep=True)"
            )
        self.folder, self.keep, self.sealed = _checked(folder), keep, None
        if keep and (self.folder / sealing.NAME).exists():
            raise HomeError(
                f"{self.folder} holds a sealed home already: continue it with "
                "DiskHome.reopen(folder), or remove its tiles.memtile"
            )
        self._start()

    @classmethod
    def reopen(cls, folder: str | os.PathLike[str]) -> "DiskHome":
        """A new live home beside the sealed file of an earlier one, kept too.

        The old file stays as it is until this home is closed and sealed in its place. Copy its
        tiles with `home.sealed.copy_to`.

        Raises:
            SealError: there is no sealed file in the folder, or it is not whole.
            HomeError: the folder is unusable.
        """
        home = cls.__new__(cls)
        Home.__init__(home)
        home.folder, home.keep = _checked(folder), True
        home.sealed = SealedFile.open(home.folder / sealing.NAME)
        try:
            home._start()
        except BaseException:
            home.sealed.close()
            raise
        return home

    folder: Path
    keep: bool
    path: str
    sealed: SealedFile | None

    def berth(self, shape: Sequence[int], dtype: torch.dtype) -> Berth:
        """Room for one tensor; see `Home.berth`."""
        with self.moving():
            self._check_process()
            berth = _DiskBerth(self, shape, dtype)
            self._berths.add(berth)
            if self.keep:
                weakref.finalize(berth, _note_lost, berth.named, self._lost).atexit = False
            self._choose_path()
            return berth

    def reserve(self, nbytes: int) -> None:
        """Allocates so many bytes on the disk now; see `Home.reserve`."""
        with self.moving():
            self._check_process()
            self._segments.reserve(whole_pages(nbytes))
            self._choose_path()

    def hold(self, rooms: Sequence[int]) -> Reservation:
        """Allocates the rooms on the disk now, for one owner; see `Home.hold`."""
        with self.moving():
            self._check_process()
            held = _DiskReservation(self, [room for room in rooms if room])
            self._choose_path()
            return held

    def _start(self) -> None:
        self._owner = os.getpid()
        self._berths: weakref.WeakSet[_DiskBerth] = weakref.WeakSet()
        self._here = _Here()
        self._lost: list[str] = []  # labels whose berths are gone
        self._file = LiveFile(self.folder, self.keep)
        self._segments = Segments(self._file.extend)
        self._cleanup = weakref.finalize(self, _clean_up, self._file, self._segments, self.sealed)
        self.path, self._chosen_at = "", 0
        self._choose_path()

    def _choose_path(self) -> None:
        if self._file.size == self._chosen_at:
            return
        self._chosen_at = self._file.size
        path, reason = self._better_path()
        if path != self.path:
            self.path = path
            _log.info("home in %s: reads and writes go by %s: %s", self.folder, path, reason)

    def _better_path(self) -> tuple[str, str]:
        size, free = self._file.size, free_bytes()
        if self._file.direct_fd is None:
            return PAGE_CACHE, "direct I/O is refused here, or does not agree with the mapping"
        if free is not None and size <= free // 2:
            return PAGE_CACHE, f"its {size} bytes fit into half of {free} bytes of free memory"
        return DIRECT, f"its {size} bytes do not fit into half of {free} bytes of free memory"

    def _check_process(self) -> None:
        if os.getpid() != self._owner:
            raise HomeError(
                f"{self!r} belongs to process {self._owner}, this is {os.getpid()}: a forked "
                "process may read its tiles, and neither writes them nor parks new ones; park in a "
                "home of its own"
            )

    def _renew(self) -> None:
        super()._renew()
        if hasattr(self, "_segments"):  # it may be in the middle of being made
            self._segments.renew_lock()

    def _release(self) -> None:
        if self.keep and os.getpid() == self._owner and self._is_to_be_sealed():
            sealing.seal(self._file, self._fd, self._records(), replace=self.sealed is not None)
            self._protect_sealed()
        self._cleanup()

    def _is_to_be_sealed(self) -> bool:
        """Whether it has tiles, all that it ever had; a reopened one that got none stays as it was.

        Raises:
            SealError: some are gone.
        """
        here = {record.label for record in self._records()}
        lost = [label for label in self._lost if label not in here]
        if lost:
            raise SealError(
                f"{self!r}: {len(lost)} of its tiles are gone, {lost[0]!r} first: the model was "
                "dropped or untiled before its kept home was closed, so there is nothing whole to "
                "seal; close the home while the model is alive"
            )
        return bool(here) or self.sealed is None

    def _protect_sealed(self) -> None:
        try:
            self._segments.make_private(self._file.fd)
        except OSError as error:
            _log.warning(
                "home in %s: sealed, but tensors that are still alive can change its file (%s)",
                self.folder,
                error.strerror,
            )

    def _records(self) -> list[sealing.Record]:
        return [
            sealing.Record(berth.label, berth.shape, berth.dtype, berth.offset, berth.nbytes)
            for berth in list(self._berths)
            if berth.label is not None
        ]

    @property
    def _fd(self) -> int:
        direct = self._file.direct_fd
        return direct if self.path == DIRECT and direct is not None else self._file.fd

    def __exit__(self, *raised: object) -> None:
        """Closes the home; after an exception nothing is sealed, an older sealed file stays."""
        if self.keep and raised and raised[0] is not None and not self.closed:
            self.keep = False
            _log.warning("home in %s: not sealed, its block was left by an exception", self.folder)
        self.close()

    def __repr__(self) -> str:
        return f"DiskHome({str(self.folder)!r})"


class _Here(threading.local):
    """For whom this thread parks."""

    holder = NOBODY


class _DiskReservation(Reservation):
    home: DiskHome

    def __init__(self, home: DiskHome, rooms: Sequence[int]) -> None:
        super().__init__(home)
        self._holder = home._segments.hold(rooms)
        weakref.finalize(self, home._segments.release, self._holder).atexit = False

    @contextmanager
    def used_here(self) -> Iterator[None]:
        here = self.home._here
        before, here.holder = here.holder, self._holder
        try:
            yield
        finally:
            here.holder = before


class _DiskBerth(Berth):
    home: DiskHome

    def __init__(self, home: DiskHome, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.named: list[str] = []  # its label, for when it is gone itself
        super().__init__(home, shape, dtype)
        self._extent: Extent | None = None
        self._view: memoryview | None = None
        self.offset = 0
        if self.room:
            self._settle(home._segments)
        self._address = self.tensor().data_ptr()

    def _settle(self, segments: Segments) -> None:
        extent = segments.take(self.room, self.home._here.holder)
        self._extent = extent
        self._view = memoryview(extent.segment.memory)[extent.start : extent.start + self.room]
        self.offset = extent.segment.offset + extent.start
        weakref.finalize(self._view, segments.giver(extent)).atexit = False

    @property
    def label(self) -> str | None:
        return self.named[0] if self.named else None

    @label.setter
    def label(self, label: str | None) -> None:
        self.named[:] = [] if label is None else [label]

    @property
    def address(self) -> int:
        return self._address

    def tensor(self) -> Tensor:
        return tensor_over(self._view, self.shape, self.dtype)

    def forget(self) -> None:
        """Drops the pages that tensors brought into this process's memory; contents stay."""
        if self._extent is None:
            return
        segment, start, size, _ = self._extent
        aligned = start // mmap.PAGESIZE * mmap.PAGESIZE  # pages may be larger than PAGE
        segment.memory.madvise(mmap.MADV_DONTNEED, aligned, start + size - aligned)

    def _fill(self, into: Tensor, start: int) -> None:
        disk_io.fill(self.home._fd, disk_io.bytes_of(into), self.offset + start)

    def _take(self, source: Tensor, start: int) -> None:
        self.home._check_process()
        disk_io.drain(self.home._fd, disk_io.bytes_of(source), self.offset + start)


def _note_lost(named: list[str], lost: list[str]) -> None:
    lost.extend(named)


def _checked(folder: str | os.PathLike[str] | None) -> Path:
    if sys.platform != "linux":
        raise UnsupportedPlatformError(
            f"a DiskHome on {sys.platform}: it needs Linux; park tiles in a HostHome"
        )
    return usable_folder(folder)


def _clean_up(file: LiveFile, segments: Segments, sealed: SealedFile | None) -> None:
    file.close()
    segments.drop()
    if sealed is not None:
        sealed.close()
