"""What is asked of Linux and the C library: memory, hints about it, and forks.

Buffers are private maps of their exact size. Python's default, a shared map, would escape
`RLIMIT_DATA`; PyTorch's `pin_memory` rounds every block up to a power of two.
"""

import ctypes
import errno
import logging
import mmap
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from memtile.errors import HomeFullError
from memtile.geometry import HUGE_PAGE, round_up
from memtile.homes.limits import lines_of

_log = logging.getLogger("memtile.homes")

PAGE: Final = 4096
"""Bytes of a page: rooms, and the pieces that `read` and `write` move, are multiples of it."""

PIECE: Final = 4 << 20
"""Bytes of the largest piece in which whole tiles are streamed."""

KEPT: Final = 3
"""Buffers of `scratch_like` that wait to be used again."""

_WIPE_ON_FORK: Final = 18  # madvise(2); mmap has no name for it
_PAGEOUT: Final = 21  # madvise(2): reclaim these pages; what was written to stays
_MMAP_THRESHOLD: Final = -3  # mallopt(3)
_MAPPED_FROM: Final = 64 << 10
_LARGEST_FREE: Final = 64 << 20  # larger blocks were always maps of their own
_MAPS = Path("/proc/self/maps")

# Filled by finalizers, which may run in any thread and at any time: a deque needs no lock.
_waiting: deque[memoryview] = deque(maxlen=KEPT)
_renewals: "weakref.WeakKeyDictionary[Any, Callable[[Any], None]]" = weakref.WeakKeyDictionary()
_locks: "weakref.WeakSet[Any]" = weakref.WeakSet()  # Any: typeshed knows no _at_fork_reinit


def whole_pages(nbytes: int) -> int:
    """The number of bytes, rounded up to pages."""
    return round_up(nbytes, PAGE)


def aligned_buffer(nbytes: int) -> Tensor:
    """A page-aligned 1-D uint8 tensor of `nbytes` rounded up to pages, freed with the tensor.

    Zeroed at first. Where CUDA is available it is pinned: drop it only after the copies from and to
    it are done. A forked child finds zeros in it. If it were shared with the child, a page that the
    disk is writing into would be copied for one of the two processes, and before Linux 6.3 perhaps
    for the wrong one.

    Raises:
        HomeFullError: there is no memory for it, or CUDA cannot pin so much.
    """
    room = whole_pages(nbytes)
    view = private_view(room, for_disk=True) if room else None
    return tensor_over(view, torch.Size([room]), torch.uint8)


def pieces(nbytes: int) -> Iterator[tuple[int, Tensor]]:
    """The pages of a tensor by at most `PIECE`: where each starts, one buffer for each in turn."""
    room = whole_pages(nbytes)
    buffer = aligned_buffer(min(room, PIECE))
    for start in range(0, room, PIECE):
        yield start, buffer[: min(PIECE, room - start)]


def scratch_like(tensor: Tensor) -> Tensor:
    """A contiguous CPU tensor of the same shape and dtype, its content undefined.

    For short-lived tensors of a tile's size: the memory is used again once the tensor is gone. On
    the heap they would leave holes, which grow it (`trim_heap`).
    """
    room = whole_pages(tensor.nbytes)
    if not room:
        return tensor_over(None, tensor.shape, tensor.dtype)
    buffer = _waiting_buffer(room) or private_view(room)
    lent = buffer[:room]
    weakref.finalize(lent, _waiting.append, buffer).atexit = False
    return tensor_over(lent, tensor.shape, tensor.dtype)


def private_view(room: int, for_disk: bool = False) -> memoryview:
    """A private anonymous map of `room` bytes, pinned where CUDA is available.

    `room` is whole pages, not 0. The map ends when the view and everything that keeps it are gone.
    What is `for_disk` is in huge pages where it can be, and a forked child finds zeros in it.
    HomeFullError where there is no such memory.
    """
    try:
        memory = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise HomeFullError(
            errno.ENOMEM, f"no memory for {room} more bytes ({error}): park less, or on disk"
        ) from error
    if for_disk:
        with suppress(OSError):  # kernels before 4.14 do not know it
            memory.madvise(_WIPE_ON_FORK)
        _advise_huge_pages(memory, room)
    view = memoryview(memory)
    if torch.cuda.is_available():
        _pin(view, memory, room)
    return view


def _advise_huge_pages(memory: mmap.mmap, room: int) -> None:
    """Have the kernel use huge pages for those that lie inside the map, and touch no other memory.

    Direct I/O asks a disk for each stretch of physical memory apart. Once memory is in fragments, a
    virtual disk gave 1.35 GB/s into pages of 4 KiB, and 2.4 into huge ones (4 MiB a read, 2 cores).
    """
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE_PAGE
    length = (room - start) // HUGE_PAGE * HUGE_PAGE
    if length > 0:
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE, start, length)


