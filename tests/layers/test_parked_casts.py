"""Casts of parked tiles: they stay at home, in another dtype."""

import pytest
import torch
from parked_layers import (
    HOMES,
    assert_same_bits,
    gradients_of,
    parked_pair,
    resident_and_parked,
    weights_of,
)
from paths import GRIDS, grid_id
from torch import Tensor, nn

import memtile
from memtile import TiledLinear
from memtile.errors import HomeFullError, OptimizerError
from memtile.homes import DiskHome
from memtile.testing import LargestAllocation

in_every_grid = pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
in_every_home = pytest.mark.parametrize("home", HOMES)
X = torch.randn(5, 13, generator=torch.Generator().manual_seed(3))


def state(module: nn.Module) -> dict[str, Tensor]:
    """Copies of everything that the module holds."""
    return {name: value.clone() for name, value in module.state_dict().items()}


@in_every_home
@in_every_grid
@pytest.mark.parametrize("cast", ["half", "double", "bfloat16"])
def test_a_cast_leaves_tiles_at_home_with_the_dense_values(home, grid, cast):
    """Weight, bias and gradients are the dense layer's after the cast; the parameters stay."""
    dense, layer = parked_pair(grid, home, dtype=torch.float32)
    layer.tile(0, 0).weight.requires_grad_(False)
    parameters, trained = list(layer.parameters()), [p.requires_grad for p in layer.parameters()]
    for module in (dense, layer):
        module(torch.randn(5, 13, generator=torch.Generator().manual_seed(1))).sum().backward()
    gradients = gradients_of(layer)

    getattr(dense, cast)(), getattr(layer, cast)()

    assert len(weights_of(layer)) == len(dict(layer.tiles()))
    assert all(a is b for a, b in zip(parameters, layer.parameters(), strict=True))
    assert [p.requires_grad for p in parameters] == trained
    assert torch.equal(layer.weight, dense.weight)
    assert layer.weight.dtype == dense.weight.dtype == layer.bias.dtype
    for name, gradient in gradients_of(layer).items():
        before = gradients[name]
        assert_same_bits(gradient, None if before is None else before.to(layer.weight.dtype))
    x = torch.ones(2, 13, dtype=dense.weight.dtype)
    assert layer(x).dtype == x.dtype


def test_a_cast_keeps_ties_and_hooks():
    """A tile in two places is cast once, and stays one parameter."""
    _, parked = resident_and_parked("disk")
    other = TiledLinear.from_dense(
        nn.Linear(13, 29, bias=False, device="meta"), parked[0].grid, tied_to=parked[0]
    )
    model, seen = nn.ModuleList([parked[0], other]), []
    tile = parked[0].tile(0, 0)
    tile.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.dtype))

    model.double()
    parked[0](X.double()).sum().backward()

    assert other.tile(0, 0).weight is tile.weight
    assert seen == [torch.float64]


def test_a_cast_frees_the_old_room_tile_by_tile():
    """The file grows once, for the first tile, however often the model is cast to and fro."""
    home = DiskHome()
    model = memtile.tile(nn.Sequential(nn.Linear(1024, 512)), out_splits=8, home=home)
    before = home._file.size

    for dtype in (torch.bfloat16, torch.float16) * 8:
        model.to(dtype)

    assert home._file.size <= 2 * before


def test_a_cast_brings_one_tile_into_memory():
    """Nothing larger than one tile in its new dtype is allocated."""
    model = memtile.tile(nn.Sequential(nn.Linear(64, 512)), out_splits=8, home="disk")

    with LargestAllocation() as largest:
        model.double()

    assert largest.nbytes <= 64 * 64 * 8


def test_a_cast_without_room_changes_nothing(monkeypatch):
    """A full home: the tile keeps its dtype, values and gradient, and the layer works."""
    _, layer = parked_pair((1, 1), "disk", dtype=torch.float32)
    layer(torch.ones(2, 13)).sum().backward()
    before, rooms = state(layer), [1]
    home = layer.tile(0, 0).home
    allocate = home.allocate

    def full(*given):
        if not rooms:
            raise HomeFullError("full")
        rooms.pop()
        return allocate(*given)

    monkeypatch.setattr(home, "allocate", full)
    with pytest.raises(HomeFullError):
        layer.double()

    assert_same_bits(state(layer), before)
    assert layer.tile(0, 0).weight.grad.dtype == torch.float32


@pytest.mark.parametrize("mode", ["classic", "in_backward"])
def test_an_optimizer_of_before_the_cast_is_refused(mode):
    """Its state and its room are of the old dtype."""
    _, parked = resident_and_parked("disk")
    optimizer = memtile.TileOptimizer(parked, torch.optim.AdamW, mode=mode)
    parked.double()

    def step() -> None:
        parked(X.double()).sum().backward()
        optimizer.step()

    with pytest.raises(OptimizerError, match="cast the model first"):
        step()
