"""Dense tensors over tiles and shards that lie elsewhere: what a distributed checkpoint sees.

Source: `torch.distributed.checkpoint` asks a tensor for its pieces (`_Checkpointable`), so a tensor
without data of its own can be saved and loaded.
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from memtile.convert.moving import Held, values_of
from memtile.convert.saving import check_modules, settle
from memtile.convert.wanted import wanted_by
from memtile.engines.pieces import Offset, Piece, local_pieces
from memtile.engines.zero3_values import flat_part, is_partitioned
from memtile.errors import ArgumentError, CheckpointError, EngineError
from memtile.layers import whole_shape
from memtile.optim import DenseParameter


class DenseView(Tensor):
    """A dense tensor as the pieces that this rank holds; nothing else can be done with it.

    Attributes:
        takes: whether values may be read into it.
    """

    takes: bool = True
    _pieces: dict[Offset, Tensor]
    __torch_function__: ClassVar[Any] = torch._C._disabled_torch_function_impl  # torch types none

    @staticmethod
    def __new__(
        cls,
        shape: Sequence[int],
        pieces: Sequence[Piece],
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
        """Refuse every operation but the one by which `async_save` begins a copy on the CPU.

        Raises:
            CheckpointError: it is another.
        """
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
        """What this rank can write; a piece that several hold is written by one of them."""
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
        """What this rank wants to read.

        Raises:
            EngineError: what is read would be lost.
        """
        if not self.takes:
            raise EngineError(  # no ValueError: DCP puts a message of its own in its place
                "the optimizer's masters would undo what dcp.load reads into partitions of ZeRO-3: "
                "load with memtile.resume_training, which writes them too"
            )
        return [_chunk(offset, values) for offset, values in self._pieces.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """The piece at a place, to be written or to be read into."""
        assert index.offset is not None
        return self._pieces[tuple(index.offset)]


def _chunk(offset: Offset, values: Tensor) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offset), values.size())


def dense_view(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the untiled model, for `dcp.save`, `dcp.async_save` and `dcp.load`.

    No values are copied: each rank writes and reads the pieces that it holds, in place. What is
    tied comes under every name that it has. Make it anew for each save and load.

    Args:
        model: tiled or not, over ranks or not, in `DistributedDataParallel` or not.

    Raises:
        ArgumentError: the model is none.
        CannotTileError: a tile computes its weight, or a module has extra state.
        CheckpointError: a tensor has no values yet, or tiles make no dense tensor.
    """
    model = unwrapped(model)
    let_go(model)
    views: dict[str, Tensor] = {}
    for wanted in wanted_by(model):
        view = view_of(wanted.dense, values_of)
        if isinstance(view, DenseView):
            view.takes = not any(is_partitioned(part.parameter) for part in wanted.dense.parts)
        views |= dict.fromkeys(wanted.names, view)
    return views


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP's or DeepSpeed's, whose names are the untiled model's; or the model."""
    engine = type(model).__module__.startswith("deepspeed.")
    inner = model.module if isinstance(model, DistributedDataParallel) or engine else model
    return cast(nn.Module, inner)


def let_go(model: nn.Module) -> None:
    """Have each value at its place: as shards, or at home; refuse what has no dense form.

    Raises:
        ArgumentError: the model is none.
        CannotTileError: a tile computes its weight, or a module has extra state.
    """
    given: object = model  # callers without types give anything
    if not isinstance(given, nn.Module):
        raise ArgumentError(f"the model is a {type(model).__name__}; it must be an nn.Module")
    check_modules(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # the root stays gathered after a forward without gradients
    settle(model)


def view_of(dense: DenseParameter, held: Held) -> Tensor:
    """The dense tensor over what is held for each of its parts; itself where it has one part.

    Raises:
        CheckpointError: they have no values, or do not make the dense tensor.
    """
    tensors = [held(part) for part in dense.parts]
    if any(tensor.is_meta for tensor in tensors):
        raise CheckpointError(
            f"{dense.name} is on the meta device, where nothing has values; call "
            "model.to_empty(device=…) first"
        )
    if dense.parts[0].rect is not None:
        _check(dense, tensors)
        return DenseView(dense.shape, list(_pieces(dense, tensors)), _held(tensors[0]))
    if is_partitioned(tensors[0]):
        pieces = list(local_pieces(tensors[0]))
        return DenseView(whole_shape(tensors[0]), pieces, _held(tensors[0]))
    return tensors[0].detach()


def _held(tensor: Tensor) -> Tensor:
    """What has the dtype of its pieces."""
    return flat_part(tensor) if is_partitioned(tensor) else tensor


def _check(dense: DenseParameter, tensors: Sequence[Tensor]) -> None:
    dtypes = sorted({str(_held(tensor).dtype) for tensor in tensors})
    if len(dtypes) > 1:
        raise CheckpointError(
            f"the tiles of {dense.name} are {' and '.join(dtypes)}; a dense tensor has one dtype: "
            "convert the layer with .to(dtype) first"
        )
    for part, tensor in zip(dense.parts, tensors, strict=True):
        assert part.rect is not None
        shape = whole_shape(tensor)
        if shape != part.rect.shape[: len(shape)]:
            raise CheckpointError(
                f"a tile of {dense.name} is {shape} where its place in the dense "
                f"tensor is {part.rect.shape}: it is a shard of a parallel linear, which has no "
                "dense form here; save model.state_dict()"
            )


def _pieces(dense: DenseParameter, tensors: Sequence[Tensor]) -> Iterator[Piece]:
    """What this rank holds of each part; nothing where a shard is empty."""
    for part, tensor in zip(dense.parts, tensors, strict=True):
        assert part.rect is not None
        corner = (part.rect.out.start, part.rect.into.start)
        for offset, values in local_pieces(tensor):
            if values.numel():
                place = tuple(start + along for start, along in zip(corner, offset, strict=False))
                yield Piece(place[::-1], values.t()) if part.turned else Piece(place, values)
