"""The contract: code written for the original tiled linear works once its import is changed."""

import inspect

import pytest
import torch
from paths import GRIDS, PATHS, grid_id, nodes_of, on_path, pair, path_of
from torch import nn

import memtile
from memtile import (
    TiledEmbedding,
    TiledLinear,
    TiledLinearReturnBias,
    partition_uniform,
    split_tensor_along_last_dim,
)
from memtile.errors import TileShapeError

FORMS = [{}, {"input_is_already_split": True}, {"combine_out_splits": False}]


class ReturnsBias(nn.Linear):
    """Megatron's `skip_bias_add`: the bias comes beside the output."""

    def forward(self, input):
        """The product, and the bias."""
        return nn.functional.linear(input, self.weight), self.bias


def given(layer: TiledLinear, x: torch.Tensor) -> object:
    """The input in the form that the layer takes."""
    return x.split(column_sizes(layer), -1) if layer.input_is_already_split else x


def column_sizes(layer: TiledLinear) -> list[int]:
    """The widths of the columns of tiles."""
    return [span.size for span in layer.grid.in_spans]


def joined(output: object) -> torch.Tensor:
    """The output as one tensor."""
    return output if isinstance(output, torch.Tensor) else torch.cat(output, dim=-1)


def test_the_constructor_has_the_names_the_order_and_the_defaults_of_the_original():
    """Positional calls written for the original mean the same here."""
    parameters = inspect.signature(TiledLinear).parameters

    assert [(name, p.default) for name, p in parameters.items()] == [
        ("in_features", inspect.Parameter.empty),
        ("out_features", inspect.Parameter.empty),
        ("bias", True),
        ("in_splits", 1),
        ("out_splits", 1),
        ("input_is_already_split", False),
        ("combine_out_splits", True),
        ("linear_cls", nn.Linear),
        ("init_linear", None),
        ("kwargs", inspect.Parameter.empty),
    ]
    assert parameters["kwargs"].kind is inspect.Parameter.VAR_KEYWORD


def test_a_call_with_every_argument_by_position_does_what_the_original_does():
    """All nine positional arguments arrive where the original put them."""
    dense, _ = pair((1, 1))

    layer = TiledLinear(13, 11, True, 2, 3, True, False, nn.Linear, dense)

    assert (layer.in_splits, layer.out_splits) == (2, 3)
    assert layer.input_is_already_split is True
    assert layer.combine_out_splits is False
    assert torch.equal(layer.weight, dense.weight)


def test_the_names_of_the_original_are_exported():
    """What is imported from the original's module is imported from here."""
    for name in (
        "TiledLinear",
        "TiledLinearReturnBias",
        "partition_uniform",
        "split_tensor_along_last_dim",
    ):
        assert hasattr(memtile, name)
    assert partition_uniform(10, 4) == [0, 3, 6, 8, 10]
    assert [c.shape[-1] for c in split_tensor_along_last_dim(torch.ones(2, 5), [2, 3])] == [2, 3]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
def test_tiles_stand_in_linears_with_the_bias_in_the_last_column(grid, bias):
    """`linears[o][i]` is the tile (o, i); each row's bias belongs to its last tile only."""
    layer = TiledLinear(13, 11, bias=bias, out_splits=grid[0], in_splits=grid[1])

    assert isinstance(layer.linears, nn.ModuleList)
    assert all(isinstance(row, nn.ModuleList) for row in layer.linears)
    for o, row in enumerate(layer.linears):
        for i, tile in enumerate(row):
            assert type(tile) is nn.Linear
            assert tile.weight.shape == layer.grid.rect(o, i).shape
            assert (tile.bias is not None) == (bias and i == grid[1] - 1)


@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
def test_the_attributes_of_the_original_are_there(grid):
    """Sizes, splits, bounds as lists, and the two flags."""
    layer = TiledLinear(13, 11, out_splits=grid[0], in_splits=grid[1])

    assert (layer.in_features, layer.out_features, layer.use_bias) == (13, 11, True)
    assert (layer.out_splits, layer.in_splits) == grid
    assert layer.in_parts == partition_uniform(13, grid[1])
    assert layer.out_parts == partition_uniform(11, grid[0])
    assert layer.input_is_already_split is False
    assert layer.combine_out_splits is True


