"""Short-lived tensors of a tile's size, in memory that is used again and again.

From the heap they would leave holes behind them, which grow it (`kernel.trim_heap`).
"""

import weakref
from collections import deque
from typing import Final

from torch import Tensor

from memtile.homes.buffers import private_view, tensor_over
from memtile.homes.home import whole_pages

KEPT: Final = 3
"""Buffers that wait to be used again."""

# Filled by finalizers, which may run in any thread and at any time: a deque needs no lock.
_waiting: deque[memoryview] = deque(maxlen=KEPT)


def scratch_like(tensor: Tensor) -> Tensor:
    """A contiguous CPU tensor of the same shape and dtype, its content undefined.

    Its memory is used again once it is gone.

    Raises:
        HomeFullError: there is no memory for it.
    """
    room = whole_pages(tensor.numel() * tensor.element_size())
    if not room:
        return tensor_over(None, tensor.shape, tensor.dtype)
    buffer = _take(room)
    lent = buffer[:room]
    weakref.finalize(lent, _waiting.append, buffer).atexit = False
    return tensor_over(lent, tensor.shape, tensor.dtype)


def _take(room: int) -> memoryview:
    for _ in range(KEPT):
        try:
            buffer = _waiting.popleft()
        except IndexError:
            break
        if buffer.nbytes >= room:
            return buffer
    return private_view(room)
