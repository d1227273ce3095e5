"""The composed path's mathematics: results of tiles written into one output."""

import weakref

import pytest
import torch
from paths import grid_id
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import linear

from memtile.errors import TileClassError
from memtile.geometry import Grid
from memtile.ops import (
    ResultShapes,
    float32_casts,
    float32_edges,
    join_rows,
    split_tensor_along_last_dim,
    write_results,
    write_rows,
)
from memtile.ops.composed import Feed
from memtile.testing import assert_as_accurate

TINY_GRIDS = [(1, 1), (1, 3), (4, 1), (3, 2)]
SIXTEEN_BITS = [torch.bfloat16, torch.float16]


def leaves_of(grid: Grid, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """A float64 input of two rows, and the tiles of a weight."""
    torch.manual_seed(seed)
    shapes = [(2, grid.in_features), *(grid.rect(*index).shape for index in grid.indices())]
    x, *tiles = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return x, tiles


def feed_of(grid: Grid, x: Tensor, tiles: list[Tensor]) -> Feed:
    """Each tile's result, computed when it is drawn."""
    for index, tile in zip(grid.indices(), tiles, strict=True):
        yield index, linear(x[..., grid.in_spans[index[1]].as_slice()], tile)


def dense_of(grid: Grid, tiles: list[Tensor]) -> Tensor:
    """The tiles as one matrix."""
    step = grid.in_splits
    rows = [torch.cat(tiles[o * step : (o + 1) * step], dim=1) for o in range(grid.out_splits)]
    return torch.cat(rows)


@pytest.mark.parametrize("splits", TINY_GRIDS, ids=grid_id)
def test_written_results_have_exact_first_and_second_derivatives(splits):
    """gradcheck and gradgradcheck pass through the writes into one output."""
    grid = Grid.uniform(7, 5, *splits)
    x, tiles = leaves_of(grid)

    def layer(x: Tensor, *tiles: Tensor) -> Tensor:
        return write_results(feed_of(grid, x, list(tiles)), grid)

    assert gradcheck(layer, (x, *tiles))
    assert gradgradcheck(layer, (x, *tiles))
    torch.testing.assert_close(layer(x, *tiles), linear(x, dense_of(grid, tiles)))


@pytest.mark.parametrize("splits", TINY_GRIDS, ids=grid_id)
def test_rows_kept_apart_have_exact_first_and_second_derivatives(splits):
    """The same holds for a list of rows, which joined are the same output."""
    grid = Grid.uniform(7, 5, *splits)
    x, tiles = leaves_of(grid)

    def rows(x: Tensor, *tiles: Tensor) -> tuple[Tensor, ...]:
        return tuple(write_rows(feed_of(grid, x, list(tiles)), grid))

    assert gradcheck(rows, (x, *tiles))
    assert gradgradcheck(rows, (x, *tiles))
    assert torch.equal(join_rows(rows(x, *tiles)), write_results(feed_of(grid, x, tiles), grid))


@pytest.mark.parametrize("write", [write_results, write_rows])
def test_each_result_is_drawn_when_the_one_before_was_written_and_dropped(write):
    """The feed is lazy and nothing holds an old result: one tile's result lives at a time."""
    grid = Grid.uniform(7, 5, 3, 2)
    x, tiles = leaves_of(grid)
    living: list[bool] = []

    def feed() -> Feed:
        for (row, column), tile in zip(grid.indices(), tiles, strict=True):
            result = linear(x[:, grid.in_spans[column].as_slice()], tile)
            last = weakref.ref(result)
            yield (row, column), result
            del result
            living.append(last() is not None)

    write(feed(), grid)

    assert living == [False] * 6


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_edges_sum_the_input_gradient_in_float32(dtype):
    """64 uses of an input: the gradient is as accurate as one rounding, not as 64 of them."""
    torch.manual_seed(0)
    rows, x = 64, torch.randn(131, 127, dtype=torch.float64).to(dtype)
    parts = torch.randn(rows, 131, 127, dtype=torch.float64).to(dtype)
    truth = parts.double().sum(0)

    leaf = x.clone().requires_grad_()
    sum(
        (edge * part).sum(dtype=torch.float32)
        for edge, part in zip(float32_edges(leaf, rows), parts, strict=True)
    ).backward()

    assert leaf.grad.dtype == dtype
    assert_as_accurate(leaf.grad, truth.to(dtype), truth, 1.01)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_casts_sum_the_input_gradient_in_float32_for_transforms(dtype):
    """The form of the edges that every transform knows is as accurate."""
    torch.manual_seed(0)
    rows, x = 64, torch.randn(131, 127, dtype=torch.float64).to(dtype)
    parts = torch.randn(rows, 131, 127, dtype=torch.float64).to(dtype)
    truth = parts.double().sum(0)

    leaf = x.clone().requires_grad_()
    sum(
        (edge * part).sum(dtype=torch.float32)
        for edge, part in zip(float32_casts(leaf, rows), parts, strict=True)
    ).backward()

    assert leaf.grad.dtype == dtype
    assert_as_accurate(leaf.grad, truth.to(dtype), truth, 1.01)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_edges_alias_the_input_and_own_no_memory(dtype):
    """An edge has the input's storage; the float32 node behind it holds one element."""
    x = torch.randn(5, 3).to(dtype).requires_grad_()

    edges = list(float32_edges(x, 4))

    assert all(edge.data_ptr() == x.data_ptr() for edge in edges)
    assert all(torch.equal(edge, x) for edge in edges)
    node = edges[0].grad_fn.next_functions[0][0]
    assert node.name() == "_Float32NodeBackward"
    assert all(edge.grad_fn.next_functions[0][0] is node for edge in edges)


@pytest.mark.parametrize(
    ("dtype", "rows", "tracked"),
    [(torch.float32, 4, True), (torch.bfloat16, 1, True), (torch.bfloat16, 4, False)],
)
def test_edges_are_the_input_itself_where_nothing_is_summed(dtype, rows, tracked):
    """In float32, for one row and without gradients, no node is added."""
    x = torch.randn(5, 3).to(dtype).requires_grad_(tracked)

    assert all(edge is x for edge in float32_edges(x, rows))


def test_an_input_that_changes_after_it_was_used_is_noticed_through_an_edge():
    """Edges share the input's version: backward refuses an input that was written to."""
    x = torch.randn(5, 3).to(torch.bfloat16).requires_grad_()
    chunk = x * 1
    weight = torch.randn(4, 3).to(torch.bfloat16).requires_grad_()
    output = sum(linear(edge, weight).sum() for edge in float32_edges(chunk, 2))
    with torch.no_grad():
        chunk.zero_()

    with pytest.raises(RuntimeError, match="modified inplace"):
        output.backward()


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_columns_are_summed_in_float32(dtype):
    """64 columns of 16-bit results cost one rounding, not 64; the output has their dtype."""
    torch.manual_seed(0)
    grid = Grid.uniform(127, 64, 1, 64)
    results = torch.randn(64, 131, 127, dtype=torch.float64).to(dtype)
    truth = results.double().sum(0)

    output = write_results(zip(grid.indices(), results, strict=True), grid)

    assert output.dtype == dtype
    assert_as_accurate(output, truth.to(dtype), truth, 1.01)


def test_results_of_a_shard_give_an_output_narrower_by_the_same_factor():
    """A tensor-parallel column shard returns half of its span: so does the layer."""
    grid = Grid.uniform(8, 3, 2)
    results = [torch.ones(5, 2), torch.full((5, 2), 2.0)]

    output = write_results(zip(grid.indices(), results, strict=True), grid)

    assert output.tolist() == [[1.0, 1.0, 2.0, 2.0]] * 5


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (torch.ones(5, 3), r"returned shape \(5, 3\) where its out-span has 4 features"),
        (torch.ones(5, 8), "its out-span has 4"),
        (torch.ones(5, 0), "its out-span has 4"),
        (torch.tensor(1.0), "its out-span has 4"),
        (torch.ones(5, 2), "do not divide by 2"),
    ],
)
def test_a_first_result_of_a_wrong_width_is_refused(first, reason):
    """A width that is no whole fraction of the span names both, and the way out."""
    with pytest.raises(TileClassError, match=reason):
        ResultShapes(first, Grid.uniform(7, 5, 2, 2))


