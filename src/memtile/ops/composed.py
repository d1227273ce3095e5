"""The composed path: tiles are called as modules, and their results written into one output.

An autograd function puts each result into its slice of the output, in place, and gives the slice
of the gradient back: no clone, no `cat`. Partial sums of 16-bit results are float32.

`float32_edges` makes autograd sum the input gradient over many rows of tiles in float32 too: each
tile gets its input through a node that owns no memory, receives every tile's gradient in float32
and casts the sum once. Without it the engine adds in 16 bits: 5.9 × the dense error at 64 rows,
1.4 × with it.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from memtile.errors import TileClassError
from memtile.geometry import Grid
from memtile.ops.products import SIXTEEN_BITS, add_into, needs_float32_sum

Feed = Iterable[tuple[tuple[int, int], Tensor]]


def write_results(feed: Feed, grid: Grid) -> Tensor:
    """The output (…, out_features) that the tiles' results make, each summed into its row.

    The feed gives ((row, column), result) row by row; each is taken after the last was written.
    Where results are narrower than their span by a whole factor (shards of a tensor-parallel
    linear), the output is narrower by it too.
    """
    if grid.out_splits == grid.in_splits == 1:
        return write_rows(feed, grid)[0]
    writer = None
    for index, result in feed:
        writer = writer or _Writer(result, grid)
        writer.write(index, result)
        del result  # or it would live on beside the next tile's
    assert writer is not None
    return writer.out


def write_rows(feed: Feed, grid: Grid) -> list[Tensor]:
    """The rows of the output as separate tensors, for a layer that does not combine them."""
    rows: list[Tensor] = []
    shapes, writer = None, None
    for (row, column), result in feed:
        shapes = shapes or ResultShapes(result, grid)
        shapes.check((row, column), result)
        if grid.in_splits == 1:
            rows.append(result)
            continue
        if column == 0:
            writer = _Writer(result, Grid((0, grid.out_spans[row].size), grid.in_parts))
        assert writer is not None
        writer.write((0, column), result)
        del result  # as above
        if column == grid.in_splits - 1:
            rows.append(writer.out)
    return rows


class ResultShapes:
    """Checks that every tile returns its out-span, or the same whole fraction of it (a shard)."""

    def __init__(self, first: Tensor, grid: Grid) -> None:
        span, width = grid.out_spans[0].size, first.shape[-1] if first.dim() else 0
        if not width or span % width:
            raise TileClassError(
                f"tile (0, 0) returned shape {tuple(first.shape)} where its out-span has {span} "
                "features: a tile must return its whole span, or a whole fraction of it (one "
                "tensor-parallel shard); correct the forward of linear_cls"
            )
        self.grid, self.lead, self.shards = grid, first.shape[:-1], span // width
        self.dtype = first.dtype
        if any(bound % self.shards for bound in grid.out_parts):
            raise TileClassError(
                f"tile (0, 0) returned {width} of {span} features, one of {self.shards} shards, "
                f"but the out-spans {grid.out_parts} do not divide by {self.shards}; choose "
                "out_splits so that every span does"
            )

    def check(self, index: tuple[int, int], result: Tensor) -> None:
        """Raise TileClassError unless the result of the tile at `index` has the right shape."""
        expected = (*self.lead, self.grid.out_spans[index[0]].size // self.shards)
        if result.dtype != self.dtype:
            raise TileClassError(
                f"tile {index} returned {result.dtype}, tile (0, 0) {self.dtype}: results of "
                "different dtypes have no common output; convert the tiles to one dtype"
            )
        if tuple(result.shape) != expected:
            raise TileClassError(
                f"tile {index} returned shape {tuple(result.shape)}, expected {expected}: every "
                "tile must return the shape of tile (0, 0), as wide as its own out-span; correct "
                "the forward of linear_cls"
            )


class _Writer:
    """Holds the output, and the float32 sum of the row that is being written."""

    def __init__(self, first: Tensor, grid: Grid) -> None:
        self.grid, self.shapes = grid, ResultShapes(first, grid)
        self.out = first.new_empty((*first.shape[:-1], grid.out_features // self.shapes.shards))
        self.total: Tensor | None = None

    def write(self, index: tuple[int, int], result: Tensor) -> None:
        self.shapes.check(index, result)
        row, column = index
        start = self.grid.out_spans[row].start // self.shapes.shards
        last = column == self.grid.in_splits - 1
        if column == 0 and needs_float32_sum(result.dtype, self.grid.in_splits):
            self.total = result.new_zeros(result.shape, dtype=torch.float32)
        self.out = _Place.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
            self.out, result, start, column, last, self.total
        )
        if last:
            self.total = None


class _Place(torch.autograd.Function):
    """Write, or add, one result into its slice of the output; the gradient is that slice.

    The running float32 total is not in the graph: each result's gradient is the slice's gradient,
    whichever way the sum was computed.
    """

    @staticmethod
    def forward(
        ctx: Any,  # torch gives FunctionCtx no fields, so mypy cannot know those set here
        out: Tensor,
        result: Tensor,
        start: int,
        column: int,
        last: bool,
        total: Tensor | None,
    ) -> Tensor:
        ctx.start, ctx.width, ctx.dtype = start, result.shape[-1], result.dtype
        ctx.mark_dirty(out)
        place = out.narrow(-1, start, result.shape[-1])
        if total is not None:
            add_into(total, result)
            if last:
                place.copy_(total)
        elif column == 0:
            place.copy_(result)
        else:
            place.add_(result)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        part = None
        if ctx.needs_input_grad[1]:
            part = grads[0].narrow(-1, ctx.start, ctx.width).to(ctx.dtype)
        return grads[0], part, None, None, None, None


def float32_edges(chunk: Tensor, rows: int) -> Iterator[Tensor]:
    """`rows` aliases of `chunk`, one for each row of tiles; gradients are summed in float32."""
    is_tracked = chunk.requires_grad and torch.is_grad_enabled()
    if rows == 1 or chunk.dtype not in SIXTEEN_BITS or not is_tracked:
        yield from (chunk for _ in range(rows))
        return
    yield from edges_of(float32_edge(chunk), chunk.detach(), rows)


def edges_of(node: Tensor, value: Tensor, rows: int) -> Iterator[Tensor]:
    """`rows` aliases of `value`, whose gradients are handed to `node` in its dtype."""
    for _ in range(rows):
        yield _Edge.apply(node, value)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def float32_edge(chunk: Tensor) -> Tensor:
    """A float32 tensor without memory that stands for `chunk`: its gradient is cast to chunk's."""
    edge: Tensor = _Float32Node.apply(chunk)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return edge


