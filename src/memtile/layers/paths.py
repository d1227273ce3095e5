"""The four paths of a call of a tiled linear, and the hooks that subclasses override.

- fused, when every tile is resident and plain: one autograd function (`ops.fused`);
- direct, when every tile is a plain `ParkedLinear`: one node for each tile (`ops.parked_layer`);
- composed, when a tile is anything more (hooks, another class, an engine, autocast): each
  tile is called as a module and its result written into the output (`ops.composed`);
- traceable, under compilers and transforms and in subclasses that override how results are reduced
  or combined: the three override hooks below, in ordinary operations.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from memtile import ops
from memtile.errors import TileClassError, TileShapeError
from memtile.layers import checks
from memtile.layers.parked import ParkedLinear, operands_of
from memtile.layers.tiled_module import TiledModule
from memtile.layers.values import Index
from memtile.transfer import layer_call

Operands = Sequence[tuple[nn.Parameter, Tensor | None]]
Results = Iterator[tuple[Index, Any]]
_NOTHING: Any = object()  # Any: the default of an input that may be anything
Hook = TypeVar("Hook", bound=Callable[..., Any])


def own_hook(function: Hook) -> Hook:
    """Mark an override hook as memtile's own, so that an override is detected.

    The mark is the function itself, since `functools.wraps` copies attributes to other functions.
    """
    function.own_hook = function  # type: ignore[attr-defined]  # functions take attributes
    return function


class LinearPaths(TiledModule):
    """How a grid of linear tiles is called; `TiledLinear` makes the grid."""

    in_features: int
    in_splits: int
    out_splits: int
    use_bias: bool
    input_is_already_split: bool
    combine_out_splits: bool
    linears: nn.ModuleList

    def forward(self, input_: Any = _NOTHING, *, input: Any = _NOTHING) -> Any:
        """The layer's output.

        Args:
            input_: (…, in_features), or a sequence of in_splits chunks (…, in_i) when
                `input_is_already_split`. With tiles that declare no in_features the cut follows
                the width that arrives.
            input: the same by the name that `nn.Linear` has for it.

        Returns:
            (…, out_features), or a list of out_splits tensors (…, out_o) without
            `combine_out_splits`.

        Raises:
            TileShapeError: wrong width, rank or number of chunks.
            TileDtypeError: another dtype than the tiles', without autocast.
            TileDeviceError: another device than the tiles'.
            TileClassError: a tile returned a wrong shape.
            TypeError: both are given, or none.
        """
        input_ = _the_one(type(self), input_, input)
        tiles = [tile for row in self.linears for tile in row]  # type: ignore[attr-defined]  # ModuleLists
        declared = checks.column_widths(tiles[: self.in_splits])
        whole = self._check_input(input_, declared)
        transformed = ops.transformed()
        plain = not transformed and checks.all_plain(tiles)
        parked = type(tiles[0]) is ParkedLinear
        if plain or (parked and not transformed):
            weight: Any = tiles[0].weight  # a Tensor, which mypy does not know
            checks.check_dtypes_and_devices(self.full_name(), whole, weight, same_device=plain)
        overridden = not self._has_own_hooks("_reduce_local_output", "_combine_output_splits")
        if plain and not overridden and len(tiles) > 1 and self._can_fuse(whole, tiles):
            return self._fused_path(whole, tiles)
        if plain or parked or (transformed and type(tiles[0]) is nn.Linear):
            whole = _cast_as_autocast(whole)
        chunks = self._split(whole, declared)
        operands = None
        if parked and not overridden and not transformed:
            operands = self._operands(chunks, tiles)
        if operands is not None:
            return self._direct_path(chunks, operands)
        path = self._traceable_path if overridden or transformed else self._composed_path
        with nullcontext() if transformed else layer_call():
            return path(self._results(chunks))

    def _check_input(self, input_: Any, declared: list[int] | None) -> list[Any]:
        """The input as a list: one whole tensor, or the chunks."""
        name = self.full_name()
        if self.input_is_already_split and not isinstance(input_, Tensor):
            checks.check_chunks(name, input_, self.in_splits, declared)
            return list(input_)
        if self.input_is_already_split and self.in_splits > 1:
            raise TileShapeError(
                f"{name}: input_is_already_split=True with in_splits={self.in_splits} takes a "
                "sequence of chunks, not one tensor; pass x.split(sizes, -1)"
            )
        if not isinstance(input_, Tensor) and not self._has_own_hooks("_split_global_input"):
            return [input_]
        tensor = checks.check_tensor(name, input_)
        checks.split_sizes(name, tensor.shape[-1], self.in_splits, declared)
        return [tensor]

    def _has_own_hooks(self, *hooks: str) -> bool:
        """Whether no subclass has overridden these, nor anyone on the instance."""
        found = (getattr(getattr(self, hook), "__func__", hook) for hook in hooks)
        return all(getattr(function, "own_hook", None) is function for function in found)

    def _can_fuse(self, whole: list[Any], tiles: list[nn.Module]) -> bool:
        last = self.in_splits - 1
        return (
            self._has_own_hooks("_split_global_input")
            and all(
                tile._parameters.get("bias") is None
                or (self.use_bias and number % self.in_splits == last)
                for number, tile in enumerate(tiles)  # a tile that was replaced may differ
            )
            and all(type(chunk) in (Tensor, nn.Parameter) for chunk in whole)
            and ops.autocast_dtype(whole[0]) is None
        )

    def _fused_path(self, whole: list[Tensor], tiles: list[nn.Module]) -> Any:
        spec = ops.FusedSpec(self.grid, len(whole), self.combine_out_splits, self.use_bias)
        biases = self._bias_rows()
        if self.use_bias and not biases:
            biases = [row[-1].bias for row in self.linears]  # type: ignore[index]  # a ModuleList's
        result = ops.fused_linear(spec, whole, [tile.weight for tile in tiles], biases)  # type: ignore[misc]
        return result if isinstance(result, Tensor) else list(result)

    def _operands(self, chunks: Sequence[Any], tiles: Sequence[nn.Module]) -> Operands | None:
        """Weight and bias of every tile, where all are plain parked ones; None elsewhere."""
        if not all(type(chunk) in (Tensor, nn.Parameter) for chunk in chunks):
            return None
        found, biases, columns = operands_of(tiles, self.grid), self._bias_rows(), self.in_splits
        if not found or not biases:
            return found
        return [
            (weight, biases[n // columns] if (n + 1) % columns == 0 else None)
            for n, (weight, _) in enumerate(found)
        ]

    def _direct_path(self, chunks: Sequence[Tensor], operands: Operands) -> Any:
        """Parked tiles write their products into the output: no tile is called as a module."""
        dtype = chunks[0].dtype
        cast = [(w, None if b is None else b.to(dtype)) for w, b in operands]  # as autocast does
        with layer_call():
            return ops.parked_layer(chunks, cast, self.grid, self.combine_out_splits)

    def _split(self, whole: list[Any], declared: list[int] | None) -> list[Any]:
        """The input's chunks, one for each column."""
        if len(whole) == self.in_splits:
            return whole
        input_ = whole[0]
        width = input_.shape[-1] if isinstance(input_, Tensor) else self.in_features
        sizes = checks.split_sizes(self.full_name(), width, self.in_splits, declared)
        return list(self._split_global_input(input_, sizes))

    def _results(self, chunks: Sequence[Any]) -> Results:
        """((row, column), what the tile returned); each tile is called when its item is taken."""
        split = ops.float32_casts if ops.transformed() else ops.float32_edges
        edges = [
            split(chunk, self.out_splits)
            if isinstance(chunk, Tensor)
            else iter([chunk] * self.out_splits)
            for chunk in chunks
        ]
        biases = self._bias_rows()
        for row, column in self.grid.indices():
            result = self.tile(row, column)(next(edges[column]))
            if biases and column == self.in_splits - 1:
                result = result + biases[row].to(result.dtype)  # as under autocast
            yield (row, column), result
            del result  # otherwise it would be kept beside the next one

    def _bias_rows(self) -> Sequence[Tensor]:
        """The part of each row of tiles in a bias that the layer keeps whole; else nothing."""
        whole = self.whole_bias
        return () if whole is None else whole.split([span.size for span in self.grid.out_spans])

    def _composed_path(self, results: Results) -> Any:
        write = ops.write_results if self.combine_out_splits else ops.write_rows
        return write(map(self._checked, results), self.grid)

    def _checked(self, result: tuple[Index, Any]) -> tuple[Index, Tensor]:
        """For `map`: a generator would keep each result in a variable beside the next one."""
        return result[0], self._check_result(*result)

    def _check_result(self, index: Index, result: Any) -> Tensor:
        if not isinstance(result, Tensor):
            raise TileClassError(
                f"{self.full_name()}: tile {index} returned a {type(result).__name__}, not a "
                "tensor; a linear_cls that returns (output, bias) belongs in TiledLinearReturnBias"
            )
        checks.check_width(self.full_name(), index, self.tile(*index), self.grid, result)
        return result

    def _traceable_path(self, results: Results) -> Any:
        outputs: list[Any] = []
        shapes: ops.ResultShapes | None = None
        dtype = None
        for (row, column), result in results:
            tensor = result[0] if isinstance(result, tuple) and result else result
            if isinstance(tensor, Tensor):
                shapes = shapes or ops.ResultShapes(tensor, self.grid)
                shapes.check((row, column), tensor)
                dtype = tensor.dtype
            current = outputs.pop() if column else None
            current = self._reduce_local_output(
                in_id=column, out_id=row, current_out=current, new_out=result
            )
            if dtype is not None and ops.needs_float32_sum(dtype, self.in_splits):
                last = column == self.in_splits - 1
                current = _cast(current, dtype if last else torch.float32)
            outputs.append(current)
        return self._combine_output_splits(outputs) if self.combine_out_splits else outputs

    @own_hook
    def _split_global_input(self, input: Any, split_sizes: Sequence[int]) -> Sequence[Any]:
        """Cut the input along its last dimension; override for other kinds of input."""
        return ops.split_tensor_along_last_dim(input, split_sizes)

    @own_hook
    def _reduce_local_output(self, in_id: int, out_id: int, current_out: Any, new_out: Any) -> Any:
        """Add a tile's result to its row's; override for other kinds of result.

        Args:
            in_id: the tile's column.
            out_id: the tile's row.
            current_out: what this gave for the columns before, None in the first one; float32
                where several columns of 16-bit results are summed.
            new_out: what the tile returned.
        """
        result = self._check_result((out_id, in_id), new_out)
        return result if current_out is None else current_out + result

    @own_hook
    def _combine_output_splits(self, outputs: Sequence[Any]) -> Any:
        """Join the rows' results; override for other kinds of result."""
        return ops.join_rows(outputs)


def _the_one(cls: type, input_: Any, by_name: Any) -> Any:
    """The input by either of its names; TypeError, as Python's own, unless one is given."""
    if (input_ is _NOTHING) == (by_name is _NOTHING):
        what = (
            "missing 1 required positional argument:"
            if input_ is _NOTHING
            else "got multiple values for argument"
        )
        raise TypeError(f"{cls.__name__}.forward() {what} 'input'")
    return by_name if input_ is _NOTHING else input_


def _cast_as_autocast(whole: list[Any]) -> list[Any]:
    """The input cast once, where autocast would cast it again for each tile."""
    return [
        chunk.to(ops.autocast_dtype(chunk) or chunk.dtype) if isinstance(chunk, Tensor) else chunk
        for chunk in whole
    ]


def _cast(result: Any, dtype: torch.dtype) -> Any:
    """A row's running result in another dtype; of a tuple, its first tensor."""
    if isinstance(result, Tensor):
        return result.to(dtype)
    if isinstance(result, tuple) and result:
        return (_cast(result[0], dtype), *result[1:])
    return result
