"""A disk that fails or waits where a test wants it to, and optimizers that say what they step."""

import errno
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from memtile.homes import disk_io, kernel_aio
from memtile.transfer import Holder, rings_of


class FaultyDisk:
    """Counts a disk home's reads and writes, and fails the chosen ones.

    Attributes:
        count: reads or writes so far, by "read" and "write".
        fails: which ones fail, given the act and its number, counted from 1.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = {"read": 0, "write": 0}
        self.fails: Callable[[str, int], bool] = lambda act, number: False
        self._lock = threading.Lock()
        for act in self.count:
            real = getattr(disk_io, f"{act}_at")
            monkeypatch.setattr(disk_io, f"{act}_at", self._failing(act, real))
        redo_kernel_moves(monkeypatch)

    def _failing(self, act: str, real: Callable[..., int]) -> Callable[..., int]:
        def move(fd: int, buffer: memoryview, offset: int) -> int:
            with self._lock:
                self.count[act] += 1
                number = self.count[act]
            if self.fails(act, number):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(fd, buffer, offset)

        return move

    def fail(self, act: str, first: int, times: int | None = None) -> None:
        """From now on, fail the act's `first` and those after it, as many as `times` or all."""
        start = self.count[act] + first
        stop = None if times is None else start + times
        self.fails = lambda acted, n: acted == act and n >= start and (stop is None or n < stop)

    def mend(self) -> None:
        """Fail nothing any more."""
        self.fails = lambda act, number: False


def redo_kernel_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what the kernel moves by itself moved again by `disk_io`, where a test can see it."""
    end = kernel_aio._UnderWay.end
    monkeypatch.setattr(
        kernel_aio._UnderWay, "end", lambda self, number, moved: end(self, number, 0)
    )


class Watched(torch.optim.AdamW):
    """AdamW that calls `before` with each parameter that it is about to step."""

    before: Callable[[nn.Parameter], object] = staticmethod(lambda parameter: None)

    def step(self, closure: Any = None) -> None:
        """One step of what it has, which is one piece."""
        for group in self.param_groups:
            for parameter in group["params"]:
                type(self).before(parameter)
        super().step()


def at_step(number: int, act: Callable[[], object]) -> Callable[[nn.Parameter], None]:
    """A `before` that acts at its call of this number, counted from 0."""
    calls = iter(range(1 << 30))

    def before(parameter: nn.Parameter) -> None:
        if next(calls) == number:
            act()

    return before


def slabs_are_free(home: Any) -> bool:
    """Whether nobody holds a slab of the home, nor is one still to be written.

    What is read ahead may still be on its way: that is waited for.
    """
    free, until = (Holder.NOBODY, Holder.IDLE), time.monotonic() + 5
    while True:
        holders = [holder for ring in rings_of(home).all() for holder in ring.holders]
        if Holder.READERS not in holders or time.monotonic() > until:
            return all(holder in free for holder in holders)
        time.sleep(0.001)


def nobody_works(home: Any) -> bool:
    """Whether every slab of the home was given back; it may be being read or written still."""
    return all(h is not Holder.WORKERS for ring in rings_of(home).all() for h in ring.holders)
