"""Wrong arguments and inputs: a clear error that is also a builtin, and the layer works on."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memtile import TiledEmbedding, TiledLinear, TiledLinearReturnBias, partition_uniform
from memtile.errors import (
    MemtileError,
    SplitsError,
    TileClassError,
    TileDeviceError,
    TileDtypeError,
    TileShapeError,
)


@pytest.mark.parametrize("name", ["in_splits", "out_splits"])
@pytest.mark.parametrize("value", [0, -1, 11, 1.5, "2", None, True])
def test_a_wrong_number_of_splits_names_value_bound_and_rule(name: str, value: Any) -> None:
    """The error is the original's RuntimeError and a ValueError, and says what would do."""
    with pytest.raises(SplitsError, match=re.escape(f"{name}={value!r}")) as caught:
        TiledLinear(10, 10, **{name: value})

    assert isinstance(caught.value, RuntimeError)
    assert isinstance(caught.value, ValueError)
    assert "10" in str(caught.value)


@pytest.mark.parametrize("name", ["in_features", "out_features"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "13", None, True])
def test_a_wrong_number_of_features_names_value_and_rule(name: str, value: Any) -> None:
    """Features are whole numbers from 1, in the layer as in the grid."""
    sizes = {"in_features": 13, "out_features": 11, name: value}

    with pytest.raises(SplitsError, match=re.escape(f"{name}={value!r}")):
        TiledLinear(**sizes)


def test_partition_uniform_refuses_no_parts_and_negative_items() -> None:
    """There is no way to cut into no parts."""
    for items, parts in ((10, 0), (10, -1), (-1, 2)):
        with pytest.raises(SplitsError, match=f"num_items={items}, num_parts={parts}"):
            partition_uniform(items, parts)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("grid", [(1, 1), (3, 1), (1, 4), (3, 4)])
@pytest.mark.parametrize("width", [0, 9, 11, 20])
def test_a_wrong_width_names_both_widths(width: int, grid: tuple[int, int], hooked: bool) -> None:
    """Every grid and every path refuses another width than in_features, and then works on."""
    layer = TiledLinear(10, 7, out_splits=grid[0], in_splits=grid[1])
    if hooked:
        layer.tile(0, 0).register_forward_hook(lambda *_: None)

    with pytest.raises(TileShapeError, match=f"the input is {width} wide.*in_features is 10"):
        layer(torch.randn(2, width))

    assert layer(torch.randn(2, 10)).shape == (2, 7)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (torch.tensor(1.0), TileShapeError),
        ([torch.randn(2, 5), torch.randn(2, 5)], TileDtypeError),
        (None, TileDtypeError),
        ([[1.0] * 10], TileDtypeError),
        (torch.ones(2, 10, dtype=torch.long), TileDtypeError),
        (torch.ones(2, 10, dtype=torch.float64), TileDtypeError),
        (torch.ones(2, 10, dtype=torch.bfloat16), TileDtypeError),
        (torch.ones(2, 10, device="meta"), TileDeviceError),
    ],
)
@pytest.mark.parametrize("grid", [(1, 1), (2, 3)])
def test_an_input_of_the_wrong_kind_is_refused(
    grid: tuple[int, int], value: Any, error: type[MemtileError]
) -> None:
    """No rank, no tensor, another dtype, another device: each by its own error with a way out."""
    layer = TiledLinear(10, 7, out_splits=grid[0], in_splits=grid[1])

    with pytest.raises(error, match="TiledLinear: the input"):
        layer(value)

    assert layer(torch.randn(2, 10)).shape == (2, 7)


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([(2, 5)], "1 chunks, the layer 3 in_splits"),
        ([(2, 4), (2, 3), (2, 3), (2, 1)], "4 chunks"),
        ([(2, 4), (2, 4), (2, 2)], "chunk 1 is 4 wide, its column 3"),
        ([(2, 4), (3, 3), (2, 3)], "chunk 1 is"),
        ([(2, 4), (1, 2, 3), (2, 3)], "chunk 1 is"),
    ],
)
def test_a_split_input_with_wrong_chunks_is_refused(
    chunks: list[tuple[int, ...]], message: str
) -> None:
    """Number, widths and other dimensions of the chunks are checked before any tile works."""
    layer = TiledLinear(10, 7, in_splits=3, input_is_already_split=True)

    with pytest.raises(TileShapeError, match=message):
        layer([torch.randn(*chunk) for chunk in chunks])

    assert layer([torch.randn(2, 4), torch.randn(2, 3), torch.randn(2, 3)]).shape == (2, 7)


def test_a_whole_tensor_for_a_layer_that_takes_chunks_is_refused() -> None:
    """A tensor would otherwise be iterated along its first dimension, silently."""
    layer = TiledLinear(10, 7, in_splits=3, input_is_already_split=True)

    with pytest.raises(TileShapeError, match="takes a sequence of chunks"):
        layer(torch.randn(3, 10))


def test_a_chunk_that_is_no_tensor_is_refused() -> None:
    """Each chunk is checked by itself."""
    layer = TiledLinear(4, 7, in_splits=2, input_is_already_split=True)

    for wrong in ([torch.randn(1, 2), None], 7):
        with pytest.raises(TileDtypeError, match="TiledLinear"):
            layer(wrong)


