"""Parking: the home that a user names, and the allocation that a tensor lies in.

The tables here keep no tensor alive.
"""

import weakref
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Final, Generic, TypeVar

import torch
from torch import Tensor

from memtile.home_names import parse_home
from memtile.homes.disk import DiskHome
from memtile.homes.home import Allocation, Home, Reservation
from memtile.homes.kernel import pieces
from memtile.homes.memory_homes import DeviceHome, HostHome

_WAY_OUT: Final = ", or a home such as memtile.DiskHome(folder)"

_V = TypeVar("_V")


class TensorTable(Generic[_V]):
    """Values by tensor, which it keeps not alive; looked up by identity, without comparing.

    `torch.utils.weak.WeakIdKeyDictionary` makes a reference for each look-up: 9 calls, 3 us.
    """

    def __init__(self) -> None:
        self._values: dict[int, tuple[weakref.ref[Tensor], _V]] = {}

    def get(self, tensor: Tensor) -> _V | None:
        """The tensor's value, if any."""
        # An entry is dropped before the address of its tensor is used again.
        found = self._values.get(id(tensor))
        return None if found is None else found[1]

    def __setitem__(self, tensor: Tensor, value: _V) -> None:
        key, values = id(tensor), self._values
        values[key] = weakref.ref(tensor, partial(_drop, values, key)), value

    def setdefault(self, tensor: Tensor, value: _V) -> _V:
        """The tensor's value, this one where it has none; another thread may set one meanwhile."""
        key, values = id(tensor), self._values
        entry = weakref.ref(tensor, partial(_drop, values, key)), value
        return values.setdefault(key, entry)[1]


def _drop(values: dict[int, tuple[Any, Any]], key: int, reference: object) -> None:
    found = values.get(key)
    if found is not None and found[0] is reference:
        del values[key]


# Not in the parameter's __dict__: that is pickled, and copied to a parameter somewhere else.
_allocations = TensorTable[Allocation]()
_held = TensorTable["weakref.ref[Reservation]"]()


def resolve_home(home: Home | str, device: Any = None) -> Home:
    """The home itself, or a new one for "disk", "disk:FOLDER", "host" or "device".

    `device` is what "device" means, as torch takes it; None: torch's default device. ArgumentError
    where it is neither a home nor such a word.
    """
    if isinstance(home, Home):
        return home
    kind, folder = parse_home(home, more=_WAY_OUT)
    if kind == "disk":
        return DiskHome(folder)
    return HostHome() if kind == "host" else DeviceHome(torch.empty(0, device=device).device)


def word_for(home: Home | str) -> str:
    """The word that names a home of the same kind and folder; ArgumentError where there is none."""
    if isinstance(home, DiskHome):
        return f"disk:{home.folder}"
    if isinstance(home, HostHome):
        return "host"
    if isinstance(home, DeviceHome):
        return "device"
    parse_home(home, more=_WAY_OUT)
    return str(home)


def register(tensor: Tensor, allocation: Allocation) -> None:
    """Makes `allocation_of(tensor)` find the allocation for as long as the tensor lies over it.

    A parameter made from a registered tensor is another tensor: register it too.
    """
    _allocations[tensor] = allocation


def allocation_of(tensor: Tensor) -> Allocation | None:
    """The allocation the tensor was registered with; None where there is none, or no more.

    `p.data = other` moves a parameter away: then it is None, and the home's bytes are stale.
    """
    allocation = _allocations.get(tensor)
    return allocation if allocation is not None and _lies_over(tensor, allocation) else None


def _lies_over(tensor: Tensor, allocation: Allocation) -> bool:
    return (
        tensor.data_ptr() == allocation.address
        and tensor.dtype is allocation.dtype
        and tensor.shape == allocation.shape
        and tensor.is_contiguous()  # a transposed square has the same address and shape
    )


def is_parked(tensor: Tensor) -> bool:
    """Whether the tensor lies in a home."""
    return allocation_of(tensor) is not None


def streamed_allocation(tensor: Tensor) -> Allocation | None:
    """The allocation of a tensor that is worked on in slabs; None: it is used where it lies."""
    allocation = _allocations.get(tensor)
    if allocation is None or allocation.home.works_in_place or not _lies_over(tensor, allocation):
        return None
    return allocation


def tensor_of(allocation: Allocation) -> Tensor:
    """A new tensor over the allocation, registered with it."""
    tensor = allocation.tensor()
    register(tensor, allocation)
    return tensor


def evict(tensor: Tensor | None) -> None:
    """Drop the pages that reading or writing a parked tensor brought into this process."""
    allocation = None if tensor is None else allocation_of(tensor)
    if allocation is not None:
        allocation.evict()


def set_reservation(tensor: Tensor, held: Reservation) -> None:
    """Let `reservation_of(tensor)` use the reservation for as long as its owner keeps it."""
    _held[tensor] = weakref.ref(held)


def reservation_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Inside, this thread allocates from the room that is reserved for the tensor, if any."""
    reference = _held.get(tensor)
    held = None if reference is None else reference()
    return nullcontext() if held is None else held.used_by_this_thread()


def allocate_copy(home: Home, tensor: Tensor) -> Tensor:
    """A new tensor with the tensor's values, of the same shape and dtype, that lives in the home.

    Where the home does not work in place, the values are written with `Allocation.write`, in
    pieces, so that no page of the mapping comes into this process's memory.
    """
    allocation, values = home.allocate(tensor.shape, tensor.dtype), tensor.detach()
    parked = tensor_of(allocation)
    if home.works_in_place:
        parked.copy_(values)
    else:
        write_values(allocation, values)
    return parked


def write_values(allocation: Allocation, values: Tensor) -> None:
    """Write a tensor of the allocation's shape and dtype there, in pieces."""
    if values.numel():
        flat = values.contiguous().view(-1).view(torch.uint8)
        for start, piece in pieces(allocation.nbytes):
            used = min(piece.numel(), allocation.nbytes - start)
            piece[:used].copy_(flat[start : start + used])
            allocation.write(piece, start)


def read_values(allocation: Allocation, into: Tensor) -> None:
    """Read what is there into a contiguous tensor of its shape and dtype, in pieces."""
    if into.numel():
        flat = into.view(-1).view(torch.uint8)
        for start, piece in pieces(allocation.nbytes):
            used = min(piece.numel(), allocation.nbytes - start)
            allocation.read(piece, start)
            flat[start : start + used].copy_(piece[:used])