def tensor_over(view: memoryview | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A new CPU tensor over the view's first bytes, whose storage keeps the view alive.

    The view may be None only for a tensor without elements.
    """
    with torch.inference_mode(False):  # a parked parameter must be able to train later
        if not shape.numel() or view is None:  # frombuffer refuses nothing
            return torch.empty(shape, dtype=dtype, device="cpu")
        # resize_ and not view: the tensor must be a base of its own to become a leaf
        return torch.frombuffer(view, dtype=dtype, count=shape.numel()).resize_(shape)


def _waiting_buffer(room: int) -> memoryview | None:
    for _ in range(KEPT):
        with suppress(IndexError):  # none is waiting
            buffer = _waiting.popleft()
            if buffer.nbytes >= room:
                return buffer
    return None


def _pin(view: memoryview, memory: mmap.mmap, room: int) -> None:
    address = torch.frombuffer(view, dtype=torch.uint8).data_ptr()
    failure = int(torch.cuda.cudart().cudaHostRegister(address, room, 0))
    if failure:
        raise HomeFullError(
            errno.ENOMEM,
            f"CUDA cannot pin {room} more bytes (cudaHostRegister: error {failure}): raise the "
            "limit of locked memory, park less, or on disk",
        )
    # The finalizer holds the map: a memoryview lets go of its own before its finalizers run.
    weakref.finalize(view, _unpin, memory, address, os.getpid()).atexit = False


def _unpin(memory: mmap.mmap, address: int, owner: int) -> None:
    if os.getpid() == owner:  # CUDA cannot be called in a forked child
        torch.cuda.cudart().cudaHostUnregister(address)


def read_rows_ahead(tensor: Tensor, rows: Tensor) -> None:
    """Have the kernel start reading these rows of a contiguous tensor that lies in a mapped file.

    Where they are used without that, each is waited for by itself, and read with all around it: up
    to `read_ahead_kb`, 8 MiB say. 256 rows of 4 KiB took 0.1 s.
    """
    library = _library()
    if library is None:
        return
    row_bytes = tensor.stride(0) * tensor.element_size()
    for row in rows.unique().tolist():
        begin = tensor.data_ptr() + row * row_bytes
        start = begin // mmap.PAGESIZE * mmap.PAGESIZE
        length = begin + row_bytes - start
        library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_WILLNEED)


def page_out(tensor: Tensor) -> None:
    """Drop the pages of a tensor that lies in a mapped file, as loaded checkpoints do.

    They count as this process's memory while the file is mapped. No value is lost: a page is read
    from the file again when it is needed, and one that was written to is kept.
    """
    library = _library()
    start, length = _pages_in(tensor)
    if library is not None and length > 0 and _is_mapped_file(start):
        library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _PAGEOUT)


def discard_pages(tensor: Tensor) -> None:
    """Give the whole pages of a CPU tensor's memory back to the kernel; its values are lost."""
    library = _library()
    start, length = _pages_in(tensor)
    if library is not None and length > 0:
        library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def _pages_in(tensor: Tensor) -> tuple[int, int]:
    """Address and bytes of the whole pages in a CPU tensor; none where it has gaps."""
    if not tensor.is_cpu or not tensor.is_contiguous():
        return 0, 0
    start = whole_pages(tensor.data_ptr())
    return start, (tensor.data_ptr() + tensor.nbytes - start) // PAGE * PAGE


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

    Blocks that lie free in the heap now, after imports say, would still be used for large tensors,
    and stay when those are freed: three forwards of a T5 took 106 to 133 MB, by the order of sets,
    and 105.3 to 105.7 since such blocks are taken for good.
    """
    library = _library()
    if library is not None:
        library.mallopt(_MMAP_THRESHOLD, _MAPPED_FROM)
        library.malloc_trim(0)  # or blocks would go on to be carved from what lies free on top
        _take_free_blocks(library)
        _log.info(
            "malloc of this process gives freed blocks from 64 KiB on back at once from now on, "
            "as plans suppose; memtile.tile(model, plan, return_freed_memory=False) leaves it alone"
        )


class _HeapState(ctypes.Structure):
    """`struct mallinfo2` of mallinfo(3), in bytes: all that glibc's heaps hold."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "maps", "mapped_bytes"),
            *("usmblks", "fsmblks", "used_bytes", "free_bytes", "keepcost"),
        )
    )


def _take_free_blocks(library: Any) -> None:
    """Take the large blocks that lie free in the heap, and never write to them: no page is used.

    Largest first. A block that is a map of its own shows that none of this size is left.
    """
    if not hasattr(library, "mallinfo2"):
        return  # before glibc 2.33
    state = library.mallinfo2
    state.restype, library.malloc.restype = _HeapState, ctypes.c_void_p
    left, size = state().free_bytes, _LARGEST_FREE
    while size >= _MAPPED_FROM and left > 0:
        maps = state().maps
        block = library.malloc(ctypes.c_size_t(size))
        if state().maps > maps:
            library.free(ctypes.c_void_p(block))
            size //= 2
        else:
            left -= size


@lru_cache
def _library() -> Any:  # ctypes knows no types of what it loads
    """The C library where it has what is needed: glibc on Linux; None elsewhere."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None


def _is_mapped_file(address: int) -> bool:
    for line in lines_of(_MAPS):
        span, _, _, _, inode, *_ = line.split()
        start, _, stop = span.partition("-")
        if int(start, 16) <= address < int(stop, 16):
            return inode != "0"
    return False


def fork_safe_lock() -> threading.RLock:
    """A lock that nobody holds in a forked child, where only the thread that forks exists."""
    lock = threading.RLock()
    _locks.add(lock)
    return lock


def renew_in_child(thing: Any, renew: Callable[[Any], None]) -> None:
    """Call `renew` with the thing in every forked child, while the thing is alive."""
    _renewals[thing] = renew
    _watch_forks()


@lru_cache
def _watch_forks() -> None:
    """Called by homes, not at import: without a home there is nothing to renew."""
    os.register_at_fork(after_in_child=_renew_all)


def _renew_all() -> None:
    for lock in list(_locks):
        lock._at_fork_reinit()  # as the standard library does with its own
    for thing, renew in list(_renewals.items()):
        renew(thing)
