"""Layers and models with parked tiles, and the resident ones that they must agree with."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

import memtile
from memtile import TiledLinear
from memtile.geometry import Grid
from memtile.homes import DiskHome, Home

HOMES = ["device", "host", "disk"]
WIDE = (13, 29)  # (in, out), ragged in every grid


def home_called(name: str) -> Home | str:
    """A home to give to `tile` or to a layer."""
    return DiskHome() if name == "disk" else name


def parked_pair(
    grid: tuple[int, int],
    home: str = "disk",
    shape: tuple[int, int] = WIDE,
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    seed: int = 0,
) -> tuple[nn.Linear, TiledLinear]:
    """A seeded dense linear of shape (in, out), and its tiled form with parked tiles."""
    torch.manual_seed(seed)
    dense = nn.Linear(*shape, bias=bias, dtype=dtype)
    return dense, parked_form(dense, grid, home)


def parked_form(dense: nn.Linear, grid: tuple[int, int], home: str = "disk") -> TiledLinear:
    """The linear's tiled form with parked tiles."""
    cut = Grid.uniform(dense.out_features, dense.in_features, *grid)
    found = memtile.homes.resolve_home(home_called(home), "cpu")
    return TiledLinear.from_dense(dense, cut, home=found)


def small_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two ragged linears with a bend between them."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(13, 29), nn.Tanh(), nn.Linear(29, 7)).to(dtype)


def resident_and_parked(
    home: str = "disk", out_splits: int = 3, in_splits: int = 1, seed: int = 0
) -> tuple[Any, Any]:
    """The same tiled model twice: with resident tiles by the same code, and parked."""
    model = small_model(seed)
    sizes: dict[str, Any] = {"out_splits": out_splits, "in_splits": in_splits}
    resident = memtile.tile(copy.deepcopy(model), **sizes, home="device")
    return resident, memtile.tile(model, **sizes, home=home_called(home))


def weights_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parked parameters by their names."""
    return {
        n: p for n, p in module.named_parameters() if memtile.homes.allocation_of(p) is not None
    }


def gradients_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Copies of all gradients by the parameters' names."""
    return {n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()}


def assert_same_bits(ours: Any, theirs: Any) -> None:
    """Tensors, or dictionaries of them, are equal bit for bit."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert_same_bits(ours[name], theirs[name])
    elif ours is None or theirs is None:
        assert ours is theirs
    else:
        assert torch.equal(ours, theirs)
