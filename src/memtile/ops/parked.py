"""The autograd function of a parked tile, which reads the weight again in backward.

Shapes: N tokens, W (M, K); x (…, K), y (…, M), g the gradient of y.

Forward: y = x Wᵀ + b. Backward: dx = g W, and dW = gᵀ x is written where it is to be kept.

A tile of a stack of experts is several matrices W_e one below another, and x is grouped by expert:
each group of rows meets its own W_e. Transposed stacks keep W_e (K, M), so that y = x W_e.

There is one function per tile: one for a whole layer would hold the gradients of all its tiles at
once. The graph keeps a tile's slice of the input and the parameter's version, never a slab. dW is
written to the home inside backward, which returns None for it; autograd calls the parameter's
post-accumulate-grad hooks all the same, once, after its last use. dW is returned to autograd as
usual where it is needed there: tensor hooks on the parameter, `autograd.grad`, `create_graph=True`,
batched gradients.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from memtile.homes import allocation_of
from memtile.observing import recording
from memtile.observing.recording import BACKWARD, FORWARD, clock
from memtile.ops.products import is_batched, sum_of_products, write_products
from memtile.transfer import ParkedSource, catch_up

_NOTHING: Final = nullcontext()


@dataclass(frozen=True)
class Groups:
    """How the rows of x are grouped by the experts of one tile.

    Args:
        counts: rows of x for each expert of the tile, in order; they add up to all rows.
        is_transposed: whether the tile keeps each W_e as (K, M).
    """

    counts: tuple[int, ...]
    is_transposed: bool = False

    def width(self, weight: Tensor) -> int:
        """Columns of y."""
        return weight.shape[1] if self.is_transposed else weight.shape[0] // len(self.counts)

    def depth(self, weight: Tensor) -> int:
        """Columns of x."""
        return weight.shape[0] // len(self.counts) if self.is_transposed else weight.shape[1]

    def matrices(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Each expert's matrix as (M, K), differentiably."""
        stack = weight.view(len(self.counts), -1, weight.shape[1])
        matrices: tuple[Tensor, ...] = (stack.mT if self.is_transposed else stack).unbind(0)
        return matrices

    def rows(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Each expert's rows of x, y or g, as a matrix."""
        parts: tuple[Tensor, ...] = _as_matrix(tensor).split(self.counts)
        return parts


def parked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    source: ParkedSource,
    groups: Groups | None = None,
) -> Tensor:
    """y (…, M) of x (…, K), in x's dtype, with the weight in memory for the product only.

    The weight (M, K) is the parameter, for autograd: its values come from the source. Groups: it is
    a tile of a stack of experts, and x a matrix.
    """
    result: Tensor = _ParkedLinear.apply(x, weight, bias, source, groups)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return result


def grouped_linear(x: Tensor, matrices: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """y (N, M) of x (N, K), whose rows are grouped by expert, in ordinary operations.

    The matrices (M, K) are cast as autocast does; those without rows are not touched.
    """
    pairs = zip(x.split(list(counts)), matrices, strict=True)
    parts = [functional.linear(rows, matrix) for rows, matrix in pairs if rows.shape[0]]
    if not parts:
        return functional.linear(x, matrices[0])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def gathered_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: Groups | None = None
) -> Tensor:
    """The same of a weight in memory, of which the graph keeps nothing but the parameter itself.

    Its values would be all that ZeRO-3 has gathered, which it frees by giving the parameter others;
    and so would what a checkpoint keeps of a weight that is saved for backward.
    """
    result: Tensor = _GatheredLinear.apply(x, weight, bias, groups)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return result


