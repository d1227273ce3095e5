"""Looking up rows of a vocabulary that is cut into row tiles.

Shapes: ids any, D embedding_dim; rows (ids…, D). Every id lies in exactly one tile, so nothing is
summed and the result is bit-identical to the dense lookup.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from memtile.geometry import Span
from memtile.homes import allocation_of, read_rows_ahead
from memtile.observing import recording
from memtile.observing.recording import BACKWARD, FORWARD, clock
from memtile.ops.parked import form_gradient
from memtile.ops.products import is_batched
from memtile.transfer import ParkedSource

Lookup = Callable[[Tensor], Tensor]


def gather_rows(ids: Tensor, lookups: Sequence[Lookup], spans: Sequence[Span], dim: int) -> Tensor:
    """The rows of `ids`; each tile is called with the ids that it holds only.

    A lookup takes (K,) ids counted from the first row of its span, and gives (K, D). Tiles that
    hold none of the ids are called too: their gradient is zero, not None, as in a dense embedding.
    """
    flat, out = ids.reshape(-1), None
    for lookup, span in zip(lookups, spans, strict=True):
        places = ((flat >= span.start) & (flat < span.stop)).nonzero().squeeze(1)
        if places.numel():
            rows = lookup(flat[places] - span.start)
        else:  # one row, dropped again: torch cannot differentiate an empty lookup twice
            rows = lookup(flat.new_zeros(1))[:0]
        if out is None:
            out = rows.new_empty((flat.numel(), dim))
        out = place_rows(out, rows, places)
    assert out is not None
    return out.view(*ids.shape, dim)


def gather_some_rows(
    ids: Tensor, lookups: Sequence[Lookup], spans: Sequence[Span], dim: int
) -> Tensor:
    """The same without gradients: tiles that hold none of the ids are not called."""
    stops = torch.tensor([span.stop for span in spans], device=ids.device)
    found = torch.bucketize(ids.reshape(-1), stops, right=True)
    owners = torch.unique(found).tolist() or [0]
    return gather_rows(ids, [lookups[o] for o in owners], [spans[o] for o in owners], dim)


def gather_rows_statically(ids: Tensor, lookups: Sequence[Lookup], spans: Sequence[Span]) -> Tensor:
    """The same with shapes that do not depend on the ids: for compilers and transforms."""
    out: Tensor | None = None
    for lookup, span in zip(lookups, spans, strict=True):
        held = (ids >= span.start) & (ids < span.stop)
        # Ids that no tile holds reach the first or the last tile unchanged: torch refuses them.
        low = None if span.start == 0 else 0
        high = None if span.stop == spans[-1].stop else span.size - 1
        inside = ids - span.start
        rows = lookup(inside if len(spans) == 1 else inside.clamp(low, high))
        out = rows if out is None else torch.where(held.unsqueeze(-1), rows, out)
    assert out is not None
    return out


def place_rows(out: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    """`out` (N, D) with the rows (K, D) written into it, in place, at different places (K,)."""
    result: Tensor = _PlaceRows.apply(out, rows, places)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return result


class _PlaceRows(torch.autograd.Function):
    """Write rows to their places in the output; their gradient is read from there."""

    @staticmethod
    def forward(
        ctx: Any,  # torch gives FunctionCtx no fields, so mypy cannot know those set here
        out: Tensor,
        rows: Tensor,
        places: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(places)
        ctx.mark_dirty(out)
        out[places] = rows
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return grads[0], grads[0][places], None


def parked_embedding(
    ids: Tensor,
    weight: Tensor,
    padding_idx: int | None,
    by_frequency: bool,
    source: ParkedSource,
) -> Tensor:
    """The rows (ids…, D) of a parked tile (K, D); only the pages that hold them are read.

    The rows are read where the parameter lies. The gradient of row `padding_idx` is zero; with
    `by_frequency` each row's gradient is divided by how often its id occurs.
    """
    result: Tensor = _ParkedEmbedding.apply(ids, weight, padding_idx, by_frequency, source)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return result


class _ParkedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # torch gives FunctionCtx no fields, so mypy cannot know those set here
        ids: Tensor,
        weight: Tensor,
        padding_idx: int | None,
        by_frequency: bool,
        source: ParkedSource,
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.padding, ctx.by_frequency = -1 if padding_idx is None else padding_idx, by_frequency
        ctx.source, ctx.weight = source, weight
        if ctx.needs_input_grad[1]:
            source.note_use()
        visited = source.visit()
        if visited is not None and not visited[0].home.is_mapped:  # then they are in memory
            read_rows_ahead(weight.detach(), ids)
        begun = clock() if recording.active else 0
        rows = functional.embedding(ids.to(weight.device), weight.detach())
        if begun:
            recording.add(FORWARD, begun, allocation_of(source.parameter) or weight)
        return rows.to(ids.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (ids,), grad = ctx.saved_tensors, grads[0]
        ctx.source.resume()
        rows, formed = ctx.weight.shape[0], torch.ops.aten.embedding_dense_backward
        if torch.is_grad_enabled() or is_batched(grad):
            dense = formed(grad, ids, rows, ctx.padding, ctx.by_frequency)
            return None, dense.to(ctx.weight), None, None, None
        begun = clock() if recording.active else 0

        def write(out: Tensor) -> None:
            flat = grad.reshape(-1, ctx.weight.shape[1])
            out.copy_(formed(flat, ids.reshape(-1), rows, ctx.padding, ctx.by_frequency))

        dw = form_gradient(ctx.next_functions[-1][0], ctx.weight, ctx.source, write)
        if begun:
            recording.add(BACKWARD, begun, allocation_of(ctx.source.parameter) or ctx.weight)
        return None, dw, None, None, None
