"""Tells which pages of a private map of a file were written to, by asking the kernel."""

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from memtile.geometry import round_up
from memtile.homes import disk_io

_PAGEMAP: Final = "/proc/self/pagemap"
_ENTRY_BYTES: Final = 8
_SWAPPED, _FILE = 1 << 62, 1 << 61  # bit 63, present, is the sign of an int64


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
