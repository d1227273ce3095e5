"""`save_pretrained` of models with tiles writes dense checkpoints.

Methods are replaced on the class, not on a model: a model may be put around tiled layers later, or
copied. Models without tiles call the class's own method.
"""

import copy
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from torch import nn

from memtile.convert import dense_items, empty_model, save_checkpoint, tiled_layers
from memtile.costmodel.byte_sizes import parse_byte_size
from memtile.errors import CannotTileError
from memtile.layers import TiledModule

_MARK = "_knows_tiles"
_SHARD_BYTES = 50_000_000_000  # what transformers writes into one file
_TAKEN_OVER = ("hf_quantizer", "hf_device_map", "_hf_peft_config_loaded", "_tp_size")


def save_pretrained(
    original: Callable[..., Any],
    model: Any,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Write the folder of a tiled transformers model, tile by tile where that is possible.

    Where transformers gets options or a state dict (with names of tiles, as a trainer passes it),
    or the class saves in its own way, the dense weights are in memory while it writes them.
    `original` is transformers' own method.
    """
    if _own_tiles(model):
        return original(model, save_directory, is_main_process, state_dict, *args, **kwargs)
    if kwargs.get("distributed_checkpoint"):
        raise CannotTileError(
            "distributed_checkpoint=True writes the names of tiles, which no plain model has; "
            "memtile.save_checkpoint(model, folder), called by each rank, "
            "writes the dense checkpoint"
        )
    if (
        is_main_process
        and state_dict is None
        and not args
        and kwargs.keys() <= {"max_shard_size"}
        and _writes_plain_weights(model)
        and not Path(save_directory).is_file()
    ):
        size = kwargs.get("max_shard_size", _SHARD_BYTES)
        shard_bytes = parse_byte_size(size, "max_shard_size") if isinstance(size, str) else size
        return save_checkpoint(model, save_directory, max_shard_bytes=shard_bytes)
    if not is_main_process and state_dict is None:  # over ranks; it writes no weights
        return original(model, save_directory, is_main_process, {}, *args, **kwargs)
    tiles = model.state_dict() if state_dict is None else state_dict
    dense: dict[str, Any] = {}
    known: dict[tuple[Any, ...], Any] = {}
    for name, tensor in dense_items(model, tiles):
        key = _tile_storages(model, name) or (id(tensor),)
        dense[name] = known.setdefault(key, tensor)
    return original(model, save_directory, is_main_process, dense, *args, **kwargs)


def _own_tiles(model: Any) -> set[str]:
    """Names of tiled layers that the model's class makes itself: its checkpoints have tiles.

    CannotTileError where it cannot be known, or only some tiled layers are such.
    """
    layers = dict(tiled_layers(model))
    made = [name for name, layer in layers.items() if not layer.stands_for_dense]
    if not made or not hasattr(model, "config"):
        return set()
    try:
        second = empty_model(lambda: type(model)(copy.deepcopy(model.config)))
    except Exception as error:  # whatever a constructor raises
        raise CannotTileError(
            f"{made[0]} was made as a tiled layer, and whether {type(model).__name__} makes it, or "
            f"someone put it there, cannot be known: no second one can be made of its config "
            f"({error}); save with memtile.save_checkpoint(model, folder), which is dense"
        ) from error
    theirs = dict(tiled_layers(second))
    own = {name for name in made if name in theirs}
    if own and len(own) < len(layers):
        other = next(name for name in layers if name not in own)
        raise CannotTileError(
            f"{type(model).__name__} makes {min(own)} in tiles, and {other} was tiled later: no "
            "checkpoint has the names of both; save with memtile.save_checkpoint(model, folder), "
            "which is dense"
        )
    return own


def _writes_plain_weights(model: Any) -> bool:
    """Whether transformers would write what `save_checkpoint` does."""
    base = loaded_class("transformers.modeling_utils", "PreTrainedModel")
    return (
        type(model).save_pretrained is base.save_pretrained
        and not model.is_remote_code()
        and not any(getattr(model, name, None) for name in _TAKEN_OVER)
    )


def _tile_storages(model: nn.Module, name: str) -> tuple[Any, ...]:
    """The identities of a tiled weight's tiles: equal for tied weights."""
    parent, _, own = name.rpartition(".")
    try:
        layer = model.get_submodule(parent)
    except AttributeError:
        return ()
    if not isinstance(layer, TiledModule):
        return ()
    return (own, layer.weight_is_transposed, *(id(p) for p in layer.tile_parameters(own).values()))


def loaded_class(module: str, name: str) -> Any:
    """A class of an optional package, for isinstance; () where the module is not loaded."""
    return getattr(sys.modules.get(module), name, ())


def _has_tiles(model: nn.Module, *args: object, **kwargs: object) -> bool:
    return any(True for _ in tiled_layers(model))


def with_tiles(
    cls: Any, name: str, act: Callable[..., Any], applies: Callable[..., bool] = _has_tiles
) -> None:
    """Replace a method by `act(own_method, model, …)` for models with tiles; once for each class.

    `applies` tells from the method's own arguments whether tiles are concerned. CannotTileError
    where the class's own method is running at this moment: it ignores tiles.
    """
    original = getattr(cls, name)
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def method(model: nn.Module, *args: Any, **kwargs: Any) -> Any:  # as the class's own
        if not applies(model, *args, **kwargs):
            return original(model, *args, **kwargs)
        return act(original, model, *args, **kwargs)

    setattr(method, _MARK, True)
    setattr(cls, name, method)
    if _is_running(getattr(original, "__code__", None)):
        raise CannotTileError(
            f"{cls.__name__}.{name} was loaded after the tiles were made, and has begun without "
            "knowing them: call it again"
        )


def _is_running(code: object) -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None
