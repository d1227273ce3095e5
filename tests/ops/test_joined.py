"""Products of 16-bit tiles that are joined first, a block at a time."""

import pytest
import torch
from paths import grid_id
from torch import Tensor, nn

from memtile.geometry import Grid
from memtile.ops import FusedSpec, fused_linear, joined
from memtile.ops.joined import multiply_joined, worth_joining
from memtile.testing import assert_as_accurate, peak_allocated_bytes

SIXTEEN_BITS = [torch.bfloat16, torch.float16]
GRIDS = [(1, 1), (1, 7), (7, 1), (5, 3)]
TOKENS, IN_FEATURES, OUT_FEATURES = 259, 389, 515  # tokens enough to be joined; none is round


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    """Several blocks, and several groups of terms, in a small weight."""
    monkeypatch.setattr(joined, "WIDE", 128)
    monkeypatch.setattr(joined, "JOINED_TERMS", 128)


def tiles_of(weight: Tensor, grid: Grid) -> list[Tensor]:
    """The tiles of a dense weight, each with memory of its own, row by row."""
    return [weight[grid.rect(*index).index].clone() for index in grid.indices()]


def integers(*shape: int, dtype: torch.dtype) -> Tensor:
    """-1, 0 or 1, mostly 0: sums of products of a few hundred are exact in 16 bits."""
    return torch.randint(-4, 5, shape).div(4, rounding_mode="trunc").to(dtype)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("form", ["whole", "no bias", "split", "rows", "frozen", "frozen input"])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
def test_output_and_gradients_are_exact_in_every_form_of_the_call(grid, dtype, form):
    """Whole numbers: the result of the dense layer in float64, bit for bit, over any grid."""
    torch.manual_seed(0)
    cut = Grid.uniform(OUT_FEATURES, IN_FEATURES, *grid)
    spec = FusedSpec(
        cut, cut.in_splits if form == "split" else 1, form != "rows", form != "no bias"
    )
    x, weight = integers(7, 37, IN_FEATURES, dtype=dtype), integers(515, 389, dtype=dtype)
    bias, g = integers(515, dtype=dtype), integers(7, 37, OUT_FEATURES, dtype=dtype)
    dense_x, dense_weight, dense_bias = (t.double().requires_grad_() for t in (x, weight, bias))
    truth = nn.functional.linear(dense_x, dense_weight, dense_bias if spec.has_bias else None)
    truth.backward(g.double())
    tiles = [tile.requires_grad_(form != "frozen") for tile in tiles_of(weight, cut)]
    biases = [part.clone() for part in bias.split([s.size for s in cut.out_spans])]
    chunks = x.split([s.size for s in cut.in_spans], -1) if spec.chunks > 1 else [x]
    inputs = [chunk.clone().requires_grad_(form != "frozen input") for chunk in chunks]

    result = fused_linear(spec, inputs, tiles, biases if spec.has_bias else [])
    y = result if isinstance(result, Tensor) else torch.cat(result, dim=-1)
    y.backward(g)

    assert torch.equal(y.double(), truth)
    if form != "frozen input":
        assert torch.equal(torch.cat([i.grad for i in inputs], -1).double(), dense_x.grad)
    if form != "frozen":
        for tile, true in zip(tiles, tiles_of(dense_weight.grad, cut), strict=True):
            assert torch.equal(tile.grad.double(), true)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
def test_the_error_is_the_dense_products(grid, dtype, transposed):
    """Nothing is rounded between tiles: 1.1 × the dense error, where sums of tiles have √2."""
    torch.manual_seed(0)
    cut = Grid.uniform(OUT_FEATURES, IN_FEATURES, *grid)
    weight = torch.randn(OUT_FEATURES, IN_FEATURES).to(dtype)
    factor = weight.t() if transposed else weight
    a = torch.randn(TOKENS, factor.shape[0]).to(dtype)

    result = multiply_joined(a, cut, tiles_of(weight, cut), transposed=transposed)

    assert_as_accurate(result, a @ factor, a.double() @ factor.double(), 1.1)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_groups_of_terms_are_summed_in_float32(dtype, transposed):
    """Each group is rounded once, the sum once: 1.5 × the dense error."""
    torch.manual_seed(0)
    cut = Grid.uniform(OUT_FEATURES, IN_FEATURES, 5, 3)
    weight = torch.randn(OUT_FEATURES, IN_FEATURES).to(dtype)
    factor = weight.t() if transposed else weight
    a = torch.randn(TOKENS, factor.shape[0]).to(dtype)

    result = multiply_joined(a, cut, tiles_of(weight, cut), transposed=transposed)

    assert_as_accurate(result, a @ factor, a.double() @ factor.double(), 1.5)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("transposed", [True, False])
def test_only_one_block_of_the_weight_is_copied(transposed):
    """The peak is the result, a block's sums and scratch, and twice the constants' product."""
    torch.manual_seed(0)
    cut = Grid.uniform(2048, 2048, 8, 8)
    weight = torch.randn(2048, 2048).to(torch.bfloat16)
    tiles, a = tiles_of(weight, cut), torch.randn(16, 2048).to(torch.bfloat16)
    whole = weight.numel() * weight.itemsize

    peak = peak_allocated_bytes(lambda: multiply_joined(a, cut, tiles, transposed=transposed))

    assert peak < whole / 8


@pytest.mark.parametrize(
    ("tokens", "dtype", "grid", "forward", "backward"),
    [
        (512, torch.bfloat16, (4, 4), True, True),  # tiles of 2048×512: few terms, narrow
        (512, torch.float16, (4, 4), True, True),
        (512, torch.float32, (4, 4), False, False),
        (255, torch.bfloat16, (4, 4), False, False),
        (512, torch.bfloat16, (4, 1), False, False),  # no sum; more terms than twice the tokens
        (1024, torch.bfloat16, (4, 1), False, True),
        (512, torch.bfloat16, (16, 1), True, True),  # narrow tiles in one column
    ],
    ids=str,
)
def test_tiles_are_joined_where_copies_cost_less_than_sums(tokens, dtype, grid, forward, backward):
    """16 bits, 256 tokens and more, and tiles that are narrow or have at most 2 terms a token."""
    cut = Grid.uniform(8192, 2048, *grid)
    x, g = (torch.empty(tokens, width, dtype=dtype) for width in (2048, 8192))

    assert worth_joining(x, cut, transposed=True) is forward
    assert worth_joining(g, cut, transposed=False) is backward
