"""`save_checkpoint`: a model's dense checkpoint, written tile by tile."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from memtile.checkpoints import SHARD_BYTES, Outgoing, write_checkpoint
from memtile.checkpoints.opening import as_path
from memtile.convert.dense import check_stored
from memtile.convert.kinds import configs_beside, naming_of
from memtile.convert.model_tensors import (
    ModelTensor,
    in_state_dict_order,
    parameter_count,
    persistent_buffers,
)
from memtile.convert.naming import Outward
from memtile.convert.sharded import for_sharded
from memtile.convert.streaming import ModelSource, TensorSource, written
from memtile.errors import ArgumentError, CannotTileError
from memtile.homes import streamed_allocation
from memtile.layers import TiledModule
from memtile.transfer import catch_up, rings_of


def save_checkpoint(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    max_shard_bytes: int = SHARD_BYTES,
    dtype: torch.dtype | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Write the dense checkpoint of a model into a folder, as safetensors with index and shards.

    Names, shapes and dtypes are the untiled model's; what is tied is written once. A few MiB are in
    memory at a time. Of a transformers model, they are those that its `save_pretrained` writes, as
    the Hub has them: what is renamed, merged or transposed on loading goes back, and what its class
    leaves out is left out. A weight that must be computed for that is in memory whole, with what it
    is made of. The model gets its config.json and generation_config.json too, so that plain
    transformers loads the folder: those of the folder that it was made from, with nothing changed
    but what differs.

    The checkpoint that is there already stays whole until the new one is: killed at any moment, the
    folder holds the one or the other.

    A model that FSDP2 or ZeRO-3 has sharded is saved by all ranks together; each calls this. Its
    shards take their own size on that disk once more meanwhile.

    Args:
        model: tiled or not, wherever its tiles live, sharded or not.
        folder: made where it is missing; the same for all ranks, which all see it.
        max_shard_bytes: no file is larger, unless one tensor is.
        dtype: to write floating-point tensors in; None: their own.
        process_group: of a sharded model; None: all ranks.

    Raises:
        ArgumentError: `model` is not a module, `folder` no path, or `max_shard_bytes` no size; or a
            process group is given for a model that is not sharded.
        CannotTileError: a tile computes its weight, or a tensor has no values or no dense form.
        CheckpointError: safetensors has no name for a dtype, or tiles make no dense tensor.
        CheckpointWriteError: it could not be written, or somebody else is writing there.
        HomeIOError: gradients or weights on their way home could not be written.
        EngineError: a rank is gone. Whatever is raised is raised on every rank.

        Nothing was written then; what was there is as it was.

    Examples:
        >>> memtile.save_checkpoint(model, "out")
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"the model is a {type(model).__name__}; it must be an nn.Module")
    place = as_path("folder", folder)
    sharded = for_sharded(model, process_group=process_group)
    if sharded is not None:
        sharded.save_checkpoint(
            model,
            place,
            max_shard_bytes=max_shard_bytes,
            dtype=dtype,
            process_group=process_group,
        )
        return
    check_saveable(model)
    stored = stored_sources(model, lambda needed: ModelSource(needed.dense, needed.names[0]))
    tensors = [_in_dtype(written(name, source), dtype) for name, source in stored.items()]
    beside = configs_beside(model, dtype)
    wait_for_writes(model)
    write_checkpoint(
        place,
        tensors,
        max_shard_bytes=max_shard_bytes,
        beside=beside,
        parameters=parameter_count(model),
    )


def stored_sources(
    model: nn.Module, source_of: Callable[[ModelTensor], TensorSource]
) -> Mapping[str, TensorSource]:
    """What the model's checkpoint has, by name; `source_of` tells where a dense tensor is read."""
    outward = [Outward(needed.names, source_of(needed)) for needed in in_state_dict_order(model)]
    return naming_of(model).written(outward)


def _in_dtype(tensor: Outgoing, dtype: torch.dtype | None) -> Outgoing:
    kept = tensor.dtype
    if dtype is None or not isinstance(kept, torch.dtype) or not kept.is_floating_point:
        return tensor
    pieces = tensor.pieces
    return replace(tensor, dtype=dtype, pieces=lambda: (piece.to(dtype) for piece in pieces()))


def check_modules(model: nn.Module) -> None:
    """Refuse a model that holds more than the tensors of the dense model."""
    for name, module in model.named_modules():
        if isinstance(module, TiledModule):
            check_stored(name, module)
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CannotTileError(
                f"{name or type(module).__name__} has extra state, which is no tensor; save it by "
                "itself with torch.save(module.get_extra_state(), …)"
            )


def check_saveable(model: nn.Module) -> None:
    """Refuse a model of which something has no dense form, or no values."""
    check_modules(model)
    for name, tensor in [*model.named_parameters(), *persistent_buffers(model)]:
        if type(tensor) not in (nn.Parameter, Tensor):
            raise CannotTileError(
                f"{name} is a {type(tensor).__name__}, which has no dense form; turn it into a "
                "plain parameter first"
            )
        if tensor.is_meta or tensor.layout != torch.strided:
            what = "on the meta device, where nothing has values" if tensor.is_meta else "sparse"
            raise CannotTileError(
                f"{name} is {what}; give it plain values before the model is saved"
            )


def wait_for_writes(model: nn.Module) -> None:
    """Wait until the model's homes have the newest values of everything."""
    catch_up(model.parameters())
    found = map(streamed_allocation, model.parameters())
    for home in {each.home for each in found if each is not None}:
        if not home.closed:
            rings_of(home).flush()
