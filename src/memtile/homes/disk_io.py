"""Reading and writing a file at an offset; all reads and writes of disk homes are made here."""

import ctypes
import os

from torch import Tensor

from memtile.errors import HomeIOError


def read_at(fd: int, buffer: memoryview, offset: int) -> int:
    """One system call; how many bytes were read."""
    return os.preadv(fd, [buffer], offset)


def write_at(fd: int, buffer: memoryview, offset: int) -> int:
    """One system call; how many bytes were written."""
    return os.pwritev(fd, [buffer], offset)


def fill(fd: int, buffer: memoryview, offset: int) -> None:
    """Reads the whole buffer from the file at the offset, with the GIL released, or HomeIOError."""
    _move("read", fd, buffer, offset)


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
