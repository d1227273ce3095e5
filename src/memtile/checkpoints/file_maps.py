"""Private maps of checkpoint files: of a whole file, or of runs of several, side by side."""

import ctypes
import mmap
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

from memtile.checkpoints.stored import StoredFile, StoredTensor
from memtile.geometry import round_up
from memtile.homes import disk_io

_NORESERVE: Final = 0x4000  # MAP_NORESERVE on Linux: mmap has no name for it before 3.13
_FIXED: Final = 0x10  # MAP_FIXED
_FAILED: Final = ctypes.c_void_p(-1).value  # MAP_FAILED

StoredPiece = tuple[StoredTensor, int, int]
"""A stored tensor, the first of its elements that are meant, and how many they are."""


@dataclass(frozen=True)
class FileRun:
    """Bytes of an allocation, from `start` on, that follow one another in a file.

    `file` is None for a copy of bytes that share their page with those of another run.
    """

    start: int
    nbytes: int
    file: StoredFile | None
    offset: int


def file_runs(pieces: Sequence[StoredPiece], element_bytes: int) -> list[FileRun]:
    """Where the pieces lie in their files; neighbours in a file are one run."""
    runs, start = list[FileRun](), 0
    for stored, first, count in pieces:
        run = FileRun(
            start, count * element_bytes, stored.file, stored.entry.offset + first * element_bytes
        )
        start += run.nbytes
        before = runs[-1] if runs else None
        if before and before.file is run.file and before.offset + before.nbytes == run.offset:
            runs[-1] = replace(before, nbytes=before.nbytes + run.nbytes)
        else:
            runs.append(run)
    return runs


def joined_map(runs: Sequence[FileRun]) -> tuple[memoryview, list[FileRun]]:
    """A private map of runs side by side, and its runs: whole pages of files, and copied seams."""
    shift = runs[0].offset % mmap.PAGESIZE
    nbytes = runs[-1].start + runs[-1].nbytes
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    memory = _map(shift + nbytes, flags, -1)
    view = memoryview(memory).cast("B")[shift : shift + nbytes]
    parts = list[FileRun]()
    for run in runs:
        begin, end = shift + run.start, shift + run.start + run.nbytes
        own = begin if run is runs[0] else min(round_up(begin, mmap.PAGESIZE), end)
        rest = end if run is runs[-1] else max(own, end // mmap.PAGESIZE * mmap.PAGESIZE)
        for first, last, file in ((begin, own, None), (own, rest, run.file), (rest, end, None)):
            if first < last:
                part = FileRun(first - shift, last - first, file, run.offset + first - begin)
                parts.append(part)
                _put(part, run.file, memory, shift)
    return view, parts


def _put(part: FileRun, file: StoredFile | None, memory: Any, shift: int) -> None:  # ctypes' array
    """Map a run's pages over the memory, or copy its bytes there."""
    assert file is not None
    start, descriptor = shift + part.start, file.open().fd
    if part.file is None:
        raw = memoryview(memory).cast("B")[start : start + part.nbytes]
        disk_io.fill(descriptor, raw, part.offset)
        return
    before = start % mmap.PAGESIZE  # bytes of the first page that are not meant
    flags = mmap.MAP_PRIVATE | _NORESERVE | _FIXED
    address = ctypes.addressof(memory) + start - before
    _map_at(address, part.nbytes + before, flags, descriptor, part.offset - before)


def private_map(file: StoredFile) -> memoryview:
    """A private map of a file; Python's `mmap` would keep a descriptor of it open."""
    opened = file.open()
    # Without NORESERVE a file larger than the memory could not be mapped.
    flags = mmap.MAP_PRIVATE | _NORESERVE
    return memoryview(_map(os.fstat(opened.fd).st_size, flags, opened.fd)).cast("B")


def _map(nbytes: int, flags: int, fd: int) -> Any:
    """A map as ctypes' array, given back with it."""
    found = _map_at(0, nbytes, flags, fd, 0)
    memory = (ctypes.c_ubyte * nbytes).from_address(found)
    unmap = c_library().munmap
    weakref.finalize(memory, unmap, ctypes.c_void_p(found), ctypes.c_size_t(nbytes)).atexit = False
    return memory


def _map_at(address: int, nbytes: int, flags: int, fd: int, offset: int) -> int:
    access = mmap.PROT_READ | mmap.PROT_WRITE
    sizes = ctypes.c_void_p(address), ctypes.c_size_t(nbytes)
    found = c_library().mmap(*sizes, access, flags, fd, ctypes.c_long(offset))
    if found in (None, _FAILED):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(found)


@lru_cache
def c_library() -> Any:  # ctypes knows no types of what it loads
    """The C library, whose `mmap` and `madvise` take any address."""
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    return library
