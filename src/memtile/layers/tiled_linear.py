"""`TiledLinear`: a linear layer whose weight is a grid of tiles, each a module of its own.

Source: the memory-centric tiling of DeepSpeed ZeRO-3 (ZeRO-Infinity, arXiv 2104.07857, §5.1.3),
whose contract it keeps: names, defaults, points for subclasses, state dict names.

One call takes one of three walks over the grid:
- fused, when every tile is resident and plain: one autograd function (`ops.fused`);
- composed, when a tile is anything more (hooks, another class, an engine, autocast): each tile is
  called as the module that it is, its result written where it belongs (`ops.composed`);
- by points, under compilers and transforms and in subclasses that override how results are reduced
  or combined: the three points below, in ordinary operations.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from memtile import ops
from memtile.errors import TileClassError, TileShapeError
from memtile.geometry import Grid
from memtile.layers import door
from memtile.layers.making import LinearClass, draw_like_whole_linear, draws_like_linear, make_tile
from memtile.layers.tiled_module import DENSE_NAMES, TiledModule
from memtile.layers.values import Index, Values

Results = Iterator[tuple[Index, Any]]
Self = TypeVar("Self", bound="TiledLinear")
Point = TypeVar("Point", bound=Callable[..., Any])


def own_point(function: Point) -> Point:
    """Mark a point as memtile's own, so that an override of it is seen."""
    function.is_own_point = True  # type: ignore[attr-defined]  # functions take attributes
    return function


