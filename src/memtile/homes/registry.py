"""Which allocation a tensor lies in, and what room is held for it; it keeps no tensor alive."""

import weakref
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from memtile.homes.buffers import pieces
from memtile.homes.home import Berth, Home, Reservation

# Not in the parameter's __dict__: that is pickled, and copied to a parameter somewhere else.
_berths = WeakIdKeyDictionary()
_held = WeakIdKeyDictionary()


def register(tensor: Tensor, berth: Berth) -> None:
    """Makes `berth_of(tensor)` find the allocation for as long as the tensor lies over it.

    A parameter made from a registered tensor is another tensor: register it too.
    """
    _berths[tensor] = berth


def berth_of(tensor: Tensor) -> Berth | None:
    """The allocation the tensor was registered with; None where there is none, or no more.

    `p.data = other` moves a parameter away: then it is None, and the home's bytes are stale.
    """
    berth: Berth | None = _berths.get(tensor)
    if (
        berth is None
        or tensor.data_ptr() != berth.address
        or tensor.dtype is not berth.dtype
        or tensor.shape != berth.shape
        or not tensor.is_contiguous()  # a transposed square has the same address and shape
    ):
        return None
    return berth


def is_parked(tensor: Tensor) -> bool:
    """Whether the tensor lies in a home."""
    return berth_of(tensor) is not None


def streamed_allocation(tensor: Tensor) -> Berth | None:
    """The allocation of a tensor that is worked on in slabs; None: it is used where it lies."""
    berth = berth_of(tensor)
    return None if berth is None or berth.home.works_in_place else berth


def tensor_of(berth: Berth) -> Tensor:
    """A new tensor over the allocation, registered with it."""
    tensor = berth.tensor()
    register(tensor, berth)
    return tensor


def evict(tensor: Tensor | None) -> None:
    """Drop the pages that reading or writing a parked tensor brought into this process."""
    berth = None if tensor is None else berth_of(tensor)
    if berth is not None:
        berth.forget()


def hold_room(tensor: Tensor, held: Reservation) -> None:
    """Makes `room_of(tensor)` use the reservation, as long as its owner keeps it."""
    _held[tensor] = weakref.ref(held)


def room_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Inside, this thread parks in the room that is held for the tensor, where some is."""
    reference: weakref.ref[Reservation] | None = _held.get(tensor)
    held = None if reference is None else reference()
    return nullcontext() if held is None else held.used_here()


def settle_in(home: Home, tensor: Tensor) -> Tensor:
    """A new tensor with the tensor's values, of the same shape and dtype, that lives in the home.

    Where the home does not work in place, the values are written with `Berth.write`, in pieces, so
    that no page of the mapping comes into this process's memory.

    Raises:
        HomeFullError: the home has no room for it.
        HomeError: the home is closed.
        HomeIOError: writing failed.
    """
    berth = home.berth(tensor.shape, tensor.dtype)
    settled = tensor_of(berth)
    if home.works_in_place:
        settled.copy_(tensor.detach())
    else:
        _write_whole(berth, tensor.detach())
    return settled


def _write_whole(berth: Berth, tensor: Tensor) -> None:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor
    for start, piece in pieces(berth.room):
        used = min(piece.numel(), berth.nbytes - start)
        piece[:used].copy_(flat[start : start + used])
        berth.write(piece, start)
