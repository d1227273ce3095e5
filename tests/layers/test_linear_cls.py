"""Tiles of other classes: tensor-parallel linears, linears that return their bias, any module."""

import functools
from typing import Any

import pytest
import torch
from paths import GRIDS, grid_id, pair, path_of
from torch import Tensor, nn
from torch.nn.functional import linear

from memtile import TiledLinear, TiledLinearReturnBias
from memtile.errors import SplitsError, TileClassError, TileShapeError


class ReturnsBias(nn.Linear):
    """Megatron's `skip_bias_add`: the bias comes beside the output."""

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        return linear(input, self.weight), self.bias


class RowParallel(nn.Module):
    """One of two shards of a linear that is cut along its input, declaring no width."""

    def __init__(self, input_size: int, output_size: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(output_size, input_size // 2))
        self.bias = nn.Parameter(torch.zeros(output_size)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class DeclaringRowParallel(RowParallel):
    """The same, calling the whole width its `in_features`, as fairscale's does."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.in_features, self.out_features = in_features, out_features


class ColumnParallel(nn.Linear):
    """One of two shards of a linear that is cut along its output."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features // 2, bias)


class Casting(nn.Linear):
    """Computes in float32 whatever its weight is kept in, and counts its calls."""

    calls = 0

    def forward(self, input: Tensor) -> Tensor:
        Casting.calls += 1
        weight, bias = (
            None if p is None else p.to(torch.float32) for p in (self.weight, self.bias)
        )
        return linear(input.to(torch.float32), weight, bias)


def returning_bias(grid: tuple[int, int], **options: Any) -> tuple[nn.Linear, Any]:
    """A float64 layer of tiles that return their bias, and the dense linear with its values."""
    dense, _ = pair((1, 1), dtype=torch.float64, bias=options.get("bias", True))
    layer = TiledLinearReturnBias(
        13,
        11,
        out_splits=grid[0],
        in_splits=grid[1],
        linear_cls=ReturnsBias,
        init_linear=dense,
        dtype=torch.float64,
        **options,
    )
    return dense, layer


@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
def test_another_class_is_called_as_the_module_that_it_is(grid):
    """Each tile's own forward runs, once for each call of the layer."""
    dense, _ = pair((1, 1))
    layer = TiledLinear(
        13, 11, out_splits=grid[0], in_splits=grid[1], linear_cls=Casting, init_linear=dense
    )
    x = torch.randn(4, 13, dtype=torch.float64)
    Casting.calls = 0

    output = layer(x)

    assert Casting.calls == grid[0] * grid[1]
    assert output.dtype == torch.float32
    assert all(type(tile) is Casting for _, tile in layer.tiles())


def test_keyword_arguments_go_to_the_class():
    """`**kwargs` arrive in every tile, beside the sizes and the bias by name."""
    seen = []

    def make(in_features: int, out_features: int, bias: bool, gather: str) -> nn.Linear:
        seen.append((in_features, out_features, bias, gather))
        return nn.Linear(in_features, out_features, bias)

    TiledLinear(5, 3, in_splits=2, linear_cls=make, gather="no")

    assert seen == [(3, 3, False, "no"), (2, 3, True, "no")]


@pytest.mark.parametrize("linear_cls", [RowParallel, DeclaringRowParallel])
@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
def test_a_row_parallel_linear_is_fed_its_local_width(grid, linear_cls):
    """The cut follows the width that arrives: each rank feeds half of `in_features`."""
    layer = TiledLinear(
        12, 11, bias=False, out_splits=grid[0], in_splits=grid[1], linear_cls=linear_cls
    )
    x = torch.randn(4, 6)

    output = layer(x)

    assert output.shape == (4, 11)
    torch.testing.assert_close(output, x.sum(-1, keepdim=True).expand(4, 11))


def test_an_input_too_narrow_to_be_cut_is_refused():
    """Tiles without a declared width still need one feature for each column."""
    layer = TiledLinear(12, 11, in_splits=3, linear_cls=RowParallel)

    with pytest.raises(SplitsError, match="an input 2 wide cannot be cut into 3 columns"):
        layer(torch.ones(4, 2))


@pytest.mark.parametrize("combine", [True, False])
@pytest.mark.parametrize("grid", [(1, 1), (2, 1), (1, 3), (2, 3)], ids=grid_id)
def test_a_column_parallel_linear_gives_its_local_width(grid, combine):
    """Every tile returns half of its span: the output is half of `out_features`."""
    torch.manual_seed(0)
    layer = TiledLinear(
        13,
        12,
        out_splits=grid[0],
        in_splits=grid[1],
        combine_out_splits=combine,
        linear_cls=ColumnParallel,
    )
    x = torch.randn(4, 13)

    output = layer(x)

    rows = [output] if combine else output
    expected = torch.cat(
        [
            sum(tile(x[:, layer.grid.in_spans[i].as_slice()]) for i, tile in enumerate(row))
            for row in layer.linears
        ],
        dim=-1,
    )
    assert sum(row.shape[-1] for row in rows) == 6
    torch.testing.assert_close(torch.cat(list(rows), dim=-1), expected)


def test_shards_that_do_not_divide_every_span_are_refused():
    """With uneven spans a shard of each would be rounded: the way out is another out_splits."""
    layer = TiledLinear(13, 14, out_splits=4, linear_cls=ColumnParallel)

    with pytest.raises(TileClassError, match="choose out_splits so that every span does"):
        layer(torch.randn(4, 13))


class Strided(nn.Linear):
    """Holds all its rows and returns every second one."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)[..., ::2]


@pytest.mark.parametrize("combine", [True, False])
@pytest.mark.parametrize("grid", [(1, 1), (2, 1), (1, 3), (2, 3)], ids=grid_id)
def test_a_narrower_result_of_a_whole_weight_is_no_shard(grid, combine):
    """Half a span from a tile that holds all of it is an error, not a tensor-parallel output."""
    layer = TiledLinear(
        13,
        12,
        out_splits=grid[0],
        in_splits=grid[1],
        combine_out_splits=combine,
        linear_cls=Strided,
    )

    with pytest.raises(TileClassError, match=r"tile \(0, 0\) returned shape .* weight has"):
        layer(torch.randn(4, 13))


class Permissive(nn.Module):
    """Pads or drops what does not fit, silently."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.ones(out_features, in_features))

    def forward(self, input: Tensor) -> Tensor:
        missing = self.in_features - input.shape[-1]
        return linear(nn.functional.pad(input, (0, missing)), self.weight)


@pytest.mark.parametrize("width", [3, 12, 14, 26])
@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
def test_a_wrong_width_is_refused_before_a_permissive_class_swallows_it(grid, width):
    """A class that would take any width is asked only for the one that it declares."""
    layer = TiledLinear(
        13, 11, bias=False, out_splits=grid[0], in_splits=grid[1], linear_cls=Permissive
    )

    with pytest.raises(TileShapeError, match=f"{width} wide, the layer's in_features is 13"):
        layer(torch.ones(4, width))

    assert layer(torch.ones(4, 13)).eq(13).all()


@pytest.mark.parametrize("linear_cls", [3, "Linear", None])
def test_a_linear_cls_that_cannot_be_called_is_refused(linear_cls):
    """The value is named, and what it should be."""
    with pytest.raises(TileClassError, match=f"linear_cls={linear_cls!r}.*class"):
        TiledLinear(13, 11, linear_cls=linear_cls)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
def test_returned_biases_are_joined_and_not_added(grid, bias):
    """(output, bias): outputs are summed; the biases of the rows make one, or None."""
    dense, layer = returning_bias(grid, bias=bias)
    x = torch.randn(2, 3, 13, dtype=torch.float64)

    output, returned = layer(x)

    torch.testing.assert_close(output, linear(x, dense.weight))
    assert returned is None if not bias else torch.equal(returned, dense.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
def test_uncombined_rows_come_with_their_own_bias(grid, bias):
    """`combine_out_splits=False` gives one (output, bias) for each row."""
    dense, layer = returning_bias(grid, bias=bias, combine_out_splits=False)
    x = torch.randn(4, 13, dtype=torch.float64)

    pairs = layer(x)

    assert isinstance(pairs, list)
    torch.testing.assert_close(torch.cat([y for y, _ in pairs], -1), linear(x, dense.weight))
    found = [b for _, b in pairs]
    assert found == [None] * grid[0] if not bias else torch.equal(torch.cat(found), dense.bias)


@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
def test_returned_biases_have_exact_gradients(grid):
    """gradcheck passes for output and bias together, and gradients reach every tile."""
    dense, layer = returning_bias(grid)
    x = torch.randn(3, 13, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(layer, (x,))
    output, bias = layer(x)
    (output.square().sum() + bias.square().sum()).backward()
    (linear(x, dense.weight).square().sum() + dense.bias.square().sum()).backward()
    torch.testing.assert_close(layer.weight.grad, dense.weight.grad)
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad)


def test_an_overridden_reduction_of_returned_biases_is_honoured():
    """The override hooks see pairs, as in the original; super() adds outputs and keeps the bias."""

    class Doubling(TiledLinearReturnBias):
        def _reduce_local_output(self, in_id, out_id, current_out, new_out):
            output, bias = new_out
            return super()._reduce_local_output(in_id, out_id, current_out, (2 * output, bias))

    dense, layer = returning_bias((3, 2))
    layer.__class__ = Doubling
    x = torch.randn(4, 13, dtype=torch.float64)

    output, bias = layer(x)

    torch.testing.assert_close(output, 2 * linear(x, dense.weight))
    assert torch.equal(bias, dense.bias)
    assert path_of(output) == "traceable"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("path", ["composed", "traceable"])
def test_sixteen_bit_pairs_are_summed_in_float32(dtype, path):
    """Ones in 300 columns: 16-bit sums would stop at 256 (bf16); the result is exact, in dtype."""

    class ByHooks(TiledLinearReturnBias):
        def _combine_output_splits(self, outputs):
            return super()._combine_output_splits(outputs)

    layer = TiledLinearReturnBias(300, 3, in_splits=300, linear_cls=ReturnsBias, dtype=dtype)
    layer.__class__ = ByHooks if path == "traceable" else TiledLinearReturnBias
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(1)

    output, bias = layer(torch.ones(2, 300, dtype=dtype))

    assert output.dtype == bias.dtype == dtype
    assert output.eq(300).all()


@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
def test_plain_tiles_in_a_layer_that_returns_biases_are_refused(grid):
    """`nn.Linear` adds its bias: TiledLinearReturnBias says which class it belongs in."""
    layer = TiledLinearReturnBias(13, 11, out_splits=grid[0], in_splits=grid[1])

    with pytest.raises(TileClassError, match=r"not \(output, bias\).*belongs in TiledLinear"):
        layer(torch.randn(4, 13))


@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
def test_returned_biases_in_a_layer_of_plain_sums_are_refused(grid):
    """A tuple where a tensor belongs names the class that takes it."""
    layer = TiledLinear(13, 11, out_splits=grid[0], in_splits=grid[1], linear_cls=ReturnsBias)

    with pytest.raises(TileClassError, match="belongs in TiledLinearReturnBias"):
        layer(torch.randn(4, 13))


def test_tiles_that_are_tiled_themselves_are_refused():
    """A tile of tiles has no values of its own to copy, load or hand over."""
    with pytest.raises(TileClassError, match="makes tiled layers"):
        TiledLinear(8, 8, out_splits=2, linear_cls=functools.partial(TiledLinear, in_splits=2))


def test_results_of_different_dtypes_are_refused():
    """One output has one dtype: nothing is rounded silently."""
    layer = TiledLinear(8, 8, out_splits=2)
    layer.tile(1, 0).register_forward_hook(lambda tile, args, output: output.double())

    with pytest.raises(TileClassError, match=r"returned torch.float64, tile"):
        layer(torch.randn(2, 8))


class FirstColumnsBias(nn.Linear):
    """Returns a bias from the first tile that is made, and None from the others."""

    made = 0

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.number = FirstColumnsBias.made
        FirstColumnsBias.made += 1

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        bias = input.new_full((self.out_features,), 7.0) if self.number % 3 == 0 else None
        return super().forward(input), bias


@pytest.mark.parametrize("path", ["composed", "traceable"])
def test_a_bias_that_an_earlier_column_returned_is_kept(path):
    """A later column's None does not take it away, as in the original."""

    class ByHooks(TiledLinearReturnBias):
        def _combine_output_splits(self, outputs):
            return super()._combine_output_splits(outputs)

    FirstColumnsBias.made = 0
    layer = TiledLinearReturnBias(13, 11, in_splits=3, out_splits=2, linear_cls=FirstColumnsBias)
    layer.__class__ = ByHooks if path == "traceable" else TiledLinearReturnBias

    _, bias = layer(torch.randn(4, 13))

    assert bias.tolist() == [7.0] * 11
