"""Checks at each call: whether tiles are plain, and whether input and results fit."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from memtile.errors import (
    SplitsError,
    TileClassError,
    TileDeviceError,
    TileDtypeError,
    TileShapeError,
)
from memtile.geometry import Grid, partition_uniform
from memtile.ops import autocast_dtype

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LINEAR_FORWARD, _LINEAR_CALL = nn.Linear.forward, nn.Linear.__call__


def is_plain(tile: nn.Module, cls: type[nn.Module] = nn.Linear) -> bool:
    """Whether calling the tile does what its class does and nothing else: it has no hooks, say."""
    own, parameters = tile.__dict__, tile._parameters
    return (
        type(tile) is cls
        and not (own["_forward_hooks"] or own["_forward_pre_hooks"])
        and not (own["_backward_hooks"] or own["_backward_pre_hooks"])
        and type(parameters.get("weight")) is nn.Parameter
        and type(parameters.get("bias")) in (nn.Parameter, type(None))
        and "forward" not in own
        and own.get("_compiled_call_impl") is None
    )


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class whose forward gives the module's values: another one where it defers logits."""
    found: type[nn.Module] = getattr(type(module), "acts_as", type(module))
    return found


def has_replaced_parameters(module: nn.Module) -> bool:
    """Whether `torch.func.functional_call` calls it: it has other parameters after the call."""
    found = (p for each in module.modules() for p in each._parameters.values())
    return any(p is not None and not isinstance(p, nn.Parameter) for p in found)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs hooks, or a forward that was put on the instance."""
    return "forward" in module.__dict__ or any(module.__dict__[hooks] for hooks in _HOOKS)


def hooks_of(module: nn.Module) -> list[Any]:
    """What calling the module runs besides its forward."""
    return [hook for hooks in _HOOKS for hook in module.__dict__[hooks].values()]


def drop_hooks(module: nn.Module, which: Callable[[Any], bool] = lambda hook: True) -> None:
    """Take away what calling the module runs besides its forward; the caller says which of it."""
    for hooks in _HOOKS:
        kept = ((key, hook) for key, hook in module.__dict__[hooks].items() if not which(hook))
        module.__dict__[hooks] = type(module.__dict__[hooks])(kept)


def all_plain(tiles: Sequence[nn.Module]) -> bool:
    """Whether all tiles are plain, of one device and dtype, and there are no global hooks."""
    if hooked_globally() or nn.Linear.forward is not _LINEAR_FORWARD:
        return False
    first = tiles[0]._parameters.get("weight")
    if first is None or not first.is_floating_point():  # complex gradients need conjugates
        return False
    dtype, device = first.dtype, first.device
    return all(
        is_plain(tile)
        and all(
            p is None or (p.dtype == dtype and p.device == device)
            for p in tile._parameters.values()
        )
        for tile in tiles
    )


def hooked_globally() -> bool:
    """Whether calls of any module may do more: there are global hooks, or another `__call__`."""
    return nn.Linear.__call__ is not _LINEAR_CALL or any(
        getattr(torch_module, f"_global{hooks}") for hooks in _HOOKS
    )


def column_widths(row: Sequence[nn.Module]) -> list[int] | None:
    """The input width of each column; None where a tile does not declare the one that it takes."""
    widths = [width for width in map(_declared_width, row) if width is not None]
    return widths if len(widths) == len(row) else None


def _declared_width(tile: nn.Module) -> int | None:
    """None for a tile that declares no width, or holds a shard of the width that it declares.

    Some tensor-parallel linears call the whole width `in_features` and take their local one.
    """
    width, weight = getattr(tile, "in_features", None), tile._parameters.get("weight")
    if not isinstance(width, int):
        return None
    held = weight.shape[1] if weight is not None and weight.dim() == 2 else 0
    return None if 0 < held < width and width % held == 0 else width


def check_tensor(name: str, value: object) -> Tensor:
    """The value, checked to be a tensor with at least one dimension."""
    if not isinstance(value, Tensor):
        raise TileDtypeError(
            f"{name}: the input is a {type(value).__name__}, it must be a tensor (…, in_features); "
            "a layer made with input_is_already_split=True takes a sequence of tensors"
        )
    if value.dim() == 0:
        raise TileShapeError(f"{name}: the input has no dimensions; it must be (…, in_features)")
    return value


def split_sizes(name: str, width: int, columns: int, declared: Sequence[int] | None) -> list[int]:
    """How an input of this width is cut into columns.

    Tiles that declare no width take what arrives: the local width of a tensor-parallel linear, say.
    """
    if declared is not None and width != sum(declared):
        raise TileShapeError(
            f"{name}: the input is {width} wide, the layer's in_features is {sum(declared)}; the "
            "last dimension of the input must be in_features"
        )
    if declared is not None:
        return list(declared)
    if width < columns:
        raise SplitsError(f"{name}: an input {width} wide cannot be cut into {columns} columns")
    bounds = partition_uniform(width, columns)
    return [stop - start for start, stop in pairwise(bounds)]


def check_chunks(
    name: str, chunks: Sequence[Tensor], columns: int, declared: Sequence[int] | None
) -> None:
    """Check an input that arrives split: number of chunks, their widths, their other dimensions."""
    if not isinstance(chunks, Sequence):
        raise TileDtypeError(
            f"{name}: the input is a {type(chunks).__name__}; a layer made with "
            "input_is_already_split=True takes a sequence of tensors"
        )
    if len(chunks) != columns:
        raise TileShapeError(
            f"{name}: the input has {len(chunks)} chunks, the layer {columns} in_splits"
        )
    for number, chunk in enumerate(chunks):
        check_tensor(f"{name}, chunk {number}", chunk)
        if declared is not None and chunk.shape[-1] != declared[number]:
            raise TileShapeError(
                f"{name}: chunk {number} is {chunk.shape[-1]} wide, its column {declared[number]}; "
                "cut the input at layer.in_parts"
            )
        if chunk.shape[:-1] != chunks[0].shape[:-1]:
            raise TileShapeError(
                f"{name}: chunk {number} is {tuple(chunk.shape)}, chunk 0 is "
                f"{tuple(chunks[0].shape)}; they must agree in all but the last dimension"
            )


def check_dtypes_and_devices(
    name: str, chunks: Sequence[object], weight: Tensor, *, same_device: bool = True
) -> None:
    """Check dtypes and devices against plain or parked tiles, after the casts of autocast."""
    for chunk in (chunk for chunk in chunks if isinstance(chunk, Tensor)):
        if same_device and chunk.device != weight.device:
            raise TileDeviceError(
                f"{name}: the input is on {chunk.device}, the tiles are on {weight.device}; "
                "move one of them"
            )
        needed = autocast_dtype(weight, chunk.device.type) or weight.dtype
        if (autocast_dtype(chunk) or chunk.dtype) != needed:
            raise TileDtypeError(
                f"{name}: the input is {chunk.dtype}, the tiles are {weight.dtype}; convert one of "
                "them, or run in float32 under torch.autocast"
            )


def check_width(
    name: str, index: tuple[int, int], tile: nn.Module, grid: Grid, result: Tensor
) -> None:
    """Check that a tile which holds all rows of its span returns them all.

    A narrower result is right only for a tensor-parallel shard, whose weight is narrower too.
    """
    weight, rows = tile._parameters.get("weight"), grid.out_spans[index[0]].size
    if type(weight) is not nn.Parameter or weight.dim() != 2 or weight.shape[0] != rows:
        return
    if result.shape[-1:] != (rows,):
        raise TileClassError(
            f"{name}: tile {index} returned shape {tuple(result.shape)}, its weight has {rows} "
            f"rows: the last dimension must be {rows}; correct the forward of linear_cls or a hook"
        )
