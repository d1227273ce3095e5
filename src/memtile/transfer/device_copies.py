"""Copies between a CUDA device and pinned host memory, behind and ahead of the kernels."""

import weakref
from collections import deque
from typing import Any, Final

import torch
from torch import Tensor

from memtile.homes import Allocation

COPIES_UNDER_WAY: Final = 8  # copies; device memory of those out is not free before they end


class DeviceCopies:
    """One stream of one CUDA device, which copies between it and allocations of a `HostHome`.

    What could go wrong, and what prevents it:

    1. A copy out reads before kernels have written: its stream waits for the current one.
    2. A later kernel writes in place what is being copied out: a clone is.
    3. Device memory is used again while it is copied: the allocator is told (`record_stream`).
    4. Host memory is given back while it is copied: `_under_way` keeps it until the copy's event.
    5. A copy in reads what a copy out has not written: both are in one stream, in order.
    6. A kernel reads before a copy in has written: `wait` has the current stream wait for it.

    Args:
        device: a CUDA device.
        cuda: `torch.cuda`; tests give another.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:  # a module
        self._device, self._cuda = device, cuda
        self._stream = cuda.Stream(device)
        self._under_way: deque[tuple[Any, Allocation]] = deque()  # Any: events
        weakref.finalize(self, _end, self._under_way).atexit = False

    def store(self, flat: Tensor, allocation: Allocation) -> None:
        """Start to copy a 1-D tensor's bytes from the device into the allocation."""
        clone = flat.clone()
        self._copy(allocation.tensor(), clone, clone, allocation)

    def load(self, allocation: Allocation) -> tuple[Tensor, Any]:
        """A device tensor of the allocation's bytes, and the event to `wait` for."""
        flat = torch.empty(allocation.shape, dtype=allocation.dtype, device=self._device)
        return flat, self._copy(flat, allocation.tensor(), flat, allocation)

    def wait(self, event: Any) -> None:
        """Have the kernels that are started from now on, in the current stream, run after it."""
        self._cuda.current_stream(self._device).wait_event(event)

    def _copy(self, into: Tensor, source: Tensor, on_device: Tensor, allocation: Allocation) -> Any:
        self._stream.wait_stream(self._cuda.current_stream(self._device))
        with self._cuda.stream(self._stream):
            into.copy_(source, non_blocking=True)
        on_device.record_stream(self._stream)
        event = self._stream.record_event()
        self._under_way.append((event, allocation))
        while len(self._under_way) > COPIES_UNDER_WAY:
            self._under_way.popleft()[0].synchronize()
        while self._under_way and self._under_way[0][0].query():
            self._under_way.popleft()
        return event


def _end(under_way: "deque[tuple[Any, Allocation]]") -> None:
    while under_way:
        under_way.popleft()[0].synchronize()
