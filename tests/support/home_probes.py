"""How the tests of homes look at one: values in and out, past tensors, from several threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from memtile.homes import Berth, aligned_buffer, berth_of


def random_values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Values of the dtype that are the same for the same seed."""
    numbers = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(seed))
    return (numbers % 2 == 1) if dtype == torch.bool else numbers.to(dtype)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same values, on whatever device."""
    return torch.equal(one.cpu(), other.cpu())


def known_berth(tensor: Tensor) -> Berth:
    """The berth that the tensor was registered with."""
    berth = berth_of(tensor)
    assert berth is not None
    return berth


def read_whole(berth: Berth) -> Tensor:
    """The berth's values, read past its tensors."""
    berth.read(buffer := aligned_buffer(berth.room))
    return buffer[: berth.nbytes].view(berth.dtype).view(berth.shape)


def write_whole(berth: Berth, values: Tensor) -> None:
    """Writes the values past the berth's tensors."""
    buffer = aligned_buffer(berth.room)
    buffer[: berth.nbytes].copy_(values.reshape(-1).view(torch.uint8))
    berth.write(buffer)


def assert_raises(kind: type[Exception], act: Callable[[], object]) -> None:
    """Fails unless the act raises an error of this kind."""
    try:
        act()
    except kind:
        return
    raise AssertionError(f"it must raise {kind.__name__}")


def in_threads(work: Callable[[int], None], count: int) -> None:
    """Does the work in so many threads at once, and waits for them."""
    with ThreadPoolExecutor(count) as threads:
        list(threads.map(work, range(count)))  # raises what a thread raised
