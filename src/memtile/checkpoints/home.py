"""The home of tiles that stay in the unmodified files of a checkpoint, which are only read.

Rows of a tensor follow one another in a safetensors file, so a tile of whole rows is one range of
it. The files are mapped privately: a write to a tile's memory copies its pages in this process and
leaves the file unchanged; reads find out which pages were copied, and use those.
"""

import ctypes
import logging
import mmap
import os
import weakref
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Final, NoReturn

import torch
from torch import Tensor

from memtile.checkpoints.stored import StoredFile, StoredTensor
from memtile.errors import HomeError
from memtile.geometry import round_up
from memtile.homes import Allocation, Home, Reservation, cannot_map, disk_io
from memtile.homes.kernel import tensor_over

_log = logging.getLogger("memtile.checkpoints")

_NORESERVE: Final = 0x4000  # MAP_NORESERVE on Linux: mmap has no name for it before 3.13
_PAGEMAP: Final = "/proc/self/pagemap"
_ENTRY_BYTES: Final = 8
_SWAPPED, _FILE = 1 << 62, 1 << 61  # bit 63, present, is the sign of an int64
_FAILED: Final = ctypes.c_void_p(-1).value  # MAP_FAILED


class CheckpointHome(Home):
    """The files of a checkpoint as a home, for inference and for frozen layers.

    `memtile.tile(model, …, checkpoint=folder, home="checkpoint")` makes it. The files must not be
    rewritten in place while it is used: a changed size or time is an error at the next read, and a
    file that was cut short may end the process. Replacing them by new files, as `save_checkpoint`
    does, is fine.
    """

    works_in_place: ClassVar[bool] = False
    is_read_only: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.pages = CopiedPages()
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
        self.check_open()
        offset = stored.entry.offset + start * stored.dtype.itemsize
        if offset % stored.dtype.itemsize:
            return f"its file keeps it at byte {offset}, which is not aligned for {stored.dtype}"
        return _CheckpointAllocation(self, stored.file, offset, shape, stored.dtype)

    def map_of(self, file: StoredFile) -> memoryview:
        """A file's bytes, mapped privately once."""
        view = self._maps.get(file)
        if view is None:
            try:
                view = self._maps[file] = _mapped(file)
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
    home: CheckpointHome

    def __init__(
        self,
        home: CheckpointHome,
        file: StoredFile,
        offset: int,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        super().__init__(home, shape, dtype)
        self._file, self._offset = file, offset
        self._view = home.map_of(file)[offset : offset + self.nbytes]
        self.address = self.tensor().data_ptr()

    def tensor(self) -> Tensor:
        return tensor_over(self._view, self.shape, self.dtype)

    def evict(self) -> None:
        """Drop the file's pages from memory; copied pages stay."""
        self._file.check_unchanged()
        pages = self.home.pages
        if not self.nbytes or not pages.works or self.home.closed:
            return
        library = _c_library()
        for address, length in pages.uncopied(self.address, self.nbytes):
            library.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), mmap.MADV_DONTNEED)

    def is_untouched(self) -> bool:
        """Whether none of its pages was copied; CheckpointError where the file was changed."""
        self._file.check_unchanged()
        pages = self.home.pages
        return pages.works and not pages.any_copied(self.address, self.nbytes)

    def _read_into(self, into: Tensor, start: int) -> None:
        self._file.check_unchanged()
        used = max(0, min(into.numel(), self.nbytes - start))
        pages, address = self.home.pages, self.address + start
        opened = self._file.try_open()  # None: replaced, and only the map has the old bytes
        if used and (opened is None or not pages.works or pages.any_copied(address, used)):
            mapped = tensor_over(self._view, torch.Size([self.nbytes]), torch.uint8)
            into[:used].copy_(mapped[start : start + used])
        elif opened is not None:
            # The kernel would read up to 8 MiB more (`read_ahead_kb`), of experts that are not hit.
            os.posix_fadvise(opened.fd, 0, 0, os.POSIX_FADV_RANDOM)
            disk_io.fill(opened.fd, disk_io.bytes_of(into[:used]), self._offset + start)

    def _write_from(self, source: Tensor, start: int) -> None:
        self.home._refuse()


def _mapped(file: StoredFile) -> memoryview:
    """A private map of a file; Python's `mmap` would keep a descriptor of it open."""
    opened, library = file.open(), _c_library()
    size = os.fstat(opened.fd).st_size
    access = mmap.PROT_READ | mmap.PROT_WRITE
    # Without NORESERVE a file larger than the memory could not be mapped.
    flags = mmap.MAP_PRIVATE | _NORESERVE
    address = library.mmap(None, ctypes.c_size_t(size), access, flags, opened.fd, ctypes.c_long(0))
    if address in (None, _FAILED):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    memory = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(
        memory, library.munmap, ctypes.c_void_p(address), ctypes.c_size_t(size)
    ).atexit = False
    return memoryview(memory).cast("B")


@lru_cache
def _c_library() -> Any:  # ctypes knows no types of what it loads
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    return library


class CopiedPages:
    """Tells which pages of a private map were written to, and so were copied.

    The kernel's pagemap (proc(5)) has bits for each page: 63, in memory; 62, in swap; 61, the
    file's. A page in memory or in swap that is not the file's was copied. Some kernels do not tell:
    `works` says whether a trial did.
    """

    def __init__(self) -> None:
        self._fd, self._owner = -1, -1
        self.works = self._try_out()

    def any_copied(self, address: int, nbytes: int) -> bool:
        """Whether any page of these bytes was copied."""
        return bool(self._copied(address, nbytes).any())

    def uncopied(self, address: int, nbytes: int) -> Iterator[tuple[int, int]]:
        """Runs (address, bytes) of whole pages within these bytes that were not copied."""
        first = round_up(address, mmap.PAGESIZE)
        last = (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        start = first
        for number in self._copied(first, last - first).nonzero().flatten().tolist():
            here = first + number * mmap.PAGESIZE
            if here > start:
                yield start, here - start
            start = here + mmap.PAGESIZE
        if last > start:
            yield start, last - start

    def close(self) -> None:
        """Close the pagemap."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = self._owner = -1

    def _copied(self, address: int, nbytes: int) -> Tensor:
        if nbytes <= 0:
            return torch.zeros(0, dtype=torch.bool)
        if self._owner != os.getpid():  # a parent's descriptor shows the parent's pages
            self.close()
            self._fd, self._owner = os.open(_PAGEMAP, os.O_RDONLY | os.O_CLOEXEC), os.getpid()
        first, last = address // mmap.PAGESIZE, (address + nbytes - 1) // mmap.PAGESIZE
        entries = torch.zeros(last - first + 1, dtype=torch.int64)
        raw = disk_io.bytes_of(entries)
        if os.preadv(self._fd, [raw], first * _ENTRY_BYTES) != len(raw):
            return torch.ones(len(entries), dtype=torch.bool)  # all are read through the map then
        is_present, is_files = entries < 0, entries & _FILE != 0
        return (entries & _SWAPPED != 0) | is_present & ~is_files

    def _try_out(self) -> bool:
        try:
            with Path(__file__).open("rb") as file:
                memory = mmap.mmap(
                    file.fileno(), 1, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
                )
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            bytes(memory)  # reads the page in: it is the file's
            before = self.any_copied(address, 1)
            memory[0] = 0
            return not before and self.any_copied(address, 1)
        except OSError:
            return False