def test_a_later_result_of_another_shape_is_refused():
    """Every tile must return the leading dimensions of the first, and its own span."""
    shapes = ResultShapes(torch.ones(5, 4), Grid.uniform(7, 5, 2, 2))

    shapes.check((1, 0), torch.ones(5, 3))
    with pytest.raises(TileClassError, match=r"tile \(1, 1\) returned shape \(5, 4\)"):
        shapes.check((1, 1), torch.ones(5, 4))
    with pytest.raises(TileClassError, match=r"expected \(5, 4\)"):
        shapes.check((0, 1), torch.ones(6, 4))


def test_split_tensor_along_last_dim_gives_views_or_contiguous_copies():
    """A tuple of views of the given sizes; contiguous copies only when asked."""
    tensor = torch.arange(30.0).view(2, 3, 5)

    views = split_tensor_along_last_dim(tensor, [2, 3])
    copies = split_tensor_along_last_dim(tensor, (2, 3), contiguous_split_chunks=True)

    assert isinstance(views, tuple)
    assert [view.shape[-1] for view in views] == [2, 3]
    assert all(view.untyped_storage().data_ptr() == tensor.data_ptr() for view in views)
    assert all(copy.is_contiguous() for copy in copies)
    assert all(copy.data_ptr() != tensor.data_ptr() for copy in copies)
    assert torch.equal(torch.cat(copies, dim=-1), tensor)
