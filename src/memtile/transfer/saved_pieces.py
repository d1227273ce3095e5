"""Pieces of memory that were saved for backward: parked in a home, and read ahead of their use.

A piece is copied into a slab, which is written home behind the forward. Backward reads pieces in
the order in which the last backward needed them, at first in the reverse order of saving. A piece's
room is free again once no node of a graph needs it.
"""

import os
import weakref
from collections import deque
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from memtile.errors import HomeError
from memtile.homes import Allocation, Home, HostHome
from memtile.transfer.device_copies import DeviceCopies
from memtile.transfer.iterations import rings_of
from memtile.transfer.prefetch_order import PrefetchOrder

_HELD: Final = 4  # pieces that stay in memory, since other nodes need them too
_AHEAD: Final = 2  # pieces that are on their way to a device


class SavedPieces:
    """The pieces in one home.

    Attributes:
        are_counted: whether they are of tensors on the meta device, of which only shapes are known.
        home: the home.
    """

    are_counted: ClassVar[bool] = False

    def __init__(self, home: Home) -> None:
        self.home = home
        self._forward = _Forward()
        self._backward: _Forward | None = None  # of which a piece was needed last
        self._prefetch_order = PrefetchOrder[int]()  # of numbers
        self._held: deque[weakref.ref[SavedPiece]] = deque()
        self._copies: dict[torch.device, DeviceCopies] = {}
        self._process = os.getpid()

    def begin(self) -> None:
        """A forward begins: pieces are numbered from 1 on."""
        self._forward = _Forward()

    def store(self, tensor: Tensor, start: int, stop: int, label: str) -> "SavedPiece":
        """A piece with these bytes of a storage; they may be written to and freed afterwards.

        Raises:
            HomeFullError: the home has no room for it.
            HomeIOError: no slab is free, since what was stored before could not be written.
        """
        flat = bytes_of(tensor, start, stop)
        allocation = self.home.allocate(flat.shape, flat.dtype)
        allocation.label = label
        piece = SavedPiece(self, allocation, flat.device)
        if self._is_streamed(flat.device):
            self._copies_of(flat.device).store(flat, allocation)
        elif self.home.works_in_place:
            allocation.tensor().copy_(flat)
        else:
            ring = rings_of(self.home).activations
            weakref.finalize(piece, ring.abandon, allocation).atexit = False
            with ring.acquire(made=(allocation,), ahead=()) as lease:
                lease.tensors[0].copy_(flat)
                lease.store()
        return piece

    def number(self, piece: "SavedPiece") -> None:
        """The piece was saved now, perhaps again."""
        if self._forward.is_over():
            self.begin()
        self._forward.add(piece)

    def values(self, piece: "SavedPiece") -> Tensor:
        """The bytes of a piece on its device, while what is needed next is on its way."""
        if os.getpid() != self._process:
            raise HomeError(
                f"process {os.getpid()} runs backward through activations that process "
                f"{self._process} parked: run forward and backward in one process"
            )
        is_streamed = self._is_streamed(piece.device)
        in_place = self.home.works_in_place or self.home.is_mapped
        if in_place and piece.device.type == "cpu" and not is_streamed:
            tensor = piece.allocation.populate()
            weakref.finalize(piece, piece.allocation.release).atexit = False
            return tensor
        if self._backward is not piece.forward:
            self._backward = piece.forward
            self._prefetch_order.start()
        self._prefetch_order.note(piece.number)
        if is_streamed:
            return self._arrived(piece)
        return self._read(piece) if piece.held is None else self._use(piece, *piece.held)

    def _read(self, piece: "SavedPiece") -> Tensor:
        """Through a slab."""
        flat = torch.empty(piece.allocation.shape, dtype=torch.uint8, device=piece.device)
        ahead = ((each.allocation,) for each in self._next(piece) if each.held is None)
        ring = rings_of(self.home).activations
        with ring.acquire((piece.allocation,), ahead=ahead) as lease:
            flat.copy_(lease.tensors[0])
        return self._use(piece, flat, None)

    def _arrived(self, piece: "SavedPiece") -> Tensor:
        """By a stream of the device."""
        copies = self._copies_of(piece.device)
        flat, arrival = piece.held or copies.load(piece.allocation)
        copies.wait(arrival)
        for each in islice(self._next(piece), _AHEAD):
            if each.held is None and each.device == piece.device:
                self._hold(each, *copies.load(each.allocation))
        return self._use(piece, flat, arrival)

    def _next(self, piece: "SavedPiece") -> Iterator["SavedPiece"]:
        """What is needed after this piece, as far as it is known, soonest first."""
        learnt = islice(self._prefetch_order.ahead(), len(piece.forward.pieces))
        first = next(learnt, None)
        reverse = range(piece.number - 1, 0, -1)
        for number in reverse if first is None else chain([first], learnt):
            found = piece.forward.find(number)
            if found is not None and found is not piece:
                yield found

    def _use(self, piece: "SavedPiece", flat: Tensor, arrival: Any) -> Tensor:
        """Keep it in memory for as long as other nodes need it too."""
        if len(piece.views) < 2:
            piece.held = None
        elif piece.held is None:
            self._hold(piece, flat, arrival)
        return flat

    def _hold(self, piece: "SavedPiece", flat: Tensor, arrival: Any) -> None:
        piece.held = flat, arrival
        self._held.append(weakref.ref(piece))
        while len(self._held) > _HELD + _AHEAD:
            oldest = self._held.popleft()()
            if oldest is not None and oldest is not piece:
                oldest.held = None

    def _is_streamed(self, device: torch.device) -> bool:
        return device.type == "cuda" and isinstance(self.home, HostHome)

    def _copies_of(self, device: torch.device) -> DeviceCopies:
        found = self._copies.get(device)
        return found or self._copies.setdefault(device, DeviceCopies(device))