def test_state_dict_names_are_those_of_the_tiles():
    """`linears.{o}.{i}.weight` and `.bias`, nothing dense, whatever was read before."""
    layer = TiledLinear(13, 11, in_splits=2, out_splits=2)
    assert layer.weight.shape == (11, 13)

    assert sorted(layer.state_dict()) == [
        "linears.0.0.weight",
        "linears.0.1.bias",
        "linears.0.1.weight",
        "linears.1.0.weight",
        "linears.1.1.bias",
        "linears.1.1.weight",
    ]
    assert sorted(name for name, _ in layer.named_parameters()) == sorted(layer.state_dict())


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
def test_the_output_is_the_dense_one_in_every_form_of_the_call(grid, path, form):
    """One tensor or chunks in, one tensor or a list of rows out: the values of `nn.Linear`."""
    dense, tiled = pair(grid, dtype=torch.float64, **form)
    layer = on_path(path, tiled)
    x = torch.randn(2, 3, 13, dtype=torch.float64)

    output = layer(given(layer, x))

    assert isinstance(output, torch.Tensor) == layer.combine_out_splits
    if not layer.combine_out_splits:
        assert isinstance(output, list)
        assert [row.shape for row in output] == [(2, 3, span.size) for span in layer.grid.out_spans]
    torch.testing.assert_close(joined(output), dense(x))  # float64: 1e-7 relative


@pytest.mark.parametrize("name", ["input", "input_"])
@pytest.mark.parametrize("path", PATHS)
def test_the_input_has_the_linears_name_and_the_originals(path, name):
    """`layer(input=x)`, as any caller of `nn.Linear` may write, and `layer(input_=x)`."""
    dense, tiled = pair((3, 2), dtype=torch.float64)
    x = torch.randn(4, 13, dtype=torch.float64)

    torch.testing.assert_close(on_path(path, tiled)(**{name: x}), dense(x))


def test_other_layers_take_their_input_by_its_name_too():
    """Tiles that return their bias, parked tiles, embeddings."""
    x, ids = torch.randn(4, 13), torch.tensor([3, 0, 10])
    parked, embedding = TiledLinear(13, 11, out_splits=3, home="host"), TiledEmbedding(11, 3)
    returning = TiledLinearReturnBias(13, 11, linear_cls=ReturnsBias)

    for layer in (parked, parked.tile(0, 0)):
        assert torch.equal(layer(input=x), layer(x))
    assert torch.equal(parked(input_=x), parked(x))
    assert torch.equal(returning(input=x)[0], returning(input_=x)[0])
    assert torch.equal(embedding(input=ids), embedding(ids))


def test_an_input_given_twice_or_not_at_all_is_a_type_error():
    """As for any function of Python."""
    layer, x = TiledLinear(13, 11, out_splits=3), torch.randn(4, 13)

    with pytest.raises(TypeError, match=r"TiledLinear\.forward\(\) got multiple values.*'input'"):
        layer(x, input=x)
    with pytest.raises(TypeError, match="multiple values"):
        layer(input_=x, input=x)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'input'"):
        layer()


def test_a_split_input_may_be_any_sequence_also_of_one_chunk():
    """Lists and tuples of chunks; with `in_splits=1` a list of one, which the original fails on."""
    for in_splits in (1, 2):
        dense, layer = pair((2, in_splits), dtype=torch.float64, input_is_already_split=True)
        x = torch.randn(3, 13, dtype=torch.float64)
        chunks = x.split(column_sizes(layer), -1)

        assert torch.equal(layer(list(chunks)), layer(tuple(chunks)))
        torch.testing.assert_close(layer(list(chunks)), dense(x))


