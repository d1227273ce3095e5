"""The autograd function of one tile of a head whose logits are summed and never kept.

Shapes: N tokens, H width, V classes of the tile; x (N, H), W (V, H), b (V,).

The logits are computed in blocks of rows × classes, forward and again in backward, where a block
becomes its own gradient du in place; db = Σ_n du, dW = duᵀ x and dx = du W. Classes are the outer
loop, so that each part of dW is finished before the next is begun. dx is summed in float32, and so
is dW over several blocks of rows.

A block is in the dtype of the products, and what is between two products (exponentials and sums)
is float32, in strips that stay in the cache: a block of 16-bit logits has no float32 copy.

There is one function per tile, as in `ops.parked`: a parked tile is read once in forward and once
in backward, and its gradient is whole and at home, or stepped with, before the next tile's begins.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from memtile.geometry import Span, spans_of_size
from memtile.homes import allocation_of
from memtile.observing import recording
from memtile.observing.recording import BACKWARD, FORWARD, clock
from memtile.ops.live_bytes import counted_parts
from memtile.ops.logits import (
    LogitQuery,
    LogitSums,
    combine_sums,
    differentiate_block,
    join_rows_of_sums,
    sum_block,
    sum_logits,
)
from memtile.ops.parked import form_gradient, no_autocast
from memtile.ops.products import (
    add_product,
    is_batched,
    strips_of,
    sum_of_products,
    sum_of_rows,
    wide_dtype,
    write_products,
)
from memtile.transfer import ParkedSource, catch_up

# 16 MiB of float32 logits. At 2048 rows smaller blocks make products slower, larger ones no faster.
LOGIT_ELEMENTS: Final = 1 << 22
MOST_ROWS: Final = 1 << 11


@dataclass(frozen=True)
class LogitBlocks:
    """The block of logits that is in memory at once, and the dtype of its products."""

    rows: int
    classes: int
    dtype: torch.dtype

    @classmethod
    def fitting(
        cls, tokens: int, rows: int | None, classes: int | None, dtype: torch.dtype
    ) -> "LogitBlocks":
        """The given sizes, and what is left out chosen for as many tokens."""
        rows = rows or min(max(tokens, 1), MOST_ROWS)
        return cls(rows, classes or max(1, LOGIT_ELEMENTS // rows), dtype)


def tile_logit_sums(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    query: LogitQuery,
    blocks: LogitBlocks,
    source: ParkedSource | None = None,
) -> LogitSums:
    """The sums (N,) of a tile's logits, which never exist; x (N, H), weight (V, H), bias (V,).

    With a source the weight is parked: the parameter itself, whose values come from the source.
    """
    return LogitSums(*_TileLogitSums.apply(x, weight, bias, query, blocks, source))  # type: ignore[no-untyped-call]  # torch leaves it untyped


def plain_logit_sums(
    x: Tensor, weight: Tensor, bias: Tensor | None, query: LogitQuery, dtype: torch.dtype
) -> LogitSums:
    """The same in ordinary operations, which keep the tile's logits: for compilers, transforms."""
    with no_autocast(x):
        bias = None if bias is None else bias.to(dtype)
        logits = torch.nn.functional.linear(x.to(dtype), weight.to(dtype), bias)
    return sum_logits(query, logits.to(wide_dtype(dtype)))


class _TileLogitSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # torch gives FunctionCtx no fields, so mypy cannot know those set here
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        query: LogitQuery,
        blocks: LogitBlocks,
        source: ParkedSource | None,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        if source is not None and any(ctx.needs_input_grad):
            source.note_use()
        begun = clock() if source is not None and recording.active else 0
        with no_autocast(x), _values(source, weight, x.device) as values:
            sums = _Visit(x, values, bias, query, blocks).sums()
        if begun:
            recording.add(FORWARD, begun, allocation_of(weight) or weight)
        resident = weight if source is None else None
        ctx.save_for_backward(x, resident, bias, sums.log_sum_exp, sums.mean)
        ctx.weight, ctx.query, ctx.blocks, ctx.source = weight, query, blocks, source
        if sums.mass is not None:
            ctx.mark_non_differentiable(sums.mass)
        return tuple(sums)

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        found = [grad for grad in given if grad is not None]
        if not found:
            return (None,) * 6
        if ctx.source is not None:
            ctx.source.resume()
        if torch.is_grad_enabled() or any(map(is_batched, found)):
            return *_differentiably(ctx, given), None, None, None
        x, _, bias, log_sum_exp, mean = ctx.saved_tensors
        sums = LogitSums(log_sum_exp, None, None, None, mean)
        first = torch.zeros_like(log_sum_exp) if given[0] is None else given[0]
        grads = LogitSums(first, *given[1:])
        begun = clock() if ctx.source is not None and recording.active else 0
        with no_autocast(x), _values(ctx.source, ctx.weight, x.device) as values:
            visit = _BackwardVisit(x, values, bias, ctx.query, ctx.blocks, sums, grads)
            results = visit.gradients(ctx)
        if begun:
            recording.add(BACKWARD, begun, allocation_of(ctx.weight) or ctx.weight)
        return *results, None, None, None


