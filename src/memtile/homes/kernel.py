"""Hints about memory to the kernel and to malloc; they change no values."""

import ctypes
import logging
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from memtile.homes.home import PAGE, whole_pages

_log = logging.getLogger("memtile.homes")
_MAPS = Path("/proc/self/maps")
_MMAP_THRESHOLD: Final = -3  # mallopt(3)
_MAPPED_FROM: Final = 64 << 10
_PAGEOUT: Final = 21  # madvise(2): reclaim these pages; what was written to stays


def page_out(tensor: Tensor) -> None:
    """Drop the pages of a tensor that lies in a mapped file, as loaded checkpoints do.

    They count as this process's memory while the file is mapped. No value is lost: a page is read
    from the file again when it is needed, and one that was written to is kept.
    """
    library = _library()
    if library is None or not tensor.is_cpu or not tensor.is_contiguous():
        return
    start = whole_pages(tensor.data_ptr())
    length = (tensor.data_ptr() + tensor.nbytes - start) // PAGE * PAGE
    if length > 0 and _is_mapped_file(start):
        library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _PAGEOUT)


def trim_heap() -> None:
    """Give free memory inside the heap back to the kernel.

    glibc puts small allocations into large freed blocks and grows the heap for the next large one.
    Training SmolLM2-135M on disk, the heap held 500 MiB of free memory after three steps. With this
    call after each backward, the peak was 520 MiB instead of 750 (above the imports, measured).
    """
    library = _library()
    if library is not None:
        library.malloc_trim(0)


@lru_cache
def keep_freed_memory_out() -> None:
    """From now on, give every large block back to the kernel as soon as it is freed.

    Without it, glibc raises the size from which blocks are maps of their own, up to 32 MiB, once
    blocks of that size were freed. Smaller blocks then leave holes in the heap, and the peak of the
    process is more than what it uses. The setting is for the whole process and costs page faults:
    300 blocks of 4 MiB, written to in turn, took none before and 307 500 afterwards.
    """
    library = _library()
    if library is not None:
        library.mallopt(_MMAP_THRESHOLD, _MAPPED_FROM)
        library.malloc_trim(0)  # or blocks would go on to be carved from what lies free on top
        _log.info(
            "malloc of this process gives freed blocks from 64 KiB on back at once from now on, "
            "as plans suppose; memtile.tile(model, plan, return_freed_memory=False) leaves it alone"
        )


@lru_cache
def _library() -> Any:  # ctypes knows no types of what it loads
    """The C library where it has what is needed: glibc on Linux; None elsewhere."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None


def _is_mapped_file(address: int) -> bool:
    for line in _MAPS.read_text().splitlines():
        span, _, _, _, inode, *_ = line.split()
        start, _, stop = span.partition("-")
        if int(start, 16) <= address < int(stop, 16):
            return inode != "0"
    return False
