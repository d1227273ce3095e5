"""`save_pretrained` of a tiled transformers model: the dense checkpoint, for plain transformers."""

import sys
import weakref
from pathlib import Path
from typing import Any

from torch import nn

from memtile.convert import dense_items, save_checkpoint
from memtile.layers import TiledModule
from memtile.planning.byte_sizes import parse_byte_size

_SHARD_BYTES = 50_000_000_000  # what transformers writes into one file
_TAKEN_OVER = ("hf_quantizer", "hf_device_map", "_hf_peft_config_loaded", "_tp_size")


class DensePretrained:
    """`save_pretrained` of a tiled model: the dense checkpoint, for plain transformers.

    It stands on the instance, where it may not hold the model: a cycle would keep all weights until
    the garbage collector runs. Copies and pickles of a model get one of their own.

    Args:
        model: a `PreTrainedModel` with tiled layers.
    """

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)

    def __reduce__(self) -> tuple[Any, ...]:
        return DensePretrained, (self._model(),)

    def __call__(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Write the folder, tile by tile where the names in it are the model's own.

        Where transformers renames or joins weights on saving, and with options or a state dict that
        are for it to obey, the dense weights exist for as long as it writes them.

        Args:
            save_directory: the folder.
            is_main_process: passed on to transformers.
            state_dict: tile names and others, as a trainer passes it; the model's own by default.
            *args: passed on to transformers.
            **kwargs: passed on to transformers.

        Raises:
            CannotTileError: a tile computes its weight, so that no dense checkpoint can say it.
        """
        model = self._model()
        assert model is not None  # who calls a method holds its model
        if (
            is_main_process
            and state_dict is None
            and not args
            and kwargs.keys() <= {"max_shard_size"}
            and _is_saved_as_it_is(model)
            and not Path(save_directory).is_file()
        ):
            size = kwargs.get("max_shard_size", _SHARD_BYTES)
            shard_bytes = parse_byte_size(size, "max_shard_size") if isinstance(size, str) else size
            return save_checkpoint(model, save_directory, max_shard_bytes=shard_bytes)
        tiles = model.state_dict() if state_dict is None else state_dict
        dense: dict[str, Any] = {}
        known: dict[tuple[Any, ...], Any] = {}
        for name, tensor in dense_items(model, tiles):
            key = _tile_storages(model, name) or (id(tensor),)
            dense[name] = known.setdefault(key, tensor)
        save = type(model).save_pretrained
        return save(model, save_directory, is_main_process, dense, *args, **kwargs)


def _is_saved_as_it_is(model: Any) -> bool:
    """Whether transformers would write the model's own names and values, and its configs."""
    base = sys.modules["transformers.modeling_utils"].PreTrainedModel
    mapping = sys.modules.get("transformers.conversion_mapping")
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None and mapping is not None:
        conversions = mapping.get_model_conversion_mapping(model, add_legacy=False)
    return (
        conversions is not None
        and not conversions
        and type(model).save_pretrained is base.save_pretrained
        and not model._keys_to_ignore_on_save
        and not model.is_remote_code()
        and not any(getattr(model, name, None) for name in _TAKEN_OVER)
    )


def _tile_storages(model: nn.Module, name: str) -> tuple[Any, ...]:
    """What tells a tied tiled weight from another: the identities of its tiles."""
    parent, _, own = name.rpartition(".")
    try:
        layer = model.get_submodule(parent)
    except AttributeError:
        return ()
    if not isinstance(layer, TiledModule):
        return ()
    return (own, layer.weight_is_transposed, *(id(p) for p in layer.tile_parameters(own).values()))
