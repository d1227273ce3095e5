"""The fused path: one autograd function for a layer whose tiles are resident plain linears.

Shapes: N tokens, W (out_o, in_i) one tile; x is (…, in_features), or the in_splits chunks
(…, in_i) of an input that arrives split; x_i (N, in_i) and g_o (N, out_o) are slices of the input
and of the output's gradient.

Forward, row by row:        y_o = Σ_i x_i W_oiᵀ + b_o, written into its slice of y.
Backward, column by column: dx_i = Σ_o g_o W_oi and dW_oi = g_oᵀ x_i, each tile visited once.

Saved are the input and the weights, and only where a gradient will need them. Sums of 16-bit
products are float32 (`ops.products`); where it is faster, tiles are joined before they are
multiplied (`ops.joined`). Under `create_graph=True` the same formulas run as ordinary
differentiable operations.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memtile.geometry import Grid, Span
from memtile.ops.joined import multiply_joined, worth_joining
from memtile.ops.products import (
    is_batched,
    multiply,
    needs_float32_sum,
    sum_of_products,
    transformed,
)

Rows = list[tuple[int, Tensor]]


@dataclass(frozen=True, slots=True)
class FusedSpec:
    """The form of one call, and where each of its tensors stands in the flat argument list."""

    grid: Grid
    chunks: int  # how many tensors the input comes in: 1, or in_splits
    combine: bool  # whether the rows of the output are joined in one tensor
    has_bias: bool  # whether each row of tiles has one

    def weight(self, row: int, column: int) -> int:
        """Where the weight of tile (row, column) stands."""
        return self.chunks + row * self.grid.in_splits + column

    def bias(self, row: int) -> int:
        """Where the bias of a row of tiles stands."""
        return self.chunks + self.grid.out_splits * self.grid.in_splits + row

    @property
    def is_whole(self) -> bool:
        """Whether the input is one tensor, and the output too."""
        return self.chunks == 1 and self.combine

    def weights(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The weights among the flat arguments, row by row."""
        return tensors[self.chunks : self.bias(0)]

    def input(self, column: int) -> int:
        """Where the tensor stands that holds the input's chunk `column`."""
        return column if self.chunks > 1 else 0


def fused_linear(
    spec: FusedSpec, inputs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> Tensor | tuple[Tensor, ...]:
    """The output y (…, out_features), or one tensor (…, out_o) for each row without `spec.combine`.

    `inputs` are x or its chunks, `weights` go row by row, `biases` are one for each row, or none.
    """
    result: Tensor | tuple[Tensor, ...]
    result = _FusedLinear.apply(spec, *inputs, *weights, *biases)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return result


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # torch gives FunctionCtx no fields, so mypy cannot know those set here
        spec: FusedSpec,
        *tensors: Tensor,
    ) -> Tensor | tuple[Tensor, ...]:
        ctx.spec, ctx.lead = spec, tensors[0].shape[:-1]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*_needed_later(spec, tensors, ctx.needs_input_grad[1:]))
        biases = tensors[spec.bias(0) :]
        if spec.is_whole and worth_joining(tensors[0], spec.grid, transposed=True):
            weights = spec.weights(tensors)
            return multiply_joined(tensors[0], spec.grid, weights, biases, transposed=True)
        rows, result = _empty_rows(spec, tensors[0], ctx.lead)
        x = _input_columns(spec, tensors)
        for o, row in enumerate(rows):
            factors = ((x[i], tensors[spec.weight(o, i)].t()) for i in range(len(x)))
            sum_of_products(row, factors, len(x), biases[o] if biases else None)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, needed = _gradient_rows(ctx.spec, ctx.lead, grads), [*ctx.needs_input_grad[1:]]
        if not rows:
            return (None,) * len(ctx.needs_input_grad)
        traced = torch.is_grad_enabled() or transformed() or is_batched(rows[0][1])
        saved = ctx.saved_tensors  # read once: a checkpoint unpacks each tensor only once
        dx = None if traced else _joined_gradient(ctx.spec, grads[0], saved, needed[0])
        needed[0] &= dx is None
        results = _backward(ctx.spec, ctx.lead, saved, rows, needed, traced)
        return (None, results[0] if dx is None else dx, *results[1:])


def _needed_later(
    spec: FusedSpec, tensors: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor | None]:
    """What backward will read: inputs for weight gradients, weights for input gradients."""
    first_bias = spec.bias(0)
    keep_inputs = any(needed[spec.chunks : first_bias])
    keep_weights = any(needed[: spec.chunks])
    return [
        tensor if (keep_inputs if place < spec.chunks else keep_weights) else None
        for place, tensor in enumerate(tensors[:first_bias])
    ]


