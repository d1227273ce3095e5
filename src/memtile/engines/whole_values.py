"""Whole tensors into shards: each rank takes its own piece, and nothing is sent."""

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def take_whole_values(tile: nn.Module) -> None:
    """Let a sharded tile load whole tensors, which are the same on each rank.

    torch's own state-dict functions cut each parameter once, under one name: a tied tile has two.
    """
    tile.register_load_state_dict_pre_hook(_cut)


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
