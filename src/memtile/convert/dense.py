"""`dense_state_dict`: dense names and tensors of a tiled model, one at a time."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from memtile.errors import CannotTileError
from memtile.layers import TiledModule, gathered


def dense_state_dict(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the checkpoint that the untiled model would have, in its order.

    An iterator that never holds more than one assembled tensor: write each before you take the
    next. Tensors of untiled modules are the model's own, not copies. Tied tensors come under every
    name that they have. Where an engine gathers parameters, each rank walks through all of it, and
    one tile at a time is gathered.

    Args:
        model: a model with tiled layers, or a tiled layer.
    """
    return dense_items(model, model.state_dict(keep_vars=True))


@torch.no_grad()
def dense_items(model: nn.Module, state_dict: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The items of a state dict of the model with the tiles of each layer joined under its name."""
    layers = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, TiledModule)
    }
    for name, layer in layers.items():
        check_stored(name, layer)
    given = set()
    for key, value in state_dict.items():
        found = _place_of(key, layers)
        if found is None:
            with gathered([value] if isinstance(value, nn.Parameter) else []):
                yield key, value.detach() if isinstance(value, Tensor) else value
        elif found not in given:
            given.add(found)
            layer_name, name = found
            layer = layers[layer_name]
            dense_name = f"{layer_name}.{name}" if layer_name else name
            yield dense_name, layer.assemble(name, _tiles_of(layer, layer_name, name, state_dict))


def check_stored(name: str, layer: TiledModule) -> None:
    """Refuses a layer whose tiles keep something else than their weight and bias."""
    for own in ("weight", "bias"):
        stored = layer.stored_parameters(own)
        computed = [index for index in layer.tile_parameters(own) if index not in stored]
        if computed:
            raise CannotTileError(
                f"{name or type(layer).__name__}: tile {computed[0]} computes its {own} (pruned, "
                "parametrized or adapted?), so no dense checkpoint says what the layer does; make "
                "that permanent first, or save layer.state_dict()"
            )


def _place_of(key: str, layers: Mapping[str, TiledModule]) -> tuple[str, str] | None:
    """(layer, "weight" or "bias") that a key is a tile of, or None."""
    parts = key.split(".")
    for length in range(len(parts)):
        name = ".".join(parts[:length])
        layer = layers.get(name)
        if layer is not None:
            match = layer.tile_pattern.fullmatch(".".join(parts[length:]))
            return (name, match["name"]) if match else None
    return None


def _tiles_of(
    layer: TiledModule, layer_name: str, name: str, state_dict: Mapping[str, Any]
) -> dict[tuple[int, int], Tensor]:
    prefix = f"{layer_name}." if layer_name else ""
    last = layer.grid.in_splits - 1
    return {
        index: state_dict[
            f"{prefix}{layer.tile_path(index[0], index[1] if name == 'weight' else last)}.{name}"
        ]
        for index in layer.tile_parameters(name)
    }