@dataclass(eq=False)
class _Visit:
    """One pass over the blocks of a tile's logits."""

    x: Tensor
    values: Tensor
    bias: Tensor | None
    query: LogitQuery
    blocks: LogitBlocks

    def __post_init__(self) -> None:
        self.dtype = self.blocks.dtype
        self.rows = spans_of_size(len(self.x), self.blocks.rows)
        self.classes = spans_of_size(len(self.values), self.blocks.classes)
        size = self.rows[0].size * self.classes[0].size
        self.buffer = self.x.new_empty(size, dtype=self.dtype)

    def sums(self) -> LogitSums:
        """The sums of all tokens over all classes of the tile."""
        parts = counted_parts(self.classes, self.x)
        return combine_sums([self._sums_of(classes) for classes in parts])

    def _sums_of(self, classes: Span) -> LogitSums:
        matrix, parts = self.matrix(classes), list[LogitSums]()
        for rows in counted_parts(self.rows, self.x):
            logits = self.logits(rows, classes, matrix)
            for part, strip in _strips(rows, logits):
                parts.append(
                    sum_block(self.query.of(part, classes), strip.to(wide_dtype(self.dtype)))
                )
        return join_rows_of_sums(parts, len(self.x))

    def matrix(self, classes: Span) -> Tensor:
        """These rows of the weight, in the products' dtype."""
        return self.values[classes.as_slice()].to(self.dtype)

    def logits(self, rows: Span, classes: Span, matrix: Tensor) -> Tensor:
        """x Wᵀ + b of a block, in a buffer that the next block overwrites."""
        out = self.buffer[: rows.size * classes.size].view(rows.size, classes.size)
        bias = None if self.bias is None else self.bias[classes.as_slice()].to(self.dtype)
        sum_of_products(out, [(self.inputs(rows), matrix.t())], 1, bias)
        return out

    def inputs(self, rows: Span) -> Tensor:
        """These rows of x, in the products' dtype."""
        return self.x[rows.as_slice()].to(self.dtype)


@dataclass(eq=False)
class _BackwardVisit(_Visit):
    """The same, with each block turned into its gradient."""

    known: LogitSums
    grads: LogitSums
    dx: Tensor | None = None
    db: Tensor | None = None
    is_done: bool = False

    def gradients(self, ctx: Any) -> tuple[Tensor | None, ...]:
        """Those of x, weight and bias; None for a weight whose gradient went home."""
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        wide, dw = wide_dtype(self.dtype), None
        if needs_x:
            self.dx = torch.zeros_like(self.x, dtype=wide, memory_format=torch.contiguous_format)
        if needs_bias and self.bias is not None:
            self.db = torch.zeros_like(self.bias, dtype=wide)
        if needs_weight and ctx.source is not None:
            dw = form_gradient(ctx.next_functions[1][0], ctx.weight, ctx.source, self.write)
        elif needs_weight:
            dw = torch.empty_like(ctx.weight, memory_format=torch.contiguous_format)
            self.write(dw)
        if not self.is_done:
            self.write(None)
        db = None if self.db is None or self.bias is None else self.db.to(self.bias.dtype)
        return None if self.dx is None else self.dx.to(self.x.dtype), dw, db

    def write(self, dw: Tensor | None) -> None:
        """Write the weight's gradient, and add up the others."""
        for classes in counted_parts(self.classes, self.x):
            pairs = self._factors(classes)
            if dw is None:
                for _ in pairs:
                    pass
            else:
                write_products(dw[classes.as_slice()], pairs, len(self.rows), self.buffer)
        self.is_done = True

    def _factors(self, classes: Span) -> Iterator[tuple[Tensor, Tensor]]:
        """The factors duᵀ and x of the weight's gradient, block after block of rows."""
        matrix = self.matrix(classes)
        for rows in counted_parts(self.rows, self.x):
            gradient = self.logits(rows, classes, matrix)
            for part, strip in _strips(rows, gradient):
                self._differentiate(part, classes, strip)
            if self.dx is not None:
                add_product(self.dx[rows.as_slice()], gradient, matrix)
            if self.db is not None:
                self.db[classes.as_slice()] += sum_of_rows(gradient)
            yield gradient.t(), self.inputs(rows)

    def _differentiate(self, rows: Span, classes: Span, strip: Tensor) -> None:
        query = self.query.of(rows, classes)
        known, grads = _rows_of(self.known, rows), _rows_of(self.grads, rows)
        found = differentiate_block(query, strip.to(wide_dtype(self.dtype)), known, grads)
        if found.dtype != strip.dtype:  # otherwise it has been written in place
            strip.copy_(found)


def _differentiably(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Backward in ordinary operations, on the parameter itself where it is parked."""
    x, _, bias, *_ = ctx.saved_tensors
    if ctx.source is not None:
        catch_up((ctx.weight,))  # a replay in forward may still be on its way home
    with torch.enable_grad():
        # aliases, so that hooks on the tensors themselves are not called here
        given = [None if each is None else each.view_as(each) for each in (x, ctx.weight, bias)]
        assert given[0] is not None
        assert given[1] is not None
        sums = plain_logit_sums(given[0], given[1], given[2], ctx.query, ctx.blocks.dtype)
        pairs = [
            (s, g) for s, g in zip(sums, grads, strict=True) if s is not None and g is not None
        ]
        needed = [place for place in range(3) if ctx.needs_input_grad[place]]
        found = torch.autograd.grad(
            [s for s, _ in pairs],
            [given[place] for place in needed],  # type: ignore[arg-type]  # those needed are not None
            [g for _, g in pairs],
            create_graph=torch.is_grad_enabled(),
        )
    by_place = dict(zip(needed, found, strict=True))
    return tuple(by_place.get(place) for place in range(3))


def _values(
    source: ParkedSource | None, weight: Tensor, device: torch.device
) -> AbstractContextManager[Tensor]:
    return nullcontext(weight.detach()) if source is None else source.values(device)


def _strips(rows: Span, block: Tensor) -> Iterator[tuple[Span, Tensor]]:
    for part in strips_of(block):
        yield Span(rows.start + part.start, rows.start + part.stop), block[part.as_slice()]


def _rows_of(sums: LogitSums, rows: Span) -> LogitSums:
    found = (None if each is None else each[rows.as_slice()] for each in sums)
    return LogitSums(*found)  # type: ignore[arg-type]  # the first is never None
