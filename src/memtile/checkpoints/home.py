"""The home of tiles that stay in the unmodified files of a checkpoint, which are only read.

Rows of a tensor follow one another in a safetensors file, so a tile of whole rows is one range of
it. The files are mapped privately: a write to a tile's memory copies its pages in this process and
leaves the file unchanged; reads find out which pages were copied, and use those.
"""

import ctypes
import hashlib
import logging
import math
import mmap
import os
import weakref
from collections.abc import Sequence
from typing import ClassVar, Final, NoReturn

import torch
from torch import Tensor

from memtile.checkpoints.copied_pages import CopiedPages
from memtile.checkpoints.file_maps import (
    FileRun,
    StoredPiece,
    c_library,
    file_runs,
    joined_map,
    private_map,
)
from memtile.checkpoints.stored import OpenFile, StoredFile, StoredTensor
from memtile.errors import CheckpointError, HomeError
from memtile.homes import (
    PAGE,
    Allocation,
    Home,
    Reservation,
    cannot_map,
    disk_io,
    page_cache_fit,
    whole_pages,
)
from memtile.homes.disk import BUFFERED, DIRECT
from memtile.homes.endings import Ending
from memtile.homes.home import Rooms
from memtile.homes.kernel import tensor_over
from memtile.homes.kernel_moves import RoomMove, start_kernel_moves

_log = logging.getLogger("memtile.checkpoints")

# Parts of 1 MiB read 1.63 GB/s, for the Python between them, these 1.83 (2 cores; raw 1.88).
_PART_BYTES: Final = 4 << 20
_LEAST_PIECE: Final = 8 * mmap.PAGESIZE  # bytes: each further piece costs a page of memory
_MOST_PIECES: Final = 24_000  # the kernel maps 65 530 stretches by default, and a seam is one too


class CheckpointHome(Home):
    """The files of a checkpoint as a home, for inference and for frozen layers.

    `memtile.tile(model, …, checkpoint=folder, home="checkpoint")` makes it. The files must not be
    rewritten in place while it is used: a changed size or time is an error at the next read, and a
    file that was cut short may end the process. Replacing them by new files, as `save_checkpoint`
    does, is fine.

    Attributes:
        path: what reads use: "buffered" (copies from the page cache) where all tiles fit into half
            of the free memory, else "direct". Decided at the first read after tiles were added.
    """

    works_in_place: ClassVar[bool] = False
    is_read_only: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.pages = CopiedPages()
        self.path, self._chosen_at = BUFFERED, 0
        self._nbytes = 0  # of all tiles
        self._pieces = 0  # of tiles that have several
        self._maps: weakref.WeakKeyDictionary[StoredFile, memoryview] = weakref.WeakKeyDictionary()
        weakref.finalize(self, self.pages.close).atexit = False
        if not self.pages.works:
            _log.info("the kernel does not tell of written pages: tiles are read through the map")

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Allocation:
        """Refused with HomeError: a checkpoint is only read."""
        self._refuse()

    def hold(self, rooms: Sequence[int]) -> Reservation:
        """Refused with HomeError: gradients and moments would be written."""
        self._refuse()

    def rows_of(self, stored: StoredTensor, start: int, shape: Sequence[int]) -> Allocation | str:
        """The allocation over a stored tensor from element `start` on, or why there is none."""
        return self.elements_of([(stored, start, math.prod(shape))], shape)

    def elements_of(self, pieces: Sequence[StoredPiece], shape: Sequence[int]) -> Allocation | str:
        """The allocation over elements of stored tensors of one dtype, or why there is none."""
        self.check_open()
        dtype = pieces[0][0].dtype
        runs = file_runs(pieces, dtype.itemsize)
        for run in runs:
            if run.offset % dtype.itemsize:
                return f"its file keeps it at byte {run.offset}, which is not aligned for {dtype}"
        if len(runs) > 1:
            average = sum(run.nbytes for run in runs) // len(runs)
            if average < _LEAST_PIECE or self._pieces + len(runs) > _MOST_PIECES:
                return f"they lie in {len(runs)} pieces, of {average} bytes on average"
            if len({(run.offset - run.start) % mmap.PAGESIZE for run in runs}) > 1:
                return "they lie in pieces at different bytes of a page, which make no one map"
            self._pieces += len(runs)
        self._nbytes += sum(run.nbytes for run in runs)
        return _CheckpointAllocation(self, runs, shape, dtype)

    def start_moves(self, rooms: Rooms, writes: bool, ending: Ending) -> bool:
        """By the kernel, where reads go past the page cache; see `Home.start_moves`."""
        self.choose_path()
        if self.path != DIRECT or writes:
            return False
        moves = list[RoomMove]()
        for allocation, memory in rooms:
            if not isinstance(allocation, _CheckpointAllocation):
                return False
            move = allocation.direct_read(memory)
            if move is None:
                return False
            moves.append(move)
        return start_kernel_moves(self, moves, writes, ending)

    @property
    def part_bytes(self) -> int:
        """What one read best moves at once."""
        return _PART_BYTES

    def choose_path(self) -> None:
        """Decide by what reads go, where tiles were added."""
        if self._chosen_at == self._nbytes:
            return
        self._chosen_at, (fits, reason) = self._nbytes, page_cache_fit(self._nbytes)
        self.path = BUFFERED if fits else DIRECT
        _log.info("tiles in a checkpoint: reads go by %s: %s", self.path, reason)

    def map_of(self, file: StoredFile) -> memoryview:
        """A file's bytes, mapped privately once."""
        view = self._maps.get(file)
        if view is None:
            try:
                view = self._maps[file] = private_map(file)
            except OSError as error:
                raise cannot_map(
                    str(file.path),
                    error,
                    "copy the checkpoint to a local disk, or give home=memtile.DiskHome(folder)",
                ) from error
        return view

    def _release(self) -> None:
        self._maps.clear()

    def _refuse(self) -> NoReturn:
        self.check_open()
        raise HomeError(
            "tiles in a checkpoint's own files can only be read, and training writes weights, "
            "gradients and moments: freeze them with requires_grad_(False), or tile with "
            "home=memtile.DiskHome(folder)"
        )


