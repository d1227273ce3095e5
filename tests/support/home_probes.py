"""How the tests of homes look at one: values in and out, past tensors, from several threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from memtile.homes import Allocation, aligned_buffer, allocation_of


def random_values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Values of the dtype that are the same for the same seed."""
    numbers = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(seed))
    return (numbers % 2 == 1) if dtype == torch.bool else numbers.to(dtype)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same values, on whatever device."""
    return torch.equal(one.cpu(), other.cpu())


def known_allocation(tensor: Tensor) -> Allocation:
    """The allocation that the tensor was registered with."""
    allocation = allocation_of(tensor)
    assert allocation is not None
    return allocation


def read_whole(allocation: Allocation) -> Tensor:
    """The allocation's values, read past its tensors."""
    allocation.read(buffer := aligned_buffer(allocation.room))
    return buffer[: allocation.nbytes].view(allocation.dtype).view(allocation.shape)


def write_whole(allocation: Allocation, values: Tensor) -> None:
    """Writes the values past the allocation's tensors."""
    buffer = aligned_buffer(allocation.room)
    buffer[: allocation.nbytes].copy_(values.reshape(-1).view(torch.uint8))
    allocation.write(buffer)


def in_threads(work: Callable[[int], None], count: int) -> None:
    """Does the work in so many threads at once, and waits for them."""
    with ThreadPoolExecutor(count) as threads:
        list(threads.map(work, range(count)))  # raises what a thread raised
