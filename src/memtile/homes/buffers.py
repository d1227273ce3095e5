"""Memory from the kernel at its exact size: page-aligned private maps, and tensors over them.

A shared map, Python's default, would escape `RLIMIT_DATA`; PyTorch's `pin_memory` rounds every
block up to a power of two. Here the map is private and, where there is CUDA, registered with it.
"""

import errno
import mmap
import os
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

import torch
from torch import Tensor

from memtile.errors import HomeFullError
from memtile.homes.home import whole_pages

_WIPE_ON_FORK: Final = 18  # madvise(2); mmap has no name for it

PIECE: Final = 4 << 20
"""Bytes of the largest piece in which whole tiles are streamed."""

KEPT: Final = 3
"""Buffers of `scratch_like` that wait to be used again."""

# Filled by finalizers, which may run in any thread and at any time: a deque needs no lock.
_waiting: deque[memoryview] = deque(maxlen=KEPT)


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
    view = private_view(room, in_children=False) if room else None
    return tensor_over(view, torch.Size([room]), torch.uint8)


def pieces(room: int) -> Iterator[tuple[int, Tensor]]:
    """The room in pieces of at most `PIECE`: where each starts, and one buffer for each in turn."""
    buffer = aligned_buffer(min(room, PIECE))
    for start in range(0, room, PIECE):
        yield start, buffer[: min(PIECE, room - start)]


def scratch_like(tensor: Tensor) -> Tensor:
    """A contiguous CPU tensor of the same shape and dtype, its content undefined.

    It is for short-lived tensors of a tile's size: its memory is used again once it is gone. From
    the heap they would leave holes, which grow it (`kernel.trim_heap`).

    Raises:
        HomeFullError: there is no memory for it.
    """
    room = whole_pages(tensor.numel() * tensor.element_size())
    if not room:
        return tensor_over(None, tensor.shape, tensor.dtype)
    buffer = _waiting_buffer(room) or private_view(room)
    lent = buffer[:room]
    weakref.finalize(lent, _waiting.append, buffer).atexit = False
    return tensor_over(lent, tensor.shape, tensor.dtype)


def private_view(room: int, in_children: bool = True) -> memoryview:
    """A private anonymous map of so many bytes, pinned where CUDA is available.

    It is unmapped when the view and everything that keeps it are gone.

    Args:
        room: bytes, whole pages, not 0.
        in_children: whether a forked child has its content; else it finds zeros.

    Raises:
        HomeFullError: there is no memory for it, or CUDA cannot pin so much.
    """
    try:
        memory = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise HomeFullError(
            errno.ENOMEM, f"no memory for {room} more bytes ({error}): park less, or on disk"
        ) from error
    if not in_children:
        with suppress(OSError):  # kernels before 4.14 do not know it
            memory.madvise(_WIPE_ON_FORK)
    view = memoryview(memory)
    if torch.cuda.is_available():
        _pin(view, memory, room)
    return view


def tensor_over(view: memoryview | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A new CPU tensor over the view's first bytes, whose storage keeps the view alive.

    Args:
        view: at least as long as the tensor; None only for a tensor without elements.
        shape: of the tensor.
        dtype: of the tensor.
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
