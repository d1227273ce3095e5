"""`dense_state_dict`: dense names and tensors of a tiled model, one at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memtile.convert.kinds import tiled_layers
from memtile.errors import ArgumentError, CannotTileError
from memtile.layers import TiledModule, gathered


def dense_state_dict(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the checkpoint that the untiled model would have, in its order.

    An iterator that never holds more than one assembled tensor: write each before you take the
    next. Tensors of untiled modules are the model's own, not copies. Tied tensors come under every
    name that they have. Where an engine gathers parameters, each rank iterates over all of it, and
    one tile at a time is gathered.

    Args:
        model: a model with tiled layers, or a tiled layer.

    Raises:
        ArgumentError: the model is none.

    Examples:
        >>> [name for name, _ in memtile.dense_state_dict(memtile.TiledLinear(6, 9, out_splits=4))]
        ['weight', 'bias']
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"the model is a {type(model).__name__}; it must be an nn.Module")
    return dense_items(model, model.state_dict(keep_vars=True))


@torch.no_grad()
def dense_items(model: nn.Module, state_dict: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The items of a state dict of the model with the tiles of each layer joined under its name."""
    place_of = _places(model)
    given = set()
    for key, value in state_dict.items():
        place = place_of.get(key)
        if place is None:
            with gathered([value] if isinstance(value, nn.Parameter) else []):
                yield key, value.detach() if isinstance(value, Tensor) else value
        elif place.dense_name not in given:
            given.add(place.dense_name)
            tiles = {index: state_dict[tile] for index, tile in place.keys.items()}
            yield place.dense_name, place.layer.assemble(place.own, tiles)


def check_stored(name: str, layer: TiledModule) -> None:
    """Refuse a layer whose tiles keep something else than their weight and bias."""
    for own in ("weight", "bias"):
        stored = layer.stored_parameters(own)
        computed = [index for index in layer.tile_parameters(own) if index not in stored]
        if computed:
            raise CannotTileError(
                f"{name or type(layer).__name__}: tile {computed[0]} computes its {own} (pruned, "
                "parametrized or adapted?), so no dense checkpoint says what the layer does; make "
                "that permanent first, or save layer.state_dict()"
            )


@dataclass(frozen=True)
class _Tiles:
    """The tiles of one dense tensor: its name, its layer, "weight" or "bias", their keys."""

    dense_name: str
    layer: TiledModule
    own: str
    keys: Mapping[tuple[int, int], str]


def _places(model: nn.Module) -> dict[str, _Tiles]:
    """By the key of a tile in the state dict, what it belongs to; each layer is checked."""
    found: dict[str, _Tiles] = {}
    for name, layer in tiled_layers(model, all_names=True):
        check_stored(name, layer)
        prefix = f"{name}." if name else ""
        for own in ("weight", "bias") if layer.whole_bias is None else ("weight",):
            indices = layer.tile_parameters(own)
            keys = {index: prefix + layer.parameter_path(own, index) for index in indices}
            tiles = _Tiles(layer.dense_name(name, own), layer, own, keys)
            found.update(dict.fromkeys(keys.values(), tiles))
    return found