def test_a_layer_of_one_tile_costs_what_a_linear_costs():
    """(1, 1) gives the linear's bits and adds no node to the graph, in 16 bits too."""
    for dtype in (torch.float32, torch.bfloat16):
        dense, layer = pair((1, 1), dtype=dtype)
        x = torch.randn(5, 13, dtype=dtype, requires_grad=True)

        assert torch.equal(layer(x), dense(x))
        assert nodes_of(layer(x)) == nodes_of(dense(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", [(1, 3), (4, 1), (3, 2), (4, 4)], ids=grid_id)
def test_a_fused_layer_is_one_node_of_the_graph(grid, dtype):
    """However many tiles: one node, where the original has three or more for each."""
    _, layer = pair(grid, dtype=dtype)

    output = layer(torch.randn(5, 13, dtype=dtype, requires_grad=True))

    assert nodes_of(output) == ["_FusedLinearBackward"]


@pytest.mark.parametrize("grid", [(1, 3), (4, 1), (3, 2), (4, 4)], ids=grid_id)
def test_a_composed_layer_adds_one_node_for_each_tile_to_the_tiles_own(grid):
    """Each result is written by one node; there is no clone, no sum and no cat."""
    _, layer = pair(grid)
    layer = on_path("composed", layer)

    names = nodes_of(layer(torch.randn(5, 13)))

    tiles = grid[0] * grid[1]
    assert names.count("_PlaceBackward") == tiles
    assert not {name.rstrip("0123456789") for name in names} & {
        "CloneBackward",
        "AddBackward",
        "CatBackward",
    }


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
def test_copy_params_from_copies_a_linear_of_the_same_shape(grid, bias):
    """Bit for bit, without a graph, into the tiles that are there."""
    dense, _ = pair((1, 1), bias=bias)
    layer = TiledLinear(13, 11, bias=bias, out_splits=grid[0], in_splits=grid[1])
    tiles = list(layer.parameters())

    layer.copy_params_from(dense)

    assert torch.equal(layer.weight, dense.weight)
    assert layer.bias is None if not bias else torch.equal(layer.bias, dense.bias)
    assert all(one is other for one, other in zip(tiles, layer.parameters(), strict=True))
    assert all(tile.requires_grad and tile.is_leaf for tile in tiles)


def test_copy_params_from_takes_a_tiled_layer_of_any_grid():
    """Values go from grid to grid, whatever the two splits are."""
    _, source = pair((4, 3))
    layer = TiledLinear(13, 11, out_splits=3, in_splits=2)

    layer.copy_params_from(source)

    assert torch.equal(layer.weight, source.weight)
    assert torch.equal(layer.bias, source.bias)


@pytest.mark.parametrize(
    "other",
    [nn.Linear(12, 11), nn.Linear(13, 10), nn.Linear(13, 11, bias=False), nn.ReLU()],
    ids=["width", "height", "bias", "weight"],
)
def test_copy_params_from_refuses_another_shape_and_copies_nothing(other):
    """The name of the layer, both shapes, and not one value changed."""
    _, layer = pair((3, 2))
    before = {name: value.clone() for name, value in layer.state_dict().items()}

    with pytest.raises(TileShapeError, match=r"copy_params_from\((Linear|ReLU)\).*both must agree"):
        layer.copy_params_from(other)

    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
def test_init_linear_gives_its_values(grid):
    """`init_linear=` at construction is `copy_params_from` right after it."""
    dense, _ = pair((1, 1))

    layer = TiledLinear(13, 11, out_splits=grid[0], in_splits=grid[1], init_linear=dense)

    assert torch.equal(layer.weight, dense.weight)
    assert torch.equal(layer.bias, dense.bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
def test_from_linear_keeps_everything_about_the_linear(grid, dtype):
    """Values, dtype, device, requires_grad, mode, gradient; and `to_linear` gives them back."""
    dense = nn.Linear(13, 11, dtype=dtype).eval()
    dense(torch.randn(3, 13, dtype=dtype)).sum().backward()
    dense.bias.requires_grad_(False)

    layer = TiledLinear.from_linear(dense, out_splits=grid[0], in_splits=grid[1])
    back = layer.to_linear()

    assert not layer.training
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert [p.requires_grad for n, p in layer.named_parameters() if "bias" in n] == [False] * grid[
        0
    ]
    assert all(p.data_ptr() != dense.weight.data_ptr() for p in layer.parameters())
    assert type(back) is nn.Linear
    assert torch.equal(back.weight, dense.weight)
    assert torch.equal(back.weight.grad, dense.weight.grad)
    assert torch.equal(back.bias, dense.bias)
    assert (back.weight.requires_grad, back.bias.requires_grad) == (True, False)
    assert back.training is False


def test_from_linear_of_a_meta_linear_allocates_nothing():
    """A layer without memory is tiled without memory."""
    layer = TiledLinear.from_linear(nn.Linear(1 << 20, 1 << 20, device="meta"), 4, 5)

    assert layer.weight.is_meta
    assert str(layer.grid) == "5×4"


def test_device_and_dtype_go_to_the_tiles():
    """`**kwargs` reach `linear_cls`: dtype and device among them."""
    layer = TiledLinear(13, 11, in_splits=2, out_splits=3, device="meta", dtype=torch.float16)

    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float16)}


def test_the_repr_shows_the_grid():
    """One line of features, bias, grid and largest tile, as `nn.Linear` shows its own."""
    layer = TiledLinear(13, 11, in_splits=2, out_splits=3)

    assert layer.extra_repr() == (
        "in_features=13, out_features=11, bias=True, grid=3×2, largest tile 4×7"
    )
    assert layer.extra_repr() in repr(layer)


@pytest.mark.parametrize("path", ["fused", "composed", "traceable"])
def test_the_path_taken_is_the_one_that_fits(path):
    """Plain tiles take the fused path, hooked ones the composed, overridden hooks the traceable."""
    _, layer = pair((3, 2))

    assert path_of(on_path(path, layer)(torch.randn(4, 13))) == path
