"""Whole tensors into shards: each rank takes its own piece, and nothing is sent."""

from collections import defaultdict
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from memtile.engines.ties import SharedTile
from memtile.layers import TiledModule


def take_whole_values(tile: nn.Module) -> None:
    """Let a sharded tile load whole tensors, which are the same on each rank.

    torch's own state-dict functions cut each parameter once, under one name: a tied tile has two.
    """
    tile.register_load_state_dict_pre_hook(_cut)


def take_ties_once(model: nn.Module) -> None:
    """Let a sharded model load tied tiles that come under one of their names.

    `set_model_state_dict` with `broadcast_from_rank0` sends each module's values under one name: a
    rank raised for the others, and rank 0 waited for it.
    """
    places: dict[int, list[_Place]] = defaultdict(list)
    for name, layer in model.named_modules(remove_duplicate=False):
        for index, tile in layer.tiles() if isinstance(layer, TiledModule) else ():
            if isinstance(tile, SharedTile):
                for own, parameter in tile.named_parameters():
                    place = _Place(f"{name}.{layer.tile_path(*index)}.{own}", f"{name}.{own}")
                    places[id(parameter)].append(place)

    def fill_in(
        _: nn.Module,
        state_dict: dict[str, Any],
        prefix: str,
        *__: object,  # what else torch passes
    ) -> None:
        for tied in places.values():
            _fill_in(state_dict, prefix, tied)

    model.register_load_state_dict_pre_hook(fill_in)


class _Place(NamedTuple):
    """Names of a tied tile's parameter: its own, and that of the dense one."""

    name: str
    dense: str


def _fill_in(state_dict: dict[str, Any], prefix: str, tied: list[_Place]) -> None:
    given = [state_dict[prefix + p.name] for p in tied if prefix + p.name in state_dict]
    for place in tied:
        if given and prefix + place.dense not in state_dict:
            state_dict.setdefault(prefix + place.name, given[0])


def _cut(
    tile: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    *_: object,  # what else torch passes
) -> None:
    parameters: dict[str, Any] = tile._parameters  # a DTensor is a Parameter by its metaclass only
    for name, parameter in parameters.items():
        value = state_dict.get(prefix + name)
        if isinstance(parameter, DTensor) and isinstance(value, Tensor):
            state_dict[prefix + name] = _shards_like(value, parameter)


def _shards_like(value: Tensor, parameter: DTensor) -> Tensor:
    if isinstance(value, DTensor) or value.shape != parameter.shape:
        return value  # torch says what does not fit
    mesh, placements = parameter.device_mesh, parameter.placements
    whole = value.to(parameter.device)
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)
