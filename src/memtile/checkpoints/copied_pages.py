"""Which pages of a private map of a file were written to, and so are no longer the file's.

The kernel tells it of each page of this process (proc(5), pagemap): bit 63 says that it is in
memory, bit 62 that it is swapped out, bit 61 that it is the file's. A page that is in memory or in
swap and not the file's was copied when it was written to. No privilege is needed for these bits.
"""

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
_SWAPPED, _FILE = 1 << 62, 1 << 61  # bit 63, present, is the sign


class CopiedPages:
    """Looks at this process's pages; a fork opens its own view of them.

    Attributes:
        works: whether the system tells, tried out on a map that is written to.
    """

    def __init__(self) -> None:
        self._fd, self._owner = -1, -1
        self.works = self._try_out()

    def any(self, address: int, nbytes: int) -> bool:
        """Whether any page that holds these bytes was copied."""
        return bool(self._flags(address, nbytes).any())

    def kept(self, address: int, nbytes: int) -> Iterator[tuple[int, int]]:
        """The runs, (address, bytes), of whole pages within these bytes that were not copied."""
        first = round_up(address, mmap.PAGESIZE)
        last = (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        start = first
        for number in self._flags(first, last - first).nonzero().flatten().tolist():
            here = first + number * mmap.PAGESIZE
            if here > start:
                yield start, here - start
            start = here + mmap.PAGESIZE
        if last > start:
            yield start, last - start

    def close(self) -> None:
        """Close what is open."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = self._owner = -1

    def _flags(self, address: int, nbytes: int) -> Tensor:
        if nbytes <= 0:
            return torch.zeros(0, dtype=torch.bool)
        if self._owner != os.getpid():  # the descriptor of a fork's parent shows the parent's
            self.close()
            self._fd, self._owner = os.open(_PAGEMAP, os.O_RDONLY | os.O_CLOEXEC), os.getpid()
        first, last = address // mmap.PAGESIZE, (address + nbytes - 1) // mmap.PAGESIZE
        entries = torch.zeros(last - first + 1, dtype=torch.int64)
        raw = disk_io.bytes_of(entries)
        if os.preadv(self._fd, [raw], first * _ENTRY_BYTES) != len(raw):
            return torch.ones(len(entries), dtype=torch.bool)  # read them through the map
        is_present, is_files = entries < 0, entries & _FILE != 0
        return (entries & _SWAPPED != 0) | is_present & ~is_files

    def _try_out(self) -> bool:
        try:
            with Path(__file__).open("rb") as file:
                memory = mmap.mmap(
                    file.fileno(), 1, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
                )
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            bytes(memory)  # a page that was read is in memory and the file's
            before = self.any(address, 1)
            memory[0] = 0
            return not before and self.any(address, 1)
        except OSError:
            return False
