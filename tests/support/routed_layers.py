"""A layer of experts whose tiles are one weight, the dense layer it stands for, and their loop."""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from memtile import DiskHome, TiledLinear, TileOptimizer
from memtile.homes import Home, allocation_of, is_parked
from memtile.layers.parked import ParkedLinear

EXPERTS, OUT, WIDTH = 5, 3, 7


class Experts(TiledLinear):
    """(E · O, K) as E tiles, of which a call uses some."""

    is_routed = True

    def __init__(self, **options: Any) -> None:
        super().__init__(WIDTH, EXPERTS * OUT, bias=False, out_splits=EXPERTS, **options)

    def forward(self, x: Tensor, experts: Iterable[int]) -> Tensor:
        """The sum of what these experts give."""
        return sum((self.tile(expert, 0)(x) for expert in experts), x.new_zeros(len(x), OUT))


class DenseExperts(nn.Module):
    """The same with one weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor, experts: Iterable[int]) -> Tensor:
        """The sum of what these experts give."""
        shares = self.weight.view(EXPERTS, OUT, WIDTH)
        return sum((x @ shares[expert].t() for expert in experts), x.new_zeros(len(x), OUT))
