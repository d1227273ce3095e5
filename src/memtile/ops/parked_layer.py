"""A layer of parked tiles: products are written into the layer's output, and nowhere else.

Shapes: as in `ops.parked`; a chunk x_i (…, in_i) is the input of a column of tiles, y (…, out)
the output, or one tensor (…, out_o) for each row of tiles.

Every tile has a node of its own in the graph, so that its gradient is complete, stepped and dropped
before the next one is formed. The nodes are a chain: the output passes through all of them, and
each writes its slice. In backward the output's gradient passes through them the other way, and
with it, through the `edge` of each chunk, the gradient of x_i: one buffer, to which each tile adds
its product. The buffer of 16-bit tiles is float32, and is cast once, where the edge began.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from memtile.geometry import Grid
from memtile.homes import allocation_of
from memtile.observing import recording
from memtile.observing.recording import BACKWARD, FORWARD, clock
from memtile.ops.composed import float32_edge
from memtile.ops.parked import differentiably, no_autocast, weight_gradient
from memtile.ops.products import SIXTEEN_BITS, add_product, is_batched, sum_of_products
from memtile.transfer import ParkedSource

Operands = Sequence[tuple[Any, Tensor | None]]  # Any: a parameter, as a source takes it

_REST: Final = (None, None, None)  # gradients of what is no tensor of the graph


class _TilePlace(NamedTuple):
    """Which part of the output a tile writes, and who comes before and after it."""

    start: int  # its columns of the output tensor
    stop: int
    width: int  # of the output tensor
    column: int  # of tiles; those after 0 add to what is there
    is_last: bool  # of its row
    passes_on: bool  # a later tile gets the same chunk


@lru_cache(maxsize=1024)
def _places(grid: Grid, combine: bool) -> tuple[_TilePlace, ...]:
    """Those of all tiles, row by row."""
    return tuple(
        _TilePlace(
            out.start if combine else 0,
            out.stop if combine else out.size,
            grid.out_features if combine else out.size,
            column,
            column == grid.in_splits - 1,
            row < grid.out_splits - 1,
        )
        for row, out in enumerate(grid.out_spans)
        for column in range(grid.in_splits)
    )


def parked_layer(
    chunks: Sequence[Tensor], tiles: Operands, grid: Grid, combine: bool
) -> Tensor | list[Tensor]:
    """y (…, out), or a list of its rows without `combine`, of the chunks, one for each column.

    The tiles are (weight, bias or None), row by row, all weights parked and of the chunks' dtype,
    or of one that autocast casts to it.
    """
    tracked = torch.is_grad_enabled() and _needs_gradient(chunks, tiles)
    edges = [_first_edge(x, grid.out_splits) if tracked else None for x in chunks]
    outs: list[Tensor] = []
    total = None
    for place, (weight, bias) in zip(_places(grid, combine), tiles, strict=True):
        x, edge, source = chunks[place.column], edges[place.column], ParkedSource(weight)
        if place.column == 0:
            total = _total(x, place) if grid.in_splits > 1 else None
            if not (outs and combine):
                outs.append(x.new_empty((*x.shape[:-1], place.width)))
        if tracked:
            outs[-1], edges[place.column] = _PlacedProduct.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
                x, weight, bias, outs[-1], edge, total, source, place
            )
        else:
            _write(x, bias, outs[-1], total, source, place)
    return outs[0] if combine else outs


def _needs_gradient(chunks: Sequence[Tensor], tiles: Operands) -> bool:
    return any(x.requires_grad for x in chunks) or any(
        weight.requires_grad or (bias is not None and bias.requires_grad) for weight, bias in tiles
    )


def _first_edge(x: Tensor, rows: int) -> Tensor | None:
    """What the gradient of x (…, in_i) is summed through, where several tiles get it."""
    if rows == 1 or not x.requires_grad:
        return None
    return float32_edge(x) if x.dtype in SIXTEEN_BITS else x


def _total(x: Tensor, place: _TilePlace) -> Tensor | None:
    """What a row of several 16-bit tiles is summed in."""
    if x.dtype not in SIXTEEN_BITS:
        return None
    rows = x.shape[:-1].numel()
    return torch.empty((rows, place.stop - place.start), dtype=torch.float32, device=x.device)


def _write(
    x: Tensor,
    bias: Tensor | None,
    out: Tensor,
    total: Tensor | None,
    source: ParkedSource,
    place: _TilePlace,
) -> None:
    """Write a tile's product to its place in the output, or add it."""
    if not out.numel():  # no tokens: nothing is read
        return
    begun = clock() if recording.active else 0
    part = out.view(-1, place.width)[:, place.start : place.stop]
    rows, sums = x.reshape(-1, x.shape[-1]), part if total is None else total
    with no_autocast(x), source.values(x.device) as values:
        matrix = values.to(x.dtype).t()
        if place.column == 0 and total is None:
            sum_of_products(part, [(rows, matrix)], 1, bias)
        else:
            add_product(sums, rows, matrix, bias, is_first=place.column == 0)
    if total is not None and place.is_last:
        part.copy_(total)
    if begun:
        recording.add(FORWARD, begun, allocation_of(source.parameter) or source.parameter)