class _GatheredLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, groups: Groups | None
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        ctx.weight, ctx.groups = weight, groups
        return _product(x, weight.detach(), bias, groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x,), needed = grads, ctx.saved_tensors, ctx.needs_input_grad
        if torch.is_grad_enabled() or is_batched(grad):
            return *differentiably(ctx, grad), None
        dx = dw = db = None
        with no_autocast(grad):
            if needed[0]:
                dx = _input_gradient(ctx.groups, ctx.weight.detach(), grad)
            if needed[1]:
                dw = torch.empty_like(ctx.weight)
                _write_gradients(ctx.groups, dw, grad, x)
            if needed[2]:
                db = _as_matrix(grad).sum(0)
        return dx, dw, db, None


class _ParkedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # torch gives FunctionCtx no fields, so mypy cannot know those set here
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        source: ParkedSource,
        groups: Groups | None,
    ) -> Tensor:
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if needs_weight else None)
        ctx.source, ctx.weight, ctx.groups = source, weight, groups
        if needs_x or needs_weight:
            source.note_use()
        begun = clock() if recording.active else 0
        if not x.numel():  # an expert that other ranks have rows for is not read here
            return _product(x, weight.detach(), bias, groups)
        with source.values(x.device) as values:
            out = _product(x, values, bias, groups)
        if begun:
            recording.add(FORWARD, begun, allocation_of(source.parameter) or weight)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, needed = grads[0], ctx.needs_input_grad
        if grad is None:
            return None, None, None, None, None
        ctx.source.resume()
        if torch.is_grad_enabled() or is_batched(grad):
            return *differentiably(ctx, grad), None, None
        begun = clock() if recording.active else 0
        dx = dw = db = None
        with no_autocast(grad):
            if needed[0] and not grad.numel():
                dx = _input_gradient(ctx.groups, ctx.weight, grad)
            elif needed[0]:
                with ctx.source.values(grad.device) as values:
                    dx = _input_gradient(ctx.groups, values, grad)
            if needed[1]:
                dw = weight_gradient(ctx, grad)
            if needed[2]:
                db = _as_matrix(grad).sum(0)
        if begun:
            recording.add(BACKWARD, begun, allocation_of(ctx.source.parameter) or ctx.weight)
        return dx, dw, db, None, None


def _by_expert(
    groups: Groups | None, weight: Tensor, rows: Tensor, results: Tensor
) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    """(rows, matrix (M, K), rows of the result) of each expert that has rows."""
    if groups is None:
        return ((_as_matrix(rows), weight, _as_matrix(results)),)
    parts = zip(groups.rows(rows), groups.matrices(weight), groups.rows(results), strict=True)
    return ((a, matrix, result) for a, matrix, result in parts if a.shape[0])


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, groups: Groups | None) -> Tensor:
    out = x.new_empty((*x.shape[:-1], groups.width(weight) if groups else weight.shape[0]))
    with no_autocast(x):
        for a, matrix, y in _by_expert(groups, weight, x, out) if out.numel() else ():
            sum_of_products(y, [(a, matrix.to(x.dtype).t())], 1, bias)
    return out


def _input_gradient(groups: Groups | None, weight: Tensor, grad: Tensor) -> Tensor:
    dx = grad.new_empty((*grad.shape[:-1], groups.depth(weight) if groups else weight.shape[1]))
    for g, matrix, rows in _by_expert(groups, weight, grad, dx) if dx.numel() else ():
        sum_of_products(rows, [(g, matrix.to(grad.dtype))], 1)
    return dx


def weight_gradient(ctx: Any, grad: Tensor) -> Tensor | None:
    """What backward returns for the weight: None where its gradient went home."""
    (x,) = ctx.saved_tensors

    def write(out: Tensor) -> None:
        _write_gradients(ctx.groups, out, grad, x)

    return form_gradient(ctx.next_functions[1][0], ctx.weight, ctx.source, write)


