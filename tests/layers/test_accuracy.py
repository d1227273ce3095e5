"""Accuracy against float64: no grid and no path has a larger error than the dense layer.

At most 1.1 × `nn.Linear`'s own rms error in float32, 1.5 × in 16 bits, where √2 is the floor: each
column's product is rounded once to 16 bits before it is added in float32 (or joined, from 256
tokens on: `tests/ops/test_joined.py`).
"""

import copy
from dataclasses import dataclass

import pytest
import torch
from paths import PATHS, dense_gradients, grid_id, on_path, path_of
from torch import Tensor, nn

from memtile import TiledLinear
from memtile.testing import assert_as_accurate

FACTORS = {torch.float32: 1.1, torch.bfloat16: 1.5, torch.float16: 1.5}
QUANTITIES = ("output", "input gradient", "weight gradient", "bias gradient")
TOKENS, IN_FEATURES, OUT_FEATURES = 67, 389, 515  # 26k inputs, 34k outputs, none of them round

# (out_splits, in_splits), ragged in both dimensions wherever there is more than one.
FINEST = pytest.param((64, 64), marks=pytest.mark.slow)
GRIDS = [(1, 1), (1, 7), (7, 1), (5, 3), (16, 16), (64, 1), (1, 32), FINEST]
EXTREME = [(1, 64), (1, 128), (128, 1)]


@dataclass(frozen=True)
class Problem:
    """One layer and one step in a dtype: what the dense layer gives, and what is true."""

    linear: nn.Linear
    x: Tensor
    gradient: Tensor
    dense: list[Tensor]
    truth: list[Tensor]


@pytest.fixture(scope="module", params=FACTORS, ids=str)
def problem(request) -> Problem:
    """The same weights, input and output gradient for every grid of a dtype."""
    torch.manual_seed(0)
    linear = nn.Linear(IN_FEATURES, OUT_FEATURES).to(request.param)
    x = torch.randn(TOKENS, IN_FEATURES).to(request.param)
    gradient = torch.randn(TOKENS, OUT_FEATURES).to(request.param)
    exact = copy.deepcopy(linear).double()
    return Problem(
        linear,
        x,
        gradient,
        quantities(linear, x, gradient),
        quantities(exact, x.double(), gradient.double()),
    )


def quantities(layer: nn.Linear | TiledLinear, x: Tensor, gradient: Tensor) -> list[Tensor]:
    """The output, and the gradients of input, weight and bias in their dense shapes."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    output = layer(x)
    if isinstance(output, list):
        torch.autograd.backward(output, gradient.split([row.shape[-1] for row in output], -1))
        output = torch.cat(output, dim=-1)
    else:
        output.backward(gradient)
    if isinstance(layer, TiledLinear):
        return [output.detach(), x.grad, *dense_gradients(layer)]
    return [output.detach(), x.grad, layer.weight.grad, layer.bias.grad]


def assert_accurate(problem: Problem, layer: TiledLinear) -> None:
    """Every quantity is within the factor of its dtype."""
    ours = quantities(layer, problem.x, problem.gradient)
    for name, value, dense, truth in zip(
        QUANTITIES, ours, problem.dense, problem.truth, strict=True
    ):
        try:
            assert_as_accurate(value, dense, truth, FACTORS[problem.x.dtype])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
def test_every_path_over_every_grid_is_as_accurate_as_the_dense_layer(problem, grid, path):
    """Output, input, weight and bias gradient: 1.1 × in float32, 1.5 × in 16 bits, up to 64×64."""
    layer = on_path(
        path, TiledLinear.from_linear(problem.linear, out_splits=grid[0], in_splits=grid[1])
    )

    assert_accurate(problem, layer)
    assert grid == (1, 1) or path_of(layer(problem.x)) == path


@pytest.mark.parametrize("grid", EXTREME, ids=grid_id)
def test_the_fused_path_is_as_accurate_when_tiles_are_slivers(problem, grid):
    """Tiles of a few rows or columns, whose products alone are worse than wide ones, are no worse.

    The composed path cannot promise it: there a sliver's product is its own module's.
    """
    layer = TiledLinear.from_linear(problem.linear, out_splits=grid[0], in_splits=grid[1])

    assert path_of(layer(problem.x)) == "fused"
    assert_accurate(problem, layer)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("grid", [(1, 7), (7, 1), (5, 3)], ids=grid_id)
def test_rows_that_are_not_combined_are_as_accurate(problem, grid, path):
    """A list of rows holds the same values as the one output."""
    tiled = TiledLinear.from_linear(
        problem.linear, out_splits=grid[0], in_splits=grid[1], combine_out_splits=False
    )

    assert_accurate(problem, on_path(path, tiled))


def test_a_step_with_many_tokens_is_as_accurate(problem):
    """The weight gradient sums over tokens, in the fused path of narrow tiles too."""
    torch.manual_seed(1)
    dtype, factor = problem.x.dtype, FACTORS[problem.x.dtype]
    linear = nn.Linear(131, 127).to(dtype)
    x, gradient = torch.randn(2048, 131).to(dtype), torch.randn(2048, 127).to(dtype)
    dense = quantities(linear, x, gradient)
    truth = quantities(copy.deepcopy(linear).double(), x.double(), gradient.double())

    ours = quantities(TiledLinear.from_linear(linear, out_splits=16, in_splits=19), x, gradient)

    for value, one, true in zip(ours[:3], dense[:3], truth[:3], strict=True):
        assert_as_accurate(value, one, true, factor)