class _PlacedProduct(torch.autograd.Function):
    """One tile's product in the chain; gives the output, and the edge for the next tile."""

    @staticmethod
    def forward(
        ctx: Any,  # torch gives FunctionCtx no fields, so mypy cannot know those set here
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        out: Tensor,
        edge: Tensor | None,
        total: Tensor | None,
        source: ParkedSource,
        place: _TilePlace,
    ) -> tuple[Tensor, Tensor | None]:
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(out)
        ctx.save_for_backward(x if needs_weight else None)
        ctx.source, ctx.weight, ctx.groups, ctx.place = source, weight, None, place
        ctx.shape, ctx.sums = x.shape, None if edge is None else edge.dtype
        if needs_x or needs_weight:
            source.note_use()
        _write(x, bias, out, total, source, place)
        return out, edge.detach() if edge is not None and place.passes_on else None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, dx = grads
        if grad is None:  # of this row of the output; dx is of rows after it
            return None, None, None, None, dx, *_REST
        ctx.source.resume()
        needed, place = ctx.needs_input_grad, ctx.place
        if torch.is_grad_enabled() or is_batched(grad):
            return _differentiably(ctx, grad, dx)
        begun = clock() if recording.active else 0
        grad = grad.contiguous()  # once: the next nodes get this one
        part = grad.view(-1, place.width)[:, place.start : place.stop]
        dw = db = None
        with no_autocast(grad):
            if needed[0]:
                dx = _add_input_gradient(ctx, part, dx)
            if needed[1]:
                dw = weight_gradient(ctx, part)
            if needed[2]:
                db = part.sum(0)
        if begun:
            recording.add(BACKWARD, begun, allocation_of(ctx.source.parameter) or ctx.weight)
        return (None, dw, db, grad, dx, *_REST) if ctx.sums else (dx, dw, db, grad, None, *_REST)


def _add_input_gradient(ctx: Any, grad: Tensor, dx: Tensor | None) -> Tensor:
    """The gradient of x with this tile's part g W in it; it is added to dx, in place."""
    is_first, dtype = dx is None, ctx.sums or grad.dtype
    if dx is None:
        dx = grad.new_empty(ctx.shape, dtype=dtype)
    if not dx.numel():
        return dx
    rows = dx.view(-1, ctx.shape[-1])
    with ctx.source.values(grad.device) as values:
        matrix = values.to(grad.dtype)
        if is_first and dtype == grad.dtype:
            sum_of_products(rows, [(grad, matrix)], 1)
        else:
            add_product(rows, grad, matrix, is_first=is_first)
    return dx


def _differentiably(ctx: Any, grad: Tensor, dx: Tensor | None) -> tuple[Tensor | None, ...]:
    place = ctx.place
    own, dw, db = differentiably(ctx, grad.narrow(-1, place.start, place.stop - place.start))
    if ctx.sums is None:
        return own, dw, db, grad, None, *_REST
    own = None if own is None else own.to(ctx.sums)
    if dx is not None and own is not None:
        own = dx + own
    return None, dw, db, grad, own, *_REST
