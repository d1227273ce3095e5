"""Twins of a model on the meta device: its modules and its buffers, none of its weights."""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from memtile.convert import Choice, replace_chosen
from memtile.homes import DeviceHome, is_parked, register
from memtile.layers import ParkedModule


def meta_twin(model: nn.Module) -> nn.Module:
    """A copy whose parameters are on the meta device, tied as they are; buffers are shared."""
    memo: dict[int, object] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        meta = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(meta, parameter.requires_grad)
    return copy.deepcopy(model, memo)


def park_twin(twin: nn.Module, choices: Sequence[Choice]) -> nn.Module:
    """Tile a twin in place; its tiles are parked in a home that holds nothing."""
    home = DeviceHome("meta")
    replace_chosen(twin, choices, home)
    for module in twin.modules():
        weight = module._parameters.get("weight") if isinstance(module, ParkedModule) else None
        if weight is not None and not is_parked(weight):
            register(weight, home.berth(weight.shape, weight.dtype))
    return twin