class _CheckpointAllocation(Allocation):
    """Bytes of files: a part of one file's map, or a map of their own where they are several runs.

    Where two runs meet inside a page, that page is a copy, made at once.
    """

    home: CheckpointHome

    def __init__(
        self,
        home: CheckpointHome,
        runs: Sequence[FileRun],
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        super().__init__(home, shape, dtype)
        (first, *others), files = runs, {run.file for run in runs if run.file is not None}
        self._files = tuple(files)
        if others:
            self._view, self._runs = joined_map(runs)
        elif first.file is not None:
            self._view = home.map_of(first.file)[first.offset : first.offset + self.nbytes]
            self._runs = [first]
            if self.nbytes:  # with what a direct read of whole pages has before it
                self.room = whole_pages(first.offset % PAGE + self.nbytes)
        self.address = self.tensor().data_ptr()
        self._seams = self._seams_now()

    def tensor(self) -> Tensor:
        return tensor_over(self._view, self.shape, self.dtype)

    def evict(self) -> None:
        """Drop the files' pages from memory; copied pages stay."""
        for file in self._files:
            file.check_unchanged()
        pages = self.home.pages
        if not self.nbytes or not pages.works or self.home.closed:
            return
        library = c_library()
        for run in self._runs:
            found = pages.uncopied(self.address + run.start, run.nbytes) if run.file else ()
            for address, length in found:
                library.madvise(
                    ctypes.c_void_p(address), ctypes.c_size_t(length), mmap.MADV_DONTNEED
                )

    def is_untouched(self) -> bool:
        """Whether its pages are the files' still; CheckpointError where a file was changed."""
        for file in self._files:
            file.check_unchanged()
        pages = self.home.pages
        return (
            pages.works
            and not any(
                pages.any_copied(self.address + run.start, run.nbytes)
                for run in self._runs
                if run.file is not None
            )
            and self._seams_now() == self._seams
        )

    def _seams_now(self) -> bytes:
        """What tells the pages that were copied at once from others: the kernel cannot."""
        found = hashlib.blake2b(digest_size=16)
        for run in self._runs:
            if run.file is None:
                found.update(self._view[run.start : run.start + run.nbytes])
        return found.digest()

    def direct_read(self, memory: Tensor) -> RoomMove | None:
        """The read of all of it by the kernel; None where threads are to read it."""
        (run, *others), pages = self._runs, self.home.pages
        if others or run.file is None or not pages.works:
            return None
        try:
            run.file.check_unchanged()
            opened = run.file.try_open()
        except CheckpointError:
            return None  # a thread raises it where the tile is waited for
        if opened is None or opened.direct_fd is None:
            return None
        if pages.any_copied(self.address, self.nbytes):
            return None
        skipped = run.offset % PAGE
        return RoomMove(self, memory, opened.direct_fd, run.offset - skipped, skipped)

    def _read_into(self, into: Tensor, start: int) -> None:
        self.home.choose_path()
        for file in self._files:
            file.check_unchanged()
        stop = min(start + into.numel(), self.nbytes)
        for run in self._runs:
            first, last = max(start, run.start), min(stop, run.start + run.nbytes)
            if first < last:
                self._read_run(run, into[first - start : last - start], first)

    def _read_run(self, run: FileRun, into: Tensor, start: int) -> None:
        pages, address = self.home.pages, self.address + start
        # None: a page of several files; or replaced, and only the map has the old bytes
        opened = None if run.file is None else run.file.try_open()
        if opened is None or not pages.works or pages.any_copied(address, into.numel()):
            mapped = tensor_over(self._view, torch.Size([self.nbytes]), torch.uint8)
            into.copy_(mapped[start : start + into.numel()])
        else:
            _fill(opened, into, run.offset + start - run.start, self.home.path)

    def _write_from(self, source: Tensor, start: int) -> None:
        self.home._refuse()


def _fill(opened: OpenFile, into: Tensor, offset: int, path: str) -> None:
    direct = opened.direct_fd if path == DIRECT else None
    if direct is None or not disk_io.fill_directly(direct, into, offset):
        # The kernel would read up to 8 MiB more (`read_ahead_kb`), of experts that are not hit.
        os.posix_fadvise(opened.fd, 0, 0, os.POSIX_FADV_RANDOM)
        disk_io.fill(opened.fd, disk_io.bytes_of(into), offset)
