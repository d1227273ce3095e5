"""Views of dense tensors over tiles and shards, which distributed checkpoints save and load.

Source: `torch.distributed.checkpoint` asks a tensor for its pieces (`_Checkpointable`), so a tensor
without data of its own can be saved and loaded.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import (  # private: DTensor says nowhere else what it holds
    compute_local_shape_and_global_offset,
)
from torch.nn.parallel import DistributedDataParallel

from memtile.convert.model_tensors import tensors_of
from memtile.convert.saving import check_modules, wait_for_writes
from memtile.convert.streaming import Held, values_of
from memtile.engines.zero3_values import flat_part, is_partitioned
from memtile.errors import ArgumentError, CheckpointError, EngineError
from memtile.layers import whole_shape
from memtile.optim import DenseParameter

Offset = tuple[int, ...]


class ShardPiece(NamedTuple):
    """A rectangle of a tensor that this rank holds."""

    offset: Offset  # its corner in the whole tensor
    values: Tensor  # shares memory with the tensor or its shard


class DenseView(Tensor):
    """A dense tensor as the pieces that this rank holds; it can be saved and loaded only."""

    takes: bool = True  # whether values may be read into it
    _pieces: dict[Offset, Tensor]
    __torch_function__: ClassVar[Any] = torch._C._disabled_torch_function_impl  # torch types none

    @staticmethod
    def __new__(
        cls,
        shape: Sequence[int],
        pieces: Sequence[ShardPiece],
        like: Tensor,
        device: torch.device | None = None,
    ) -> "DenseView":
        """A view of a dense tensor of this shape, with the dtype and the device of another."""
        view: DenseView = Tensor._make_wrapper_subclass(
            cls, shape, dtype=like.dtype, device=device or like.device
        )
        view._pieces = dict(pieces)
        return view

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # as torch calls it, not as it is typed
        cls,
        func: Any,  # torch types no operation
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        """Refuse every operation but the one by which `async_save` begins a copy on the CPU."""
        if func is torch.ops.aten.new_empty.default:
            view, size = args
            return cls(size, [], view, kwargs.get("device"))
        raise CheckpointError(
            f"{func} on a dense view, which holds no values: give it to dcp.save or dcp.load, and "
            "read values from the model, or from memtile.dense_state_dict(model)"
        )

    def __repr__(self) -> str:  # type: ignore[override]  # torch adds a keyword that nothing passes
        return f"DenseView({tuple(self.shape)}, {self.dtype}, {len(self._pieces)} pieces here)"

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        """What this rank can write; DCP writes a piece that several ranks hold once."""
        return [
            WriteItem(
                MetadataIndex(fqn, torch.Size(offset)),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    _chunk(offset, values), TensorProperties.create_from_tensor(values), self.size()
                ),
            )
            for offset, values in self._pieces.items()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """What this rank wants to read; EngineError where it would be overwritten."""
        if not self.takes:
            raise EngineError(  # no ValueError: DCP puts a message of its own in its place
                "the optimizer's masters would undo what dcp.load reads into partitions of ZeRO-3: "
                "load with memtile.resume_training, which writes them too"
            )
        return [_chunk(offset, values) for offset, values in self._pieces.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """The piece at an offset, to be written or to be read into."""
        assert index.offset is not None
        return self._pieces[tuple(index.offset)]


def _chunk(offset: Offset, values: Tensor) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offset), values.size())


def dense_view(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the untiled model, for `dcp.save`, `dcp.async_save` and `dcp.load`.

    No values are copied: each rank writes and reads the pieces that it holds, in place. Tied
    tensors are under each of their names. Make a new view for each save and load.

    Args:
        model: tiled or not, over ranks or not, in `DistributedDataParallel` or not.

    Raises:
        ArgumentError: the model is no `nn.Module`.
        CannotTileError: a tile computes its weight, or a module has extra state.
        CheckpointError: a tensor has no values yet, or tiles make no dense tensor.
    """
    model = unwrapped(model)
    reshard_and_flush(model)
    views: dict[str, Tensor] = {}
    for wanted in tensors_of(model):
        view = view_of(wanted.dense, values_of)
        if isinstance(view, DenseView):
            view.takes = not any(is_partitioned(part.parameter) for part in wanted.dense.parts)
        views |= dict.fromkeys(wanted.names, view)
    return views


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `DistributedDataParallel` or DeepSpeed's engine; or the model itself."""
    is_engine = type(model).__module__.startswith("deepspeed.")
    is_wrapper = is_engine or isinstance(model, DistributedDataParallel)
    return cast(nn.Module, model.module) if is_wrapper else model


