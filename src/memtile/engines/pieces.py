"""What this rank holds of a tensor, whichever engine shards it: rectangles of it."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import (  # private: DTensor says nowhere else what it holds
    compute_local_shape_and_global_offset,
)

from memtile.engines.zero3_values import flat_part, is_partitioned

Offset = tuple[int, ...]


class Piece(NamedTuple):
    """A rectangle of a tensor that this rank holds.

    Attributes:
        offset: its corner in the whole tensor.
        values: shares memory with the tensor or its shard.
    """

    offset: Offset
    values: Tensor


def local_pieces(tensor: Tensor) -> Iterator[Piece]:
    """What this rank holds of a tensor, which shares memory with it: all of it, or a shard.

    Raises:
        CheckpointError: its shard is not in memory.
    """
    if is_partitioned(tensor):
        yield from _of_partition(tensor)
    elif not isinstance(tensor, DTensor):
        yield Piece((0,) * tensor.dim(), tensor.detach())
    elif tensor.device_mesh.get_coordinate() is not None:
        _, offset = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
        yield Piece(tuple(offset), tensor.to_local().detach())


def _of_partition(parameter: Any) -> Iterator[Piece]:  # with DeepSpeed's attributes
    """ZeRO-3 keeps a stretch of the flattened tensor, which is a few rectangles of it."""
    part = flat_part(parameter)
    start = part.numel() * dist.get_rank(parameter.ds_process_group)
    stop = min(start + part.numel(), parameter.ds_numel)
    for offset, sizes in boxes(tuple(parameter.ds_shape), start, stop):
        count = math.prod(sizes)
        yield Piece(offset, part[:count].view(sizes))
        part = part[count:]


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[Offset, Offset]]:
    """(offset, sizes) of the rectangles that a stretch of a flattened tensor is, in its order."""
    if start >= stop:
        return
    if len(shape) < 2:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # inside one row
        yield from _inside(shape, last, start - last * row, stop - last * row)
        return
    yield from _inside(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _inside(shape, last, 0, stop - last * row)


def _inside(
    shape: Sequence[int], row: int, start: int, stop: int
) -> Iterator[tuple[Offset, Offset]]:
    for offset, sizes in boxes(shape[1:], start, stop):
        yield (row, *offset), (1, *sizes)
