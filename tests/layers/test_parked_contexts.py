"""Parked tiles under autocast and compilers."""

import copy

import pytest
import torch
from leftovers import check_nothing_is_left
from parked_layers import (
    HOMES,
    assert_same_bits,
    gradients_of,
    parked_form,
    small_model,
)
from paths import GRIDS, grid_id
from torch import Tensor, nn

import memtile
from memtile import TiledLinear
from memtile.homes import DiskHome
from memtile.testing import assert_as_accurate

nothing_is_left = pytest.fixture(autouse=True)(check_nothing_is_left)
in_every_grid = pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
ALL = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def batch(*lead: int, seed: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    """An input that requires grad."""
    generator = torch.Generator().manual_seed(seed)
    lead = lead or (5,)
    return torch.randn(*lead, 13, generator=generator, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("grid", [(1, 1), (1, 3), (9, 1), (9, 4)], ids=grid_id)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_never_served_another_tile_from_its_cache(grid, dtype):
    """Many tiles of one shape use the same slab, and each is cast again."""
    torch.manual_seed(0)
    dense = nn.Linear(36, 45)
    results = []
    for home in HOMES:
        layer = parked_form(dense, grid, home)
        x = torch.randn(20, 36, generator=torch.Generator().manual_seed(1), requires_grad=True)
        with torch.autocast("cpu", dtype):
            layer(x)
            y = layer(x)
            y.float().square().sum().backward()
        assert y.dtype == dtype
        assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
        results.append({"y": y.detach(), "x": x.grad, **gradients_of(layer)})

    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])
    truth = dense(x).detach()
    error = (results[2]["y"].double() - truth).norm() / truth.norm()
    assert error <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("grid", [(1, 1), (1, 3), (9, 1), (9, 4)], ids=grid_id)
def test_autocast_is_as_accurate_as_with_resident_tiles(grid):
    """Against ordinary resident tiles of the same grid, error against error in float64."""
    torch.manual_seed(0)
    dense = nn.Linear(130, 135)
    resident = TiledLinear.from_linear(dense, out_splits=grid[0], in_splits=grid[1])
    layer, truth = parked_form(dense, grid), copy.deepcopy(dense).double()
    x, results = torch.randn(140, 130), []
    for module in (layer, resident):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = module(given)
        y.float().square().sum().backward()
        results.append((y, given.grad, module.weight.grad + 0))
    given = x.double().requires_grad_()
    y = truth(given)
    y.square().sum().backward()

    for ours, theirs, exact in zip(*results, (y, given.grad, truth.weight.grad), strict=True):
        assert_as_accurate(ours, theirs, exact, 1.2)


@in_every_grid
def test_compiled_models_are_right_and_fresh(grid):
    """torch.compile of a parked model: values, gradients, and writes between two calls."""
    torch._dynamo.reset()
    model = small_model()
    parked = memtile.tile(
        copy.deepcopy(model), out_splits=grid[0], in_splits=grid[1], home=DiskHome()
    )
    compiled = torch.compile(parked, backend="eager")
    for _ in range(2):
        x = batch(dtype=torch.float32)
        y, truth = compiled(x), model(x)
        torch.testing.assert_close(y, truth)
        for module, out in ((parked, y), (model, truth)):
            module.zero_grad()
            out.square().sum().backward()
        torch.testing.assert_close(parked[0].weight.grad + 0, model[0].weight.grad)
        with torch.no_grad():
            for p in [*parked.parameters(), *model.parameters()]:
                p.mul_(1.5)
    torch._dynamo.reset()