def float32_casts(chunk: Tensor, rows: int) -> Iterator[Tensor]:
    """The same in operations that every transform supports; costs a copy for each row."""
    if rows == 1 or chunk.dtype not in SIXTEEN_BITS:
        yield from (chunk for _ in range(rows))
        return
    wide = chunk.to(torch.float32)
    for _ in range(rows):
        yield wide.to(chunk.dtype)


class _Float32Node(torch.autograd.Function):
    """A float32 tensor of the input's shape that owns no memory; its gradient is cast once."""

    @staticmethod
    def forward(ctx: Any, chunk: Tensor) -> Tensor:
        ctx.dtype = chunk.dtype
        return chunk.new_zeros(1, dtype=torch.float32).expand(chunk.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].to(ctx.dtype)


class _Edge(torch.autograd.Function):
    """The input's value with the float32 node as its origin."""

    @staticmethod
    def forward(ctx: Any, node: Tensor, value: Tensor) -> Tensor:
        ctx.dtype = node.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.dtype), None


def join_rows(rows: Sequence[Tensor]) -> Tensor:
    """The rows of an output side by side along the last dimension."""
    return rows[0] if len(rows) == 1 else torch.cat(list(rows), dim=-1)


def split_tensor_along_last_dim(
    tensor: Tensor, partitions: Sequence[int], contiguous_split_chunks: bool = False
) -> tuple[Tensor, ...]:
    """Chunks of the given sizes along the last dimension.

    Args:
        tensor: (…, width).
        partitions: sizes that add up to the width.
        contiguous_split_chunks: give contiguous copies instead of views.

    Returns:
        One view of `tensor` for each size, or one contiguous copy.

    Examples:
        >>> three, two = memtile.split_tensor_along_last_dim(torch.zeros(8, 5), [3, 2])
        >>> three.shape
        torch.Size([8, 3])
    """
    chunks = torch.split(tensor, list(partitions), dim=-1)
    return tuple(chunk.contiguous() for chunk in chunks) if contiguous_split_chunks else chunks
