"""Starting values: `nn.Linear`'s distribution for the whole layer, whatever the grid."""

import math

import pytest
import torch
from paths import grid_id
from torch import nn

from memtile import TiledLinear
from memtile.errors import TileClassError
from memtile.testing import LargestAllocation

IN_FEATURES, OUT_FEATURES = 515, 389  # 200k weights: their standard deviation is known to 0.2 %
BOUND = 1 / math.sqrt(IN_FEATURES)  # of both distributions, which are uniform


@pytest.mark.parametrize("again", [False, True], ids=["made", "reset"])
@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (3, 1), (1, 64), (7, 16)], ids=grid_id)
def test_weights_are_distributed_as_those_of_the_dense_layer(grid, again):
    """Uniform in ±1/√in_features of the whole layer: 4, 16, 64 columns or uneven spans alike."""
    torch.manual_seed(0)
    layer = TiledLinear(IN_FEATURES, OUT_FEATURES, out_splits=grid[0], in_splits=grid[1])
    if again:
        layer.reset_parameters()

    weight, bias = layer.weight.detach(), layer.bias.detach()
    assert abs(weight.std().item() / (BOUND / math.sqrt(3)) - 1) < 0.01
    assert abs(weight.mean().item()) < 5 * BOUND / math.sqrt(3 * weight.numel())
    for values in (weight, bias):
        assert values.abs().max() <= BOUND
        assert values.abs().max() > 0.98 * BOUND


def test_each_tile_has_the_same_distribution_however_uneven_the_spans():
    """No tile uses its own fan-in: all have the deviation of the whole layer."""
    torch.manual_seed(0)
    layer = TiledLinear(IN_FEATURES, OUT_FEATURES, out_splits=4, in_splits=7)

    for _, tile in layer.tiles():
        assert abs(tile.weight.std().item() / (BOUND / math.sqrt(3)) - 1) < 0.03


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("out_splits", [1, 2, 7])
def test_row_tiles_have_the_bits_of_a_linear_made_from_the_same_seed(out_splits, bias):
    """Weights are drawn row by row, then the bias: the dense layer's own order."""
    torch.manual_seed(3)
    dense = nn.Linear(13, 11, bias=bias)
    after_dense = torch.rand(1)
    torch.manual_seed(3)
    layer = TiledLinear(13, 11, bias=bias, out_splits=out_splits)
    after_layer = torch.rand(1)

    assert torch.equal(layer.weight, dense.weight)
    assert bias is False or torch.equal(layer.bias, dense.bias)
    assert torch.equal(after_layer, after_dense)


def test_reset_parameters_draws_new_values_in_place():
    """The tiles stay, their values change, and a seed gives the same values again."""
    layer = TiledLinear(13, 11, in_splits=3, out_splits=2)
    tiles, before = list(layer.parameters()), layer.weight.clone()
    torch.manual_seed(5)
    layer.reset_parameters()
    first = layer.weight.clone()
    torch.manual_seed(5)
    layer.reset_parameters()

    assert torch.equal(layer.weight, first)
    assert not torch.equal(first, before)
    assert all(one is other for one, other in zip(tiles, layer.parameters(), strict=True))


@pytest.mark.parametrize("grid", [(1, 1), (3, 2)], ids=grid_id)
def test_no_values_are_drawn_that_init_linear_overwrites(grid):
    """With `init_linear` the random state is untouched; the original draws every tile first."""
    dense = nn.Linear(13, 11)
    before = torch.get_rng_state()

    TiledLinear(13, 11, out_splits=grid[0], in_splits=grid[1], init_linear=dense)
    TiledLinear.from_linear(dense, out_splits=grid[0], in_splits=grid[1])

    assert torch.equal(torch.get_rng_state(), before)


def test_no_full_size_temporary_is_made():
    """Making and resetting allocate no piece above the largest tile."""
    with LargestAllocation() as largest:
        layer = TiledLinear(259, 515, in_splits=3, out_splits=4)
        layer.reset_parameters()

    assert largest.nbytes == max(4 * p.numel() for p in layer.parameters())


def test_a_class_with_starting_values_of_its_own_keeps_them():
    """Only plain linears are drawn for the whole layer; a `linear_cls` resets its own tiles."""

    class Ones(nn.Linear):
        def reset_parameters(self) -> None:
            nn.init.ones_(self.weight)

    layer = TiledLinear(13, 11, bias=False, in_splits=2, out_splits=2, linear_cls=Ones)
    made = layer.weight.clone()
    with torch.no_grad():
        for tile in layer.parameters():
            tile.zero_()
    layer.reset_parameters()

    assert made.eq(1).all()
    assert layer.weight.eq(1).all()


def test_a_subclass_that_keeps_the_linears_starting_values_gets_the_whole_layers():
    """A `linear_cls` derived from `nn.Linear` is drawn as the dense layer would be."""

    class Named(nn.Linear):
        pass

    torch.manual_seed(0)
    layer = TiledLinear(515, 389, in_splits=16, linear_cls=Named)

    assert abs(layer.weight.std().item() / (BOUND / math.sqrt(3)) - 1) < 0.01


def test_tiles_that_cannot_reset_themselves_are_refused_by_name():
    """A `linear_cls` without `reset_parameters` is told what it lacks."""

    class Fixed(nn.Module):
        def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(out_features, in_features))

    layer = TiledLinear(13, 11, bias=False, in_splits=2, linear_cls=Fixed)

    with pytest.raises(TileClassError, match=r"Fixed has no reset_parameters\(\)"):
        layer.reset_parameters()


def test_a_parametrized_tile_is_not_reset_silently():
    """A weight that is computed cannot be drawn: refused with the tile's place, nothing changed."""
    layer = TiledLinear(13, 11, in_splits=2, out_splits=2)
    nn.utils.parametrizations.weight_norm(layer.tile(1, 0))
    before = [p.clone() for p in layer.parameters()]

    with pytest.raises(TileClassError, match=r"tile \(1, 0\).*computes its weight"):
        layer.reset_parameters()

    assert all(torch.equal(p, old) for p, old in zip(layer.parameters(), before, strict=True))
