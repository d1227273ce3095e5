"""The override hooks: what subclasses of the original overrode works here."""

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from paths import GRIDS, grid_id, pair, path_of
from torch import Tensor

from memtile import TiledLinear
from memtile.errors import TileClassError
from memtile.testing import assert_as_accurate


class Cloning(TiledLinear):
    """The original's own reduction, as a subclass would have copied it."""

    def _reduce_local_output(self, in_id: int, out_id: int, current_out: Any, new_out: Any) -> Any:
        if current_out is None:
            return new_out.clone()
        return current_out + new_out


class Recording(TiledLinear):
    """Writes down what the reduction is called with."""

    def _reduce_local_output(self, in_id: int, out_id: int, current_out: Any, new_out: Any) -> Any:
        self.calls.append((out_id, in_id, None if current_out is None else current_out.dtype))
        return super()._reduce_local_output(in_id, out_id, current_out, new_out)


class Stacking(TiledLinear):
    """Combines rows in another way."""

    def _combine_output_splits(self, outputs: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
        return list(enumerate(outputs))


class FromDict(TiledLinear):
    """Takes a dictionary, and cuts what it finds in it."""

    def _split_global_input(self, input: Any, split_sizes: Sequence[int]) -> Sequence[Tensor]:
        return input["hidden"].split(list(split_sizes), dim=-1)


def as_class(cls: type[TiledLinear], grid: tuple[int, int], **options: Any) -> Any:
    """A float64 layer of a subclass beside the dense linear with its values."""
    dense, layer = pair(grid, dtype=options.pop("dtype", torch.float64), **options)
    layer.__class__ = cls
    return dense, layer


@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
def test_a_reduction_written_for_the_original_is_called_and_right(grid):
    """`clone` and `+`: the values of the dense layer, and exact gradients."""
    dense, layer = as_class(Cloning, grid)
    x = torch.randn(4, 13, dtype=torch.float64, requires_grad=True)

    output = layer(x)

    torch.testing.assert_close(output, dense(x))
    assert path_of(output) == "traceable"
    assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_reduction_gets_a_float32_running_sum_and_its_result_is_cast_back(dtype):
    """None in the first column, float32 in the others; the output has the tiles' dtype."""
    _, layer = as_class(Recording, (2, 3), dtype=dtype)
    layer.calls = []

    output = layer(torch.randn(4, 13, dtype=dtype))

    assert layer.calls == [
        (row, column, None if column == 0 else torch.float32)
        for row in (0, 1)
        for column in (0, 1, 2)
    ]
    assert output.dtype == dtype


def test_the_reduction_runs_row_by_row_in_the_tiles_own_dtype_when_that_is_float32():
    """The order of the original, and no cast where none is needed."""
    _, layer = as_class(Recording, (2, 2), dtype=torch.float32)
    layer.calls = []

    layer(torch.randn(4, 13))

    assert layer.calls == [
        (0, 0, None),
        (0, 1, torch.float32),
        (1, 0, None),
        (1, 1, torch.float32),
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_overridden_reduction_is_as_accurate_as_memtiles_own(dtype):
    """The subclass of the original gains the float32 sum: 1.5 × the dense error at 64 columns."""
    torch.manual_seed(0)
    dense, layer = as_class(Cloning, (3, 64), shape=(389, 257), dtype=dtype)
    x = torch.randn(131, 389).to(dtype)
    truth = x.double() @ dense.weight.double().t() + dense.bias.double()

    assert_as_accurate(layer(x), dense(x), truth, 1.5)


@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
def test_a_combination_of_rows_is_honoured(grid):
    """Whatever it returns is the layer's output; rows arrive in order and reduced."""
    dense, layer = as_class(Stacking, grid)
    x = torch.randn(4, 13, dtype=torch.float64)

    output = layer(x)

    assert [row for row, _ in output] == list(range(grid[0]))
    torch.testing.assert_close(torch.cat([part for _, part in output], dim=-1), dense(x))


@pytest.mark.parametrize("grid", [(1, 3), (3, 2)], ids=grid_id)
def test_an_input_of_another_kind_is_split_by_the_subclass(grid):
    """A dictionary goes through `_split_global_input`, with the columns' sizes."""
    dense, layer = as_class(FromDict, grid)
    x = torch.randn(4, 13, dtype=torch.float64)

    torch.testing.assert_close(layer({"hidden": x}), dense(x))


def test_the_sizes_follow_the_width_that_arrives():
    """A subclass sees the sizes of its columns, longest first."""
    sizes = []

    class Looking(TiledLinear):
        def _split_global_input(self, input: Any, split_sizes: Sequence[int]) -> Sequence[Tensor]:
            sizes.append(list(split_sizes))
            return super()._split_global_input(input, split_sizes)

    dense, layer = as_class(Looking, (2, 3))
    x = torch.randn(4, 13, dtype=torch.float64)

    torch.testing.assert_close(layer(x), dense(x))
    assert sizes == [[5, 4, 4]]


def test_a_hooks_overridden_on_the_instance_is_honoured_too():
    """A function set on one layer is called as one defined in a class."""
    _, layer = pair((2, 2))
    layer._combine_output_splits = len

    assert layer(torch.randn(4, 13)) == 2


def test_points_see_uncombined_outputs_only_when_asked_to_combine():
    """With `combine_out_splits=False` rows are reduced, then given as they are."""
    dense, layer = as_class(Stacking, (3, 2), combine_out_splits=False)
    x = torch.randn(4, 13, dtype=torch.float64)

    output = layer(x)

    assert [row.shape[-1] for row in output] == [4, 4, 3]
    torch.testing.assert_close(torch.cat(output, dim=-1), dense(x))


def test_a_reduction_may_give_anything_that_its_combination_understands():
    """Tuples through both override hooks, as `TiledLinearReturnBias` uses them."""

    class Counting(TiledLinear):
        def _reduce_local_output(self, in_id, out_id, current_out, new_out):
            before, count = current_out or (0, 0)
            return before + new_out, count + 1

        def _combine_output_splits(self, outputs):
            return torch.cat([out for out, _ in outputs], dim=-1), [count for _, count in outputs]

    dense, layer = as_class(Counting, (3, 2))
    x = torch.randn(4, 13, dtype=torch.float64)

    output, counts = layer(x)

    torch.testing.assert_close(output, dense(x))
    assert counts == [2, 2, 2]


def test_a_wrong_result_is_refused_by_the_hooks_as_well():
    """A tile that returns a tuple needs `TiledLinearReturnBias`, or a reduction of its own."""
    _, layer = as_class(Stacking, (2, 2))
    layer.tile(0, 1).register_forward_hook(lambda tile, args, output: (output, None))

    with pytest.raises(TileClassError, match=r"tile \(0, 1\) returned a tuple"):
        layer(torch.randn(4, 13, dtype=torch.float64))


def test_an_override_that_wraps_the_original_is_seen():
    """functools.wraps copies attributes of a function: it must not pass for memtile's own."""

    class Wrapping(TiledLinear):
        @functools.wraps(TiledLinear._combine_output_splits)
        def _combine_output_splits(self, outputs):
            return 2 * super()._combine_output_splits(outputs)

    dense, layer = as_class(Wrapping, (3, 2))
    x = torch.randn(4, 13, dtype=torch.float64)

    torch.testing.assert_close(layer(x), 2 * dense(x))
