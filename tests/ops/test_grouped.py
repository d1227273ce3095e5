"""The products of a tile that holds several matrices, and of rows that are grouped by matrix."""

import pytest
import torch
from torch import nn

from memtile import ops
from memtile.homes import HostHome, allocate_copy, allocation_of, register
from memtile.transfer import ParkedSource

COUNTS = [(5,), (0,), (2, 0, 3), (0, 4, 0), (1, 1, 1, 1)]
DEPTH, WIDTH = 4, 3


def case(counts, transposed, dtype=torch.float64):
    """Seeded x (N, K) and the tile of the matrices, (n·M, K), or (n·K, M) where transposed."""
    torch.manual_seed(7)
    rows = DEPTH if transposed else WIDTH
    x = torch.randn(sum(counts), DEPTH, dtype=dtype, requires_grad=True)
    tile = torch.randn(len(counts) * rows, WIDTH if transposed else DEPTH, dtype=dtype)
    return x, tile, ops.Groups(counts, transposed)


def expected(x, tile, groups):
    """Each group of rows with its matrix, in ordinary operations."""
    matrices = tile.view(len(groups.counts), -1, tile.shape[1])
    parts = x.split(groups.counts)
    turned = matrices if groups.is_transposed else matrices.mT
    return torch.cat([rows @ matrix for rows, matrix in zip(parts, turned, strict=True)])


def parked(tile):
    """The tile as a parameter in host memory."""
    copied = allocate_copy(HostHome(), tile)
    parameter = nn.Parameter(copied)
    register(parameter, allocation_of(copied))
    return parameter


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("counts", COUNTS)
def test_a_resident_tile_is_differentiated_rightly(counts, transposed):
    """Values and gradients, twice, of x and of the tile."""
    x, tile, groups = case(counts, transposed)
    tile.requires_grad_()

    def run(x, tile):
        return ops.grouped_linear(x, groups.matrices(tile), groups.counts)

    assert torch.allclose(run(x, tile), expected(x, tile, groups))
    if sum(counts):
        assert torch.autograd.gradcheck(run, (x, tile))
        assert torch.autograd.gradgradcheck(run, (x, tile))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("counts", COUNTS)
def test_a_parked_tile_is_differentiated_rightly(counts, transposed):
    """Values and gradients of x and of the tile; matrices without rows get zeros."""
    x, tile, groups = case(counts, transposed)
    weight = parked(tile)

    def run(x):
        return ops.parked_linear(x, weight, None, ParkedSource(weight), groups)

    y = run(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    reference = tile.clone().requires_grad_()
    again = x.detach().requires_grad_()
    expected(again, reference, groups).backward(grad)

    assert torch.allclose(y, expected(x, tile, groups))
    assert torch.allclose(x.grad, again.grad)
    assert torch.allclose(weight.grad, reference.grad)
    if sum(counts):
        assert torch.autograd.gradcheck(run, (x,))
        assert torch.autograd.gradgradcheck(run, (x,))


@pytest.mark.parametrize("transposed", [False, True])
def test_a_graph_of_the_gradient_has_the_parked_tile_in_it(transposed):
    """With `create_graph` the tile's gradient is given to autograd, and can be differentiated."""
    x, tile, groups = case((2, 0, 3), transposed)
    weight, resident = parked(tile), tile.clone().requires_grad_()
    products = (
        ops.parked_linear(x, weight, None, ParkedSource(weight), groups),
        expected(x, resident, groups),
    )
    second = []
    for y, parameter in zip(products, (weight, resident), strict=True):
        first = torch.autograd.grad(y.square().sum(), [x, parameter], create_graph=True)
        total = sum(gradient.square().sum() for gradient in first)
        second.append(torch.autograd.grad(total, [x, parameter]))

    for ours, theirs in zip(*second, strict=True):
        assert torch.allclose(ours, theirs)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parked_tile_is_as_accurate_as_plain_products(transposed, dtype):
    """Within twice the error of the same products in the same dtype."""
    torch.manual_seed(3)
    counts, depth, width = (301, 0, 17, 200), 129, 67
    x = torch.randn(sum(counts), depth, dtype=dtype)
    shape = (4 * depth, width) if transposed else (4 * width, depth)
    tile, groups = torch.randn(shape, dtype=dtype), ops.Groups(counts, transposed)
    weight, results = parked(tile), []
    for kind in ("parked", "plain", "truth"):
        exact = torch.float64 if kind == "truth" else dtype
        rows = x.detach().to(exact).requires_grad_()
        resident = tile.to(exact, copy=True).requires_grad_()
        if kind == "parked":
            y = ops.parked_linear(rows, weight, None, ParkedSource(weight), groups)
        else:
            y = expected(rows, resident, groups)
        y.square().mean().backward()
        held = weight if kind == "parked" else resident
        results.append([each.detach().double() for each in (y, rows.grad, held.grad)])

    for ours, plain, truth in zip(*results, strict=True):
        assert (ours - truth).norm() <= 2 * (plain - truth).norm()
