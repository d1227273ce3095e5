"""`TiledStack`: a stack of experts as row tiles of one matrix.

E experts (R, C) one below another are the matrix (E·R, C), cut between rows only. A tile holds
several whole experts, one, or some rows of one. R × C is an expert's matrix as its model keeps it:
(out, in), or (in, out) in a transposed stack, whose tiles within an expert give partial sums.
"""

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from memtile import ops
from memtile.errors import TileShapeError
from memtile.geometry import Grid, Span
from memtile.homes import Home, resolve_home
from memtile.layers import checks
from memtile.layers.called_experts import called_experts
from memtile.layers.stack_tiles import ParkedStackTile, StackTile
from memtile.layers.tiled_module import TiledModule
from memtile.transfer import catch_up, layer_call


class TiledStack(TiledModule):
    """A stack of experts in row tiles; tile n is `stacks[n]`. Its dense form is a parameter.

    Code that reads the parameter goes on working: `stack[ids]` gives the matrices of some experts,
    torch's functions take the whole of it, and both are differentiable.

    Args:
        experts: E, how many there are.
        rows: R, of one expert's matrix as it is kept.
        columns: C.
        is_transposed: whether R × C is (in, out).
        grid: of E·R × C in one column, its bounds between experts or within one; None: a tile for
            each expert.
        device: of the tiles, which have no starting values.
        dtype: of the tiles.
        home: where the tiles are parked; None: not parked.

    Raises:
        TileShapeError: the grid does not respect experts.
        HomeFullError: the home has no room for the tiles.
    """

    is_routed: ClassVar[bool] = True
    tile_pattern: ClassVar[re.Pattern[str]] = re.compile(r"stacks\.(?P<row>\d+)\.(?P<name>weight)")

    def __init__(
        self,
        experts: int,
        rows: int,
        columns: int,
        *,
        is_transposed: bool = False,
        grid: Grid | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        home: Home | str | None = None,
    ) -> None:
        super().__init__()
        self.experts, self.rows, self.columns = experts, rows, columns
        self.is_transposed = is_transposed
        self.grid = grid or Grid.split_stack(experts, rows, columns, experts)
        _check_grid(self.grid, experts, rows, columns)
        made = StackTile if home is None else ParkedStackTile
        parked: Any = {} if home is None else {"home": resolve_home(home, device)}
        self.stacks = nn.ModuleList(
            made(
                max(1, span.size // rows),
                span.size,
                columns,
                is_transposed,
                device=device,
                dtype=dtype,
                **parked,
            )
            for span in self.grid.out_spans
        )

    def tile(self, row: int, column: int) -> nn.Module:
        """The tile with the rows of span `row`."""
        return self.stacks[row]

    @staticmethod
    def tile_path(row: int, column: int) -> str:
        """The name of the tile below this layer."""
        return f"stacks.{row}"

    @staticmethod
    def dense_name(path: str, own: str) -> str:
        """The dense parameter has the layer's own name."""
        return path or own

    def extra_repr(self) -> str:
        """Experts, shape and tiles."""
        rows, columns = self.grid.rect(0, 0).shape
        return (
            f"{self.experts} experts, {self.rows}×{self.columns}, "
            f"transposed={self.is_transposed}, grid={self.grid}, largest tile {rows}×{columns}"
        )

    def dense_shape(self, name: str) -> tuple[int, ...]:
        """(E, R, C)."""
        return self.experts, self.rows, self.columns

    def transposed(self, name: str, tensor: Tensor) -> Tensor:
        """The matrix (E·R, C) of the stack (E, R, C), or back."""
        return tensor.flatten(0, 1) if tensor.dim() == 3 else tensor.unflatten(0, (-1, self.rows))

    def dense_gradient(self, name: str) -> Tensor | None:
        """The gradient (E, R, C), zero where experts had no tokens; None while no tile has one."""
        tiles = self.tile_parameters(name)
        if all(tile.grad is None for tile in tiles.values()):
            return None
        zeros = {i: p.detach().new_zeros(1).expand(p.shape) for i, p in tiles.items()}
        grads = {i: zeros[i] if p.grad is None else p.grad for i, p in tiles.items()}
        return self.assemble(name, grads)

    @classmethod
    def from_stack(
        cls,
        stack: nn.Parameter,
        grid: Grid,
        is_transposed: bool,
        tied_to: TiledModule | None = None,
        home: Home | None = None,
    ) -> "TiledStack":
        """The tiled form of a parameter (E, R, C); tiles may be `tied_to`'s, or in `home`."""
        layer = cls(*stack.shape, is_transposed=is_transposed, grid=grid, device="meta", home=home)
        if tied_to is None:
            layer.adopt("weight", stack)
        else:
            layer.share_tiles_with(tied_to)
        layer.stands_for_dense = True
        return layer

    @cached_property
    def units(self) -> tuple[tuple[Span, tuple[int, ...]], ...]:
        """The experts that are worked on together, in order, each with the numbers of its tiles.

        They are those of one tile, or one expert with all tiles that it is cut into.
        """
        found = []
        starts = enumerate(span.start // self.rows for span in self.grid.out_spans)
        for first, several in groupby(starts, key=lambda each: each[1]):
            numbers = tuple(number for number, _ in several)
            last = -(-self.grid.out_spans[numbers[-1]].stop // self.rows)
            found.append((Span(first, last), numbers))
        return tuple(found)

    @cached_property
    def bounds(self) -> frozenset[int]:
        """The numbers of experts before which, and after which, units end."""
        return frozenset({0, *(span.stop for span, _ in self.units)})

    @property
    def calls_all(self) -> bool:
        """Whether idle tiles must be called too: an engine, which hooks all tiles, counts on it."""
        return not checks.is_plain(self.stacks[0], type(self.stacks[0]))

    def used(self, counts: Sequence[int], first: int = 0) -> list[Tensor]:
        """The weights of the parked tiles whose experts have rows, in order."""
        if not isinstance(self.stacks[0], ParkedStackTile):
            return []  # an engine's hooks would take them for inputs
        units = self.units_of(counts, first)
        hit = (number for numbers, rows in units if any(rows) for number in numbers)
        weights = (self.stacks[number]._parameters.get("weight") for number in hit)
        return [weight for weight in weights if weight is not None]

    def units_of(
        self, counts: Sequence[int], first: int = 0
    ) -> list[tuple[tuple[int, ...], Sequence[int]]]:
        """The units of these experts: the numbers of their tiles, and the counts of their rows."""
        start = bisect_left(self.units, first, key=lambda unit: unit[0].start)
        stop = bisect_left(self.units, first + len(counts), key=lambda unit: unit[0].start)
        return [
            (numbers, counts[span.start - first : span.stop - first])
            for span, numbers in self.units[start:stop]
        ]

    def forward(
        self,
        input: Tensor,
        counts: Sequence[int],
        first: int = 0,
        used: Sequence[Tensor] = (),
        called: Sequence[bool] | None = None,
    ) -> Tensor:
        """The products of rows with their experts; tiles whose experts have no rows are left alone.

        Args:
            input: (N, in), grouped by expert.
            counts: rows of expert `first` and of those after it; they add up to N. The last of them
                ends a unit, and `first` begins one.
            first: the first expert.
            used: as of `StackTile.forward`; by default those of this stack.
            called: of each expert whether its tiles are called, at least where it has rows; by
                default `called_experts` of this stack.

        Returns:
            (N, out), in the same order.
        """
        units = self.units_of(counts, first)
        rows = input.split([sum(some) for _, some in units])
        called = called_experts([self], counts, first) if called is None else called
        calls = [any(some) for _, some in self.units_of(called, first)]
        used = used or self.used(counts, first)
        with layer_call():
            parts = [
                self._product(numbers, x, some, used)
                for (numbers, some), x, is_called in zip(units, rows, calls, strict=True)
                if is_called
            ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _product(
        self, numbers: Sequence[int], x: Tensor, counts: Sequence[int], used: Sequence[Tensor]
    ) -> Tensor:
        if len(numbers) == 1:
            result: Tensor = self.stacks[numbers[0]](x, counts=counts, used=used)
            return result
        sizes = [self.grid.out_spans[number].size for number in numbers]
        bounds = tuple(sum(sizes[:n]) for n in range(len(sizes) + 1))
        grid, chunks = Grid(bounds, (0, self.columns)), ops.float32_edges(x, len(numbers))
        if self.is_transposed:
            grid, chunks = Grid((0, self.columns), bounds), iter(x.split(sizes, -1))
        pairs = zip(grid.indices(), zip(numbers, chunks, strict=True), strict=True)
        return ops.write_results(
            (
                (index, self.stacks[number](chunk, counts=counts, used=used))
                for index, (number, chunk) in pairs
            ),
            grid,
        )

    @property
    def shape(self) -> torch.Size:
        """As of the parameter: (E, R, C)."""
        return torch.Size(self.dense_shape("weight"))

    @property
    def dtype(self) -> torch.dtype:
        """As of the parameter."""
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        """As of the parameter; where the tiles are while nobody works on them."""
        return self.weight.device

    def __getitem__(self, ids: Any) -> Tensor:
        """The matrices of some experts, as indexing the parameter would give them.

        Only these are read, where `ids` is a number, a slice or a tensor of numbers.
        """
        if isinstance(ids, tuple) or (isinstance(ids, Tensor) and ids.dtype == torch.bool):
            return self.weight[ids]
        wanted = torch.arange(self.experts)[ids.cpu() if isinstance(ids, Tensor) else ids]
        found, places = wanted.unique(return_inverse=True)
        matrices = torch.stack([self._expert(expert) for expert in found.tolist()])
        return matrices[places.to(matrices.device)]

    def _expert(self, expert: int) -> Tensor:
        """(R, C) of one expert."""
        span, numbers = next(
            unit for unit in self.units if unit[0].overlap(Span(expert, expert + 1))
        )
        weights: list[Any] = [self.stacks[number].weight for number in numbers]
        catch_up(weights)
        if len(weights) > 1:
            return torch.cat(weights)
        result: Tensor = weights[0].unflatten(0, (-1, self.rows))[expert - span.start]
        return result

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Let torch's functions take a stack as they take its parameter."""
        return func(*tree_map(_as_tensor, tuple(args)), **tree_map(_as_tensor, dict(kwargs or {})))


def _as_tensor(value: Any) -> Any:  # whatever a function is given
    return value.weight if isinstance(value, TiledStack) else value


def _check_grid(grid: Grid, experts: int, rows: int, columns: int) -> None:
    whole = (grid.out_features, grid.in_features, grid.in_splits) == (experts * rows, columns, 1)
    inside = all(
        span.start // rows == (span.stop - 1) // rows or not (span.start % rows or span.stop % rows)
        for span in grid.out_spans
    )
    if not (whole and inside):
        raise TileShapeError(
            f"a grid with bounds {grid.out_parts[:6]}… × {grid.in_parts} cuts no stack of "
            f"{experts} experts of {rows}×{columns}: a tile is some rows of one expert, or whole "
            "experts, in one column; Grid.split_stack(experts, rows, columns, out_splits) makes one"
        )