class TiledLinear(TiledModule):
    """A linear layer cut into `out_splits × in_splits` tiles that are worked on in turn.

    Tile (o, i) is `linears[o][i]`, a `linear_cls(in_i, out_o, bias=…, **kwargs)`; the bias of a row
    belongs to its last column. Starting values have `nn.Linear`'s distribution for the whole layer.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bias: whether an offset is added.
        in_splits: columns of tiles, 1 to in_features.
        out_splits: rows of tiles, 1 to out_features.
        input_is_already_split: `forward` takes a sequence of in_splits chunks.
        combine_out_splits: `forward` gives one tensor; False: a list of out_splits tensors.
        linear_cls: makes a tile; may return other widths (tensor-parallel linears).
        init_linear: an untiled linear whose values are copied.
        **kwargs: go to `linear_cls`, `device` and `dtype` among them.

    Raises:
        SplitsError: a number of splits is outside its range.
        TileClassError: `linear_cls` ignores `bias=False`.
        TileShapeError: `init_linear` has another shape.
    """

    tile_pattern: ClassVar[re.Pattern[str]] = re.compile(
        r"linears\.(?P<row>\d+)\.(?P<column>\d+)\.(?P<name>weight|bias)"
    )

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        in_splits: int = 1,
        out_splits: int = 1,
        input_is_already_split: bool = False,
        combine_out_splits: bool = True,
        linear_cls: LinearClass = nn.Linear,
        init_linear: nn.Module | None = None,
        **kwargs: Any,  # the contract passes them to linear_cls
    ) -> None:
        super().__init__()
        self.grid = Grid.uniform(out_features, in_features, out_splits, in_splits)
        self.in_features, self.out_features = self.grid.in_features, self.grid.out_features
        self.in_splits, self.out_splits = self.grid.in_splits, self.grid.out_splits
        self.in_parts, self.out_parts = list(self.grid.in_parts), list(self.grid.out_parts)
        self.use_bias = bool(bias)
        self.input_is_already_split = input_is_already_split
        self.combine_out_splits = combine_out_splits
        self.linears = nn.ModuleList(
            nn.ModuleList(
                make_tile(linear_cls, into.size, out.size, self.use_bias and i == self.in_splits - 1, **kwargs)
                for i, into in enumerate(self.grid.in_spans)
            )
            for out in self.grid.out_spans
        )
        if init_linear is not None:
            self.copy_params_from(init_linear)
        elif draws_like_linear(self.tile(0, 0)):
            draw_like_whole_linear(self)

    def tile(self, row: int, column: int) -> nn.Module:
        """The tile at (row, column)."""
        tile: nn.Module = self.linears[row][column]  # type: ignore[index]  # a ModuleList's item
        return tile

    def tile_path(self, row: int, column: int) -> str:
        """The name of the tile at (row, column) below this layer."""
        return f"linears.{row}.{column}"

    def extra_repr(self) -> str:
        """Features, bias and grid."""
        rows, columns = self.grid.rect(0, 0).shape
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.use_bias}, grid={self.grid}, largest tile {rows}×{columns}"
        )

    def reset_parameters(self) -> None:
        """Draw new starting values: `nn.Linear`'s for the whole layer, or each tile's own.

        Raises:
            TileClassError: the tiles are no plain linears and cannot reset themselves.
        """
        if draws_like_linear(self.tile(0, 0)):
            draw_like_whole_linear(self)
            return
        for _, tile in self.tiles():
            reset = getattr(tile, "reset_parameters", None)
            if reset is None:
                raise TileClassError(
                    f"{self.full_name()}: {type(tile).__name__} has no reset_parameters(); give "
                    "linear_cls one, or copy values with copy_params_from(linear)"
                )
            reset()

    @torch.no_grad()
    def copy_params_from(self, other: nn.Module) -> None:
        """Copy the values of a linear of the same shape, tile by tile.

        Args:
            other: has `weight` (out_features, in_features) and, as this layer, `bias` or None. A
                tiled layer of any grid will do.

        Raises:
            TileShapeError: a shape differs, or only one of the two has a bias. Nothing is copied.
        """
        sources = {name: getattr(other, name, None) for name in DENSE_NAMES}
        for name, source in sources.items():
            mine = self.dense_shape(name) if self.tile_parameters(name) else None
            theirs = None if source is None else tuple(source.shape)
            if mine != theirs:
                raise TileShapeError(
                    f"{self.full_name()}.copy_params_from({type(other).__name__}): its {name} is "
                    f"{theirs or 'missing'}, this layer's {mine or 'missing'}; both must agree"
                )
        for name, source in sources.items():
            if source is not None:
                self.copy_values(name, self._values_of(other, name, source))

    def _values_of(self, other: nn.Module, name: str, source: Tensor) -> Values:
        if isinstance(other, TiledModule):
            return Values.tiles(other.tile_parameters(name))
        return Values.dense(source.t() if name == "weight" and self.weight_is_transposed else source)

    @classmethod
    def from_linear(
        cls: type[Self],
        linear: nn.Linear,
        in_splits: int = 1,
        out_splits: int = 1,
        *,
        input_is_already_split: bool = False,
        combine_out_splits: bool = True,
    ) -> Self:
        """A tiled layer with the linear's values, dtype, device, requires_grad and training mode."""
        return cls.from_dense(
            linear,
            Grid.uniform(linear.out_features, linear.in_features, out_splits, in_splits),
            input_is_already_split=input_is_already_split,
            combine_out_splits=combine_out_splits,
        )

    @classmethod
    def from_dense(
        cls: type[Self],
        linear: nn.Module,
        grid: Grid,
        tied_to: TiledModule | None = None,
        **options: bool,
    ) -> Self:
        """The same for a grid that is there already, its weight tiles shared where it is tied."""
        has_bias = getattr(linear, "bias", None) is not None
        layer = cls(
            grid.in_features,
            grid.out_features,
            bias=has_bias,
            in_splits=grid.in_splits,
            out_splits=grid.out_splits,
            device="meta",
            **options,  # type: ignore[arg-type]  # only the two flags of from_linear
        )
        layer.take_over(linear, tied_to)
        return layer

    def to_linear(self) -> nn.Linear:
        """An untiled `nn.Linear` with the same values, dtype, device, requires_grad, mode.

        Raises:
            CannotTileError: some tiles are frozen and some are not.
        """
        linear = self.to_dense()
        assert isinstance(linear, nn.Linear)
        return linear

    def to_dense(self, weight: nn.Parameter | None = None) -> nn.Module:
        """The untiled module that this layer stands for, with `weight` where it is tied."""
        linear = nn.Linear(self.in_features, self.out_features, self.use_bias, device="meta")
        self.hand_over(linear, weight)
        return linear

    # --- one call ---------------------------------------------------------------------------

    def forward(self, input_: Any) -> Any:
        """The layer's output.

        Args:
            input_: (…, in_features), or a sequence of in_splits chunks (…, in_i) when
                `input_is_already_split`. With tiles that declare no in_features the cut follows
                the width that arrives.

        Returns:
            (…, out_features), or a list of out_splits tensors (…, out_o) without
            `combine_out_splits`.

        Raises:
            TileShapeError: wrong width, rank or number of chunks.
            TileDtypeError: another dtype than the tiles', without autocast.
            TileDeviceError: another device than the tiles'.
            TileClassError: a tile returned a wrong shape.
        """
        tiles = [tile for row in self.linears for tile in row]  # type: ignore[attr-defined]  # ModuleLists
        whole = self._check_input(input_, door.column_widths(tiles[: self.in_splits]))
        if self._has_own(("_reduce_local_output", "_combine_output_splits")) and not ops.transformed():
            plain = door.all_plain(tiles)
            if plain:
                for chunk in whole:
                    door.check_kind(self.full_name(), chunk, tiles[0].weight, ops.autocast_dtype(chunk))
            if plain and len(tiles) > 1 and self._can_fuse(whole):
                return self._walk_fused(whole, tiles)
            return self._walk_composed(self._results(self._split(whole, plain)))
        return self._walk_points(self._split(whole, False))

    def _check_input(self, input_: Any, declared: list[int] | None) -> list[Any]:
        """The input as a list: one whole tensor, or the chunks."""
        name = self.full_name()
        if self.input_is_already_split and not isinstance(input_, Tensor):
            door.check_chunks(name, input_, self.in_splits, declared)
            return list(input_)
        if self.input_is_already_split and self.in_splits > 1:
            raise TileShapeError(
                f"{name}: input_is_already_split=True with in_splits={self.in_splits} takes a "
                "sequence of chunks, not one tensor; pass x.split(sizes, -1)"
            )
        if not isinstance(input_, Tensor) and not self._has_own(("_split_global_input",)):
            return [input_]
        tensor = door.check_tensor(name, input_)
        door.split_sizes(name, tensor.shape[-1], self.in_splits, declared)
        return [tensor]

    def _has_own(self, points: Sequence[str]) -> bool:
        return all(getattr(getattr(self, point), "is_own_point", False) for point in points)

    def _can_fuse(self, whole: list[Any]) -> bool:
        return (
            self._has_own(("_split_global_input",))
            and all(type(chunk) in (Tensor, nn.Parameter) for chunk in whole)
            and ops.autocast_dtype(whole[0]) is None
        )

    def _walk_fused(self, whole: list[Tensor], tiles: list[nn.Module]) -> Any:
        spec = ops.FusedSpec(self.grid, len(whole), self.combine_out_splits, self.use_bias)
        biases = [row[-1].bias for row in self.linears] if self.use_bias else []  # type: ignore[index]
        result = ops.fused_linear(spec, whole, [tile.weight for tile in tiles], biases)  # type: ignore[misc]
        return result if isinstance(result, Tensor) else list(result)

    def _split(self, whole: list[Any], plain: bool) -> list[Any]:
        """The input's chunks; for plain tiles under autocast cast once, not once for each tile."""
        if plain or (ops.transformed() and type(self.tile(0, 0)) is nn.Linear):
            whole = [chunk.to(ops.autocast_dtype(chunk) or chunk.dtype) for chunk in whole]
        if len(whole) == self.in_splits:
            return whole
        input_ = whole[0]
        declared = door.column_widths([self.tile(0, i) for i in range(self.in_splits)])
        width = input_.shape[-1] if isinstance(input_, Tensor) else self.in_features
        sizes = door.split_sizes(self.full_name(), width, self.in_splits, declared)
        return list(self._split_global_input(input_, sizes))

    def _results(self, chunks: Sequence[Any]) -> Results:
        """((row, column), what the tile returned), each tile called when it is drawn."""
        split = ops.float32_casts if ops.transformed() else ops.float32_edges
        edges = [
            split(chunk, self.out_splits) if isinstance(chunk, Tensor) else iter([chunk] * self.out_splits)
            for chunk in chunks
        ]
        for row, column in self.grid.indices():
            yield (row, column), self.tile(row, column)(next(edges[column]))

    def _walk_composed(self, results: Results) -> Any:
        # map, and not a generator, whose variables would keep each result beside the next one's.
        checked = map(lambda pair: (pair[0], self._check_result(*pair)), results)
        if self.combine_out_splits:
            return ops.write_results(checked, self.grid)
        return ops.write_rows(checked, self.grid)

    def _check_result(self, index: Index, result: Any) -> Tensor:
        if not isinstance(result, Tensor):
            raise TileClassError(
                f"{self.full_name()}: tile {index} returned a {type(result).__name__}, not a tensor; "
                "a linear_cls that returns (output, bias) belongs in TiledLinearReturnBias"
            )
        return result

    def _walk_points(self, chunks: Sequence[Any]) -> Any:
        outputs: list[Any] = []
        shapes: ops.ResultShapes | None = None
        dtype = None
        for (row, column), result in self._results(chunks):
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

    # --- points for subclasses --------------------------------------------------------------

    @own_point
    def _split_global_input(self, input: Any, split_sizes: Sequence[int]) -> Sequence[Any]:
        """Cut the input along its last dimension; override for other kinds of input."""
        return ops.split_tensor_along_last_dim(input, split_sizes)

    @own_point
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

    @own_point
    def _combine_output_splits(self, outputs: Sequence[Any]) -> Any:
        """Join the rows' results; override for other kinds of result."""
        return ops.join_rows(outputs)


def _cast(result: Any, dtype: torch.dtype) -> Any:
    """A row's running result in another dtype; of a tuple, its first tensor."""
    if isinstance(result, Tensor):
        return result.to(dtype)
    if isinstance(result, tuple) and result:
        return (_cast(result[0], dtype), *result[1:])
    return result
