"""Homes in memory: ordinary memory of a device, and host memory at its exact size."""

import errno
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from memtile.errors import HomeFullError
from memtile.homes.home import Allocation, Home, Reservation
from memtile.homes.kernel import private_view, tensor_over
from memtile.homes.limits import free_bytes


class DeviceHome(Home):
    """Ordinary memory of a device: its tensors are where the work is.

    Args:
        device: where; None: the CPU.
    """

    works_in_place: ClassVar[bool] = True

    def __init__(self, device: torch.device | str | int | None = None) -> None:
        super().__init__()
        self.device = torch.empty(0, device="cpu" if device is None else device).device

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Allocation:
        """Room for one tensor; see `Home.allocate`."""
        self.check_open()
        return _DeviceAllocation(self, shape, dtype)

    def hold(self, rooms: Sequence[int]) -> Reservation:
        """Checks that there is so much memory now; nothing keeps others from taking it."""
        held = super().hold(rooms)
        if self.device.type == "cpu":
            _check_free(self, sum(rooms))
        else:
            _allocate(self, torch.Size([sum(rooms)]), torch.uint8)  # its allocator keeps the block
        return held

    def __repr__(self) -> str:
        return f"DeviceHome({str(self.device)!r})"


class HostHome(Home):
    """Host memory, page by page at its exact size, pinned where CUDA is available.

    Drop no tensor of it while an asynchronous copy from or to it is under way.

    Examples:
        >>> model = memtile.tile(model, out_splits=4, home=memtile.HostHome())
    """

    works_in_place: ClassVar[bool] = True

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Allocation:
        """Room for one tensor; see `Home.allocate`."""
        self.check_open()
        return _HostAllocation(self, shape, dtype)

    def hold(self, rooms: Sequence[int]) -> Reservation:
        """Checks that there is so much memory now; nothing keeps others from taking it."""
        held = super().hold(rooms)
        _check_free(self, sum(rooms))
        return held


class _MemoryAllocation(Allocation):
    @abstractmethod
    def _bytes(self) -> Tensor:
        """The `nbytes` bytes of the tensor; the room's others are in no memory."""

    def _read_into(self, into: Tensor, start: int) -> None:
        used = max(0, min(into.numel(), self.nbytes - start))
        into[:used].copy_(self._bytes()[start : start + used])
        into[used:].zero_()

    def _write_from(self, source: Tensor, start: int) -> None:
        used = max(0, min(source.numel(), self.nbytes - start))
        self._bytes()[start : start + used].copy_(source[:used])


class _DeviceAllocation(_MemoryAllocation):
    def __init__(self, home: DeviceHome, shape: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__(home, shape, dtype)
        tensor = _allocate(home, self.shape, dtype)
        self._storage = tensor.untyped_storage()  # an allocation keeps no tensor alive
        self.address = tensor.data_ptr()

    def tensor(self) -> Tensor:
        return self._over(self.shape, self.dtype)

    def _bytes(self) -> Tensor:
        return self._over(torch.Size([self.nbytes]), torch.uint8)

    def _over(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        with torch.inference_mode(False):  # a parked parameter must be able to train later
            tensor = torch.empty(0, dtype=dtype, device=self._storage.device)
            return tensor.set_(self._storage).resize_(shape)


class _HostAllocation(_MemoryAllocation):
    def __init__(self, home: HostHome, shape: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__(home, shape, dtype)
        self._view = private_view(self.room) if self.room else None
        self.address = self.tensor().data_ptr()

    def tensor(self) -> Tensor:
        return tensor_over(self._view, self.shape, self.dtype)

    def _bytes(self) -> Tensor:
        return tensor_over(self._view, torch.Size([self.nbytes]), torch.uint8)


def _allocate(home: DeviceHome, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    try:
        with torch.inference_mode(False):
            return torch.empty(shape, dtype=dtype, device=home.device)
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU raises it plain
        raise HomeFullError(
            errno.ENOMEM,
            f"{home!r}: no memory for {shape.numel() * dtype.itemsize} more bytes ({error}): park "
            "less there, or on the host or on disk",
        ) from error


def _check_free(home: Home, nbytes: int) -> None:
    free = free_bytes()
    if free is not None and nbytes > free:
        raise HomeFullError(
            errno.ENOMEM,
            f"{home!r}: {nbytes} more bytes, and {free} bytes of memory are free: park less, or "
            "on disk",
        )
