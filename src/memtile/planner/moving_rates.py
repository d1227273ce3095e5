"""Bytes a second between memory and the disk of a folder, and between memory and an accelerator."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Final

import torch
from torch import Tensor

from memtile.homes import DiskHome, aligned_buffer
from memtile.homes.disk import DIRECT

_DISK_BYTES: Final = 128 << 20
_PIECE: Final = 1 << 20
_THREADS: Final = 8
_LINK_BYTES: Final = 64 << 20
_LEAST_TIMES: Final = 3
_LONG_ENOUGH: Final = 0.05  # seconds

NEEDED_ROOM: Final = 2 * _DISK_BYTES
"""Bytes that must be free on a disk to measure it."""


class MeasuredDisk:
    """A home in a folder, read and written by threads; each act gives bytes a second.

    HomeError and HomeFullError where a home cannot be there. What is direct goes through the page
    cache where direct I/O does not work.
    """

    def __init__(self, folder: str | Path) -> None:
        self._home = DiskHome(folder)
        self._allocation = self._home.allocate((_DISK_BYTES,), torch.uint8)
        self._buffers = [aligned_buffer(_PIECE) for _ in range(_THREADS)]
        self._home.path = DIRECT
        for start in range(0, _DISK_BYTES, _PIECE):  # what was never written is not read either
            self._allocation.write(self._buffers[0], start)

    def __enter__(self) -> "MeasuredDisk":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._home.close()

    def read(self) -> float:
        """Direct reads of the whole file."""
        return self._speed(lambda index: self._allocation.read)

    def write(self) -> float:
        """Direct writes of it."""
        return self._speed(lambda index: self._allocation.write)

    def mix(self) -> float:
        """Direct reads and writes at once, of every other piece."""
        moves = (self._allocation.read, self._allocation.write)
        return self._speed(lambda index: moves[index % 2])

    def map(self) -> float:
        """Mapping its pages to be written to, from the page cache, and dropping them again."""

        def map_and_drop() -> None:
            self._allocation.populate(written=True)
            self._allocation.release()
            self._allocation.evict()

        return _DISK_BYTES / least_seconds(map_and_drop)

    def _speed(self, move_of: Callable[[int], Callable[[Tensor, int], None]]) -> float:
        def move(index: int) -> None:
            # Threads take pieces in turn, so at most two write to a buffer, whose content is free.
            move_of(index)(self._buffers[index % _THREADS], index * _PIECE)

        with ThreadPoolExecutor(_THREADS) as pool:
            pieces = range(_DISK_BYTES // _PIECE)
            return _DISK_BYTES / least_seconds(lambda: list(pool.map(move, pieces)))


def link_rates(device: torch.device) -> tuple[float, float]:
    """Bytes a second from pinned host memory to an accelerator, and back."""
    host = aligned_buffer(_LINK_BYTES)
    there = torch.empty(_LINK_BYTES, dtype=torch.uint8, device=device)

    def speed(to: Tensor, source: Tensor) -> float:
        def copy() -> None:
            to.copy_(source, non_blocking=True)
            torch.accelerator.synchronize(device)

        return _LINK_BYTES / least_seconds(copy)

    return speed(there, host), speed(host, there)


def least_seconds(act: Callable[[], object]) -> float:
    """The least of some times without the first: what the machine does when nothing else runs."""
    times: list[float] = []
    act()
    while len(times) < _LEAST_TIMES or sum(times) < _LONG_ENOUGH:
        started = time.perf_counter()
        act()
        times.append(max(1e-9, time.perf_counter() - started))
    return min(times)