def _write_gradients(groups: Groups | None, out: Tensor, grad: Tensor, x: Tensor) -> None:
    """Write gᵀ x of each expert, and zeros for those without rows."""
    if groups is None:
        if x.numel():
            write_products(out, [(_as_matrix(grad).t(), _as_matrix(x))], 1, grad)
        else:
            out.zero_()
        return
    stack = out.view(len(groups.counts), -1, out.shape[1])
    for dw, g, rows in zip(stack, groups.rows(grad), groups.rows(x), strict=True):
        if not rows.shape[0]:
            dw.zero_()
        elif groups.is_transposed:
            write_products(dw, [(rows.t(), g)], 1, rows)
        else:
            write_products(dw, [(g.t(), rows)], 1, g)


def form_gradient(
    node: Any, weight: Any, source: ParkedSource, write: Callable[[Tensor], None]
) -> Tensor | None:
    """Have the weight's gradient written to where it is needed; gives what backward returns for it.

    None where nobody needs it, or `.grad` has it. The node is the graph's that accumulates the
    weight's gradients.
    """
    to = destination_of(node, source)
    if to is Destination.NOWHERE:
        return None
    if to is Destination.AUTOGRAD:
        returned = torch.empty_like(weight)
        write(returned)
        return returned
    with source.gradient() as out:
        write(out)
    if source.may_be_storing() and not source.goes_home:  # else the node is not run
        flush_before(node, source)
    return None


class Destination(Enum):
    """Where a gradient goes that a backward forms."""

    NOWHERE = "nobody needs it"
    AUTOGRAD = "backward returns it"
    HOME = "to the home of a parked parameter"


def destination_of(node: Any, source: ParkedSource | None) -> Destination:
    """Where the gradient goes of what this node of the graph accumulates, or computed.

    The node is None for what needs no gradient, the source for what is not parked.
    """
    if node is None:
        return Destination.NOWHERE
    weight: Any = None if source is None else source.parameter
    try:
        # backward(inputs=…) of other tensors must leave .grad untouched
        is_needed = torch._C._will_engine_execute_node(node)
        is_returned = weight is None or bool(weight._backward_hooks) or not weight.is_leaf
    except RuntimeError:  # autograd.grad with respect to a leaf
        is_needed = True
        is_returned = source is None or bool(weight._backward_hooks) or not source.goes_home
    if not is_needed:
        return Destination.NOWHERE
    return Destination.AUTOGRAD if is_returned else Destination.HOME


def flush_before(node: Any, source: ParkedSource) -> None:
    """Wait for our gradient to be home before autograd adds another one, of an L2 term say.

    Autograd adds in place: a write of ours that is still under way would undo it.
    """
    task = torch._C._current_graph_task_id()

    def flush(grads: tuple[Tensor | None, ...]) -> None:
        if torch._C._current_graph_task_id() != task:  # threads share the node
            return
        handle.remove()
        if grads[0] is not None:
            source.flush()

    handle = node.register_prehook(flush)


def differentiably(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Backward in ordinary operations on the parameter itself, in its home's memory."""
    needed, flat = ctx.needs_input_grad, grad.reshape(-1, grad.shape[-1])
    groups = ctx.groups or Groups((flat.shape[0],))
    (x,) = ctx.saved_tensors
    catch_up((ctx.weight,))  # a replay in forward may still be on its way home
    dx = dw = None
    if needed[0]:
        transposed = [matrix.t() for matrix in groups.matrices(ctx.weight.to(grad))]
        dx = grouped_linear(flat, transposed, groups.counts).view(
            *grad.shape[:-1], groups.depth(ctx.weight)
        )
    if needed[1]:
        pairs = zip(groups.rows(flat), groups.rows(x), strict=True)
        each = [a.t() @ g if groups.is_transposed else g.t() @ a for g, a in pairs]
        dw = torch.cat(each).to(ctx.weight)
    return dx, dw, flat.sum(0) if needed[2] else None


def _as_matrix(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def no_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Casts are explicit: autocast's cache would return the last tile's weight for a new slab."""
    # torch has none to ask about for the meta device
    if tensor.is_meta or not torch.is_autocast_enabled(tensor.device.type):
        return _NOTHING
    return torch.autocast(tensor.device.type, enabled=False)