class IgnoresBias(nn.Linear):
    """Takes bias=False and has one all the same."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=True)


def test_a_class_that_ignores_bias_false_is_refused() -> None:
    """Its bias would be added once for each column."""
    with pytest.raises(TileClassError, match="asked for bias=False and made a bias"):
        TiledLinear(10, 7, in_splits=2, linear_cls=IgnoresBias)


def test_a_class_that_makes_no_module_is_refused() -> None:
    """A tile must be an nn.Module."""
    with pytest.raises(TileClassError, match=r"must make an nn.Module"):
        TiledLinear(10, 7, linear_cls=lambda *_, **__: "tile")  # type: ignore[arg-type,return-value]


class Wrong(nn.Linear):
    """Returns one feature too many, from its second tile on."""

    made = 0

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        Wrong.made += 1
        self.number = Wrong.made

    def forward(self, input: Tensor) -> Tensor:
        """The output, and for later tiles a column of ones."""
        out = super().forward(input)
        if self.number == 1:
            return out
        return torch.cat([out, out.new_ones(*out.shape[:-1], 1)], dim=-1)


@pytest.mark.parametrize("grid", [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("combine", [True, False])
def test_a_tile_that_returns_another_shape_is_refused(grid: tuple[int, int], combine: bool) -> None:
    """A result of the wrong width is named by its tile, and nothing is broadcast."""
    Wrong.made = 0
    layer = TiledLinear(
        10, 7, in_splits=grid[1], out_splits=grid[0], combine_out_splits=combine, linear_cls=Wrong
    )

    with pytest.raises(TileClassError, match=r"tile \(\d, \d\) returned"):
        layer(torch.randn(3, 10))


class Scalar(nn.Linear):
    """Returns the mean of its output."""

    def forward(self, input: Tensor) -> Tensor:
        """A number without dimensions."""
        return super().forward(input).mean()


class Pair(nn.Linear):
    """Returns output and bias, as Megatron's linears do."""

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """The product, and the bias beside it."""
        return nn.functional.linear(input, self.weight), self.bias


def test_results_that_are_no_row_of_the_output_are_refused() -> None:
    """A number, a tuple where a tensor belongs, a tensor where a pair belongs."""
    x = torch.randn(3, 10)

    with pytest.raises(TileClassError, match=r"tile \(0, 0\) returned shape \(\)"):
        TiledLinear(10, 7, out_splits=2, linear_cls=Scalar)(x)
    with pytest.raises(TileClassError, match="belongs in TiledLinearReturnBias"):
        TiledLinear(10, 7, out_splits=2, linear_cls=Pair)(x)
    with pytest.raises(TileClassError, match="belongs in TiledLinear"):
        TiledLinearReturnBias(10, 7, out_splits=2)(x)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Linear(10, 8), r"its weight is \(8, 10\), this layer's \(7, 10\)"),
        (nn.Linear(7, 10), r"its weight is \(10, 7\)"),
        (nn.Linear(10, 7, bias=False), "its bias is missing"),
        (nn.ReLU(), "its weight is missing"),
        (nn.Linear(10, 7, device="meta"), "its weight is on the meta device"),
    ],
)
def test_copying_from_another_shape_is_refused_and_copies_nothing(
    other: nn.Module, message: str
) -> None:
    """Both parameters are checked before the first is written."""
    layer = TiledLinear(10, 7, out_splits=2, in_splits=3)
    before = [parameter.clone() for parameter in layer.parameters()]

    with pytest.raises((TileShapeError, TileDeviceError), match=message):
        layer.copy_params_from(other)

    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), before, strict=True))


def test_a_bias_that_this_layer_lacks_is_refused() -> None:
    """Its bias would be lost."""
    with pytest.raises(TileShapeError, match="this layer's missing"):
        TiledLinear(10, 7, bias=False, init_linear=nn.Linear(10, 7))


def test_an_exception_in_a_tile_leaves_the_layer_usable() -> None:
    """After a tile failed half-way, weights and gradients are what they were."""
    layer = TiledLinear(10, 7, out_splits=3)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    handle = layer.tile(1, 0).register_forward_hook(fail)
    x = torch.randn(2, 10)
    with pytest.raises(KeyboardInterrupt):
        layer(x)
    handle.remove()
    layer(x).sum().backward()

    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_sharing_tiles_needs_one_grid() -> None:
    """Different grids have different tiles."""
    with pytest.raises(TileShapeError, match="make both with the same splits"):
        TiledLinear(6, 11, out_splits=2).share_tiles_with(TiledEmbedding(11, 6, out_splits=3))


def test_copying_into_a_tile_that_computes_its_weight_is_refused() -> None:
    """The copy would be lost at the next forward: nothing is copied, and the tile is named."""
    layer = TiledLinear(10, 7, out_splits=2, in_splits=3)
    nn.utils.parametrizations.weight_norm(layer.tile(1, 2))
    before = [parameter.clone() for parameter in layer.parameters()]

    with pytest.raises(TileClassError, match=r"tile \(1, 2\) computes its weight"):
        layer.copy_params_from(nn.Linear(10, 7))

    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), before, strict=True))


def test_a_wrong_dtype_is_refused_in_subclasses_of_the_hooks_too() -> None:
    """Overriding how results are combined changes nothing about what may come in."""

    class Listing(TiledLinear):
        def _combine_output_splits(self, outputs: Any) -> Any:
            return list(outputs)

    with pytest.raises(TileDtypeError, match=r"Listing: the input is torch\.float64"):
        Listing(10, 7, out_splits=2)(torch.ones(2, 10, dtype=torch.float64))
