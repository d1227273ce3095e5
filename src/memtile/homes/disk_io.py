"""Reading and writing a file at an offset; all reads and writes of disk homes are made here."""

import ctypes
import os
import threading

from torch import Tensor

from memtile.errors import HomeIOError
from memtile.homes.kernel import PAGE, aligned_buffer, whole_pages


def read_at(fd: int, buffer: memoryview, offset: int) -> int:
    """One system call; how many bytes were read."""
    return os.preadv(fd, [buffer], offset)


def write_at(fd: int, buffer: memoryview, offset: int) -> int:
    """One system call; how many bytes were written."""
    return os.pwritev(fd, [buffer], offset)


def fill(fd: int, buffer: memoryview, offset: int) -> None:
    """Reads the whole buffer from the file at the offset, with the GIL released, or HomeIOError."""
    _move("read", fd, buffer, offset)


def fill_directly(fd: int, into: Tensor, offset: int) -> bool:
    """Fills `into` by direct I/O from any byte of a file; whether that worked, in one system call.

    Direct I/O takes whole pages of a file and of memory. So whole pages are read, into whole pages
    of `into` and a few beside it, and then the bytes are moved to where they belong.

    Args:
        fd: opened with O_DIRECT.
        into: 1-D uint8 on the CPU.
        offset: of the file's first byte that is meant.
    """
    before, size = offset % PAGE, into.numel()  # of the first page read; of what is meant
    start = -into.data_ptr() % PAGE
    body = max(0, size - start) // PAGE * PAGE
    beside = _beside(whole_pages(before + size) - body)
    moved = _try_read(fd, [bytes_of(into)[start : start + body], bytes_of(beside)], offset - before)
    if moved < before + size:
        return False
    first = into.data_ptr()
    inside = max(0, body - before)
    if start + before and inside:
        ctypes.memmove(first, first + start + before, inside)
    if size > inside:
        skipped = max(0, before - body)
        ctypes.memmove(first + inside, beside.data_ptr() + skipped, size - inside)
    return True


def drain(fd: int, buffer: memoryview, offset: int) -> None:
    """Writes the whole buffer to the file at the offset, with the GIL released, or HomeIOError."""
    _move("write", fd, buffer, offset)


def failed(act: str, size: int, offset: int, error: OSError) -> HomeIOError:
    """The error to raise where the kernel could not read or write these bytes of a file."""
    return HomeIOError(
        error.errno,
        f"a home's file: {act} of {size} bytes at {offset} failed ({error.strerror}); the disk or "
        "its connection is at fault, see the system's log",
    )


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor; it does not keep the tensor alive."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return memoryview(bytearray())
    return memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr())).cast("B")


class _ThreadPages(threading.local):
    """Pages beside what a thread fills directly."""

    beside: Tensor | None = None


_thread = _ThreadPages()


def _beside(nbytes: int) -> Tensor:
    found = _thread.beside
    if found is None or found.numel() < nbytes:
        found = _thread.beside = aligned_buffer(nbytes)
    return found[:nbytes]


def _try_read(fd: int, buffers: list[memoryview], offset: int) -> int:
    """How many bytes one system call read; 0 where it failed."""
    try:
        return os.preadv(fd, buffers, offset)
    except OSError:
        return 0


def _move(act: str, fd: int, buffer: memoryview, offset: int) -> None:
    done, size = 0, len(buffer)
    once = read_at if act == "read" else write_at
    while done < size:
        try:
            moved = once(fd, buffer[done:], offset + done)
        except OSError as error:
            raise failed(act, size - done, offset + done, error) from error
        if moved <= 0:
            raise HomeIOError(
                f"a home's file: {act} of {size} bytes at {offset} stopped after {done}; the file "
                "was cut short, or the disk is at fault: see the system's log"
            )
        done += moved