def reshard_and_flush(model: nn.Module) -> None:
    """Reshard what is gathered, and write buffers to their homes; refuse what has no dense form."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"the model is a {type(model).__name__}; it must be an nn.Module")
    check_modules(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # the root stays gathered after a forward without gradients
    wait_for_writes(model)


def view_of(dense: DenseParameter, held: Held) -> Tensor:
    """A view of a dense tensor; the tensor itself where it is whole, or FSDP2's shard."""
    tensors = [held(part) for part in dense.parts]
    if any(tensor.is_meta for tensor in tensors):
        raise CheckpointError(
            f"{dense.name} is on the meta device, where nothing has values; call "
            "model.to_empty(device=…) first"
        )
    held_as = [flat_part(each) if is_partitioned(each) else each for each in tensors]
    if dense.parts[0].rect is None:
        if not is_partitioned(tensors[0]):
            return tensors[0].detach()
        return DenseView(whole_shape(tensors[0]), list(local_pieces(tensors[0])), held_as[0])
    dtypes = sorted({str(each.dtype) for each in held_as})
    if len(dtypes) > 1:
        raise CheckpointError(
            f"the tiles of {dense.name} are {' and '.join(dtypes)}; a dense tensor has one dtype: "
            "convert the layer with .to(dtype) first"
        )
    return DenseView(dense.shape, list(_pieces(dense, tensors)), held_as[0])


def _pieces(dense: DenseParameter, tensors: Sequence[Tensor]) -> Iterator[ShardPiece]:
    """What this rank holds of each part, empty shards left out."""
    for part, tensor in zip(dense.parts, tensors, strict=True):
        assert part.rect is not None
        shape = whole_shape(tensor)
        if shape != part.rect.shape[: len(shape)]:
            raise CheckpointError(
                f"a tile of {dense.name} is {shape} where its place in the dense "
                f"tensor is {part.rect.shape}: it is a shard of a parallel linear, which has no "
                "dense form here; save model.state_dict()"
            )
        corner = (part.rect.out.start, part.rect.into.start)
        for offset, values in local_pieces(tensor):
            if values.numel():
                place = tuple(start + along for start, along in zip(corner, offset, strict=False))
                if part.transposed:
                    place, values = place[::-1], values.t()
                if len(dense.shape) > len(place):
                    yield from _in_stack(dense.shape, place, values)
                else:
                    yield ShardPiece(place, values)


def _in_stack(shape: torch.Size, place: Offset, values: Tensor) -> Iterator[ShardPiece]:
    """Rows of the matrix (E·R, C) in the stack (E, R, C), in a few boxes."""
    row, column = place
    for offset, sizes in boxes(tuple(shape[:2]), row, row + values.shape[0]):
        count = math.prod(sizes)
        yield ShardPiece((*offset, column), values[:count].view(*sizes, -1))
        values = values[count:]


def local_pieces(tensor: Tensor) -> Iterator[ShardPiece]:
    """What this rank holds of a tensor, sharing its memory: all of it, or a shard."""
    if is_partitioned(tensor):
        yield from _of_partition(tensor)
    elif not isinstance(tensor, DTensor):
        yield ShardPiece((0,) * tensor.dim(), tensor.detach())
    elif tensor.device_mesh.get_coordinate() is not None:
        _, offset = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
        yield ShardPiece(tuple(offset), tensor.to_local().detach())


def _of_partition(parameter: Any) -> Iterator[ShardPiece]:  # with DeepSpeed's attributes
    """The few rectangles that ZeRO-3's shard, a stretch of the flattened tensor, consists of."""
    part = flat_part(parameter)
    start = part.numel() * dist.get_rank(parameter.ds_process_group)
    stop = min(start + part.numel(), parameter.ds_numel)
    for offset, sizes in boxes(tuple(parameter.ds_shape), start, stop):
        count = math.prod(sizes)
        yield ShardPiece(offset, part[:count].view(sizes))
        part = part[count:]


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[Offset, Offset]]:
    """(offset, sizes) of the rectangles that a stretch of a flattened tensor consists of."""
    if start >= stop:
        return
    if not shape:
        yield (), ()
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