class _Forward:
    """The pieces that one forward saved, in order; it keeps none alive."""

    def __init__(self) -> None:
        self.pieces: list[weakref.ref[SavedPiece]] = []

    def add(self, piece: "SavedPiece") -> None:
        """Give it the next number, in this forward."""
        self.pieces.append(weakref.ref(piece))
        piece.forward, piece.number = self, len(self.pieces)

    def find(self, number: int) -> "SavedPiece | None":
        """The piece that has this number, unless it is gone, or was saved again later."""
        found = self.pieces[number - 1]() if number <= len(self.pieces) else None
        return found if found is not None and found.number == number else None

    def is_over(self) -> bool:
        """Whether it has saved pieces, and all are gone; backward lets go of the last one first."""
        return bool(self.pieces) and all(each() is None for each in reversed(self.pieces))


class SavedPiece:
    """Bytes of a storage at home.

    Attributes:
        allocation: where.
        device: which they were on.
        views: the saved tensors that lie in it.
        forward: which saved it.
        number: when it was saved there, the last time.
        held: its bytes on its device, and the event of a copy under way.
        origin: what it was stored of.
    """

    forward: _Forward
    number: int
    origin: Any

    def __init__(self, owner: SavedPieces, allocation: Allocation, device: torch.device) -> None:
        self._owner, self.allocation, self.device = owner, allocation, device
        self.views = weakref.WeakSet[SavedView]()
        self.held: tuple[Tensor, Any] | None = None  # Any: an event of a backend
        # Tensors over a mapping bring pages into memory, which would outlive the room's use. It is
        # called after those of later uses: weak references call the newest one first.
        weakref.finalize(self, allocation.evict).atexit = False

    def values(self) -> Tensor:
        """Its bytes on its device: 1-D uint8."""
        return self._owner.values(self)


class SavedView:
    """A saved tensor that lies in a piece, which begins at byte `start` of the tensor's storage."""

    def __init__(self, piece: SavedPiece, tensor: Tensor, start: int) -> None:
        self._piece, self._dtype = piece, tensor.dtype
        self._shape, self._stride = tensor.shape, tensor.stride()
        self._offset = tensor.storage_offset() - start // tensor.element_size()
        piece.views.add(self)

    def unpack(self) -> Tensor:
        """The tensor, as it was saved."""
        flat = self._piece.values()
        found = flat.new_empty(0, dtype=self._dtype)
        return found.set_(flat.untyped_storage(), self._offset, self._shape, self._stride)


def bytes_of(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Some bytes of the storage of a tensor: 1-D uint8, not copied."""
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return flat.set_(tensor.untyped_storage(), start, (stop - start,), (1,))
