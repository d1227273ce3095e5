"""Checkpoints of one small layer, written in the forms that other layers and releases use."""

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from memtile import TiledLinear

State = dict[str, Any]


def dense_linear(seed: int = 1, **options: Any) -> nn.Linear:
    """The linear that a checkpoint was written from."""
    torch.manual_seed(seed)
    return nn.Linear(13, 11, **options)


def tiles_of(dense: nn.Linear, out_sizes: list[int], in_sizes: list[int]) -> State:
    """A tile checkpoint with the given spans, the bias of each row in its last column."""
    assert (sum(out_sizes), sum(in_sizes)) == (11, 13)
    state, last = {}, len(in_sizes) - 1
    rows = list(zip(out_sizes, accumulate(out_sizes, initial=0), strict=False))
    columns = list(zip(in_sizes, accumulate(in_sizes, initial=0), strict=False))
    for o, (height, top) in enumerate(rows):
        for i, (width, left) in enumerate(columns):
            tile = dense.weight[top : top + height, left : left + width]
            state[f"linears.{o}.{i}.weight"] = tile.detach().clone()
        state[f"linears.{o}.{last}.bias"] = dense.bias[top : top + height].detach().clone()
    return state


def assert_holds(layer: TiledLinear, dense: nn.Linear) -> None:
    """The layer's values are the linear's, bit for bit."""
    assert torch.equal(layer.weight, dense.weight)
    assert torch.equal(layer.bias, dense.bias)


def snapshot(module: nn.Module) -> list[Tensor]:
    """Copies of all parameters."""
    return [parameter.detach().clone() for parameter in module.parameters()]


def assert_unchanged(module: nn.Module, before: list[Tensor]) -> None:
    """Every parameter has the bits that it had."""
    assert all(torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))