def _joined_gradient(
    spec: FusedSpec, g: Tensor | None, saved: Sequence[Tensor], needed: bool
) -> Tensor | None:
    """The input's gradient over joined tiles, where it is needed and that is faster."""
    if g is None or not needed or not spec.is_whole:
        return None
    if not worth_joining(g, spec.grid, transposed=False):
        return None
    return multiply_joined(g, spec.grid, spec.weights(saved), transposed=False)


def _input_columns(spec: FusedSpec, tensors: Sequence[Tensor]) -> list[Tensor]:
    flat = [chunk.reshape(-1, chunk.shape[-1]) for chunk in tensors[: spec.chunks]]
    return flat if spec.chunks > 1 else _columns(flat[0], spec.grid.in_spans)


def _columns(matrix: Tensor, spans: Sequence[Span]) -> list[Tensor]:
    return [matrix[:, span.as_slice()] for span in spans]


def _empty_rows(
    spec: FusedSpec, like: Tensor, lead: torch.Size
) -> tuple[list[Tensor], Tensor | tuple[Tensor, ...]]:
    """The rows of the output as matrices to write into, and what the caller gets."""
    tokens, spans = lead.numel(), spec.grid.out_spans
    if spec.combine:
        out = like.new_empty((*lead, spec.grid.out_features))
        return _columns(out.view(tokens, out.shape[-1]), spans), out
    outs = tuple(like.new_empty((*lead, span.size)) for span in spans)
    return [out.view(tokens, out.shape[-1]) for out in outs], outs


def _gradient_rows(spec: FusedSpec, lead: torch.Size, grads: Sequence[Tensor | None]) -> Rows:
    """(row, gradient as a matrix) of each row of the output that a gradient arrived for."""
    tokens = lead.numel()
    if spec.combine and grads[0] is not None:
        whole = grads[0].reshape(tokens, spec.grid.out_features)
        return list(enumerate(_columns(whole, spec.grid.out_spans)))
    return [(o, g.reshape(tokens, g.shape[-1])) for o, g in enumerate(grads) if g is not None]


def _backward(
    spec: FusedSpec,
    lead: torch.Size,
    saved: Sequence[Tensor],
    rows: Rows,
    needed: Sequence[bool],
    traced: bool,
) -> list[Tensor | None]:
    """The gradients, computed column by column; in differentiable operations when `traced`."""
    results: list[Tensor | None] = [None] * len(needed)
    columns: list[Tensor] = []
    for i, span in enumerate(spec.grid.in_spans):
        visit = _visit_column(spec, saved, rows, i, needed, results)
        if not needed[spec.input(i)]:
            deque(visit, maxlen=0)
        elif not traced:
            target = _empty_input_gradient(spec, lead, rows[0][1], i, results)
            sum_of_products(target, visit, len(rows))
        else:
            columns.append(_differentiable_sum(visit, len(rows)).reshape(*lead, span.size))
            results[spec.input(i)] = columns[-1]
    if columns and spec.chunks == 1:
        results[0] = torch.cat(columns, dim=-1)
    for o, g in rows:
        if spec.has_bias and needed[spec.bias(o)]:
            results[spec.bias(o)] = g.sum(0)
    return results


def _empty_input_gradient(
    spec: FusedSpec, lead: torch.Size, like: Tensor, column: int, results: list[Tensor | None]
) -> Tensor:
    """A matrix to write the column's input gradient into: a slice of what is in `results`."""
    span, gradient = spec.grid.in_spans[column], results[spec.input(column)]
    if gradient is None:
        width = span.size if spec.chunks > 1 else spec.grid.in_features
        gradient = results[spec.input(column)] = like.new_empty((*lead, width))
    matrix = gradient.view(lead.numel(), gradient.shape[-1])
    return matrix if spec.chunks > 1 else matrix[:, span.as_slice()]


def _visit_column(
    spec: FusedSpec,
    saved: Sequence[Tensor],
    rows: Rows,
    column: int,
    needed: Sequence[bool],
    results: list[Tensor | None],
) -> Iterator[tuple[Tensor, Tensor]]:
    """The factors of the column's input gradient; puts its weight gradients into `results`."""
    trained = any(needed[spec.weight(o, column)] for o, _ in rows)
    x = _input_columns(spec, saved)[column] if trained else None
    for o, g in rows:
        place = spec.weight(o, column)
        if x is not None and needed[place]:
            results[place] = multiply(g.t(), x)
        yield g, saved[place]


def _differentiable_sum(factors: Iterator[tuple[Tensor, Tensor]], parts: int) -> Tensor:
    total, dtype = None, None
    for a, b in factors:
        part, dtype = multiply(a, b), a.dtype
        if needs_float32_sum(dtype, parts):
            part = part.to(torch.float32)
        total = part if total is None else total + part
    assert total is not None
    assert dtype is not None
    return total.to(dtype)
