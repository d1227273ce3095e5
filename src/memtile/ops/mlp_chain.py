"""The autograd functions of an MLP over tiles: one node for each, and one for the input.

Shapes: as in `ops.mlp`.

The nodes of the tiles are a chain, as in `ops.parked_layer`: y passes through all of them, and each
adds its part; in backward g passes through them the other way, and with it dx, one buffer. So the
gradients of a tile are whole, and at home or stepped with, before those of the next one are begun,
and each weight gets one gradient. A parked tile's weights are read together, once in forward and
once in backward.

The input is saved by a node before the chain, which saves nothing itself. So an outer activation
checkpoint that needs no later tensor ends its recomputation there, and the forward is computed
twice in all, not three times.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from memtile.homes import allocation_of, is_parked
from memtile.observing import recording
from memtile.observing.recording import BACKWARD, FORWARD, clock
from memtile.ops.composed import edges_of
from memtile.ops.mlp import MlpSpec, MlpVisit
from memtile.ops.mlp_tile import MlpTile, follows, plain_mlp_tile
from memtile.ops.parked import form_gradient, no_autocast
from memtile.ops.products import SIXTEEN_BITS, is_batched, narrow_in_place, sum_of_rows, wide_dtype
from memtile.transfer import ParkedSource, catch_up, values_together

Gradients = dict[str, Tensor | None]


def mlp_of_tiles(
    x: Tensor,
    tiles: Sequence[MlpTile],
    bias: Tensor | None,
    spec: MlpSpec,
    saved: Tensor | None = None,
) -> Tensor:
    """y (N, M) of x (N, H), to which `bias` (M,) is added; in the dtype of x.

    `saved` is the edge of what has saved x once for several calls (`inputs_saved_once`).
    """
    low = tiles[0].down_low
    out = x.new_empty((len(x), tiles[0].down.shape[0] + (0 if low is None else len(low))))
    total = torch.empty_like(out, dtype=torch.float32) if out.dtype in SIXTEEN_BITS else None
    tensors = [x, *([] if bias is None else [bias])]
    tensors += [tensor for tile in tiles for tensor in tile.tensors().values()]
    learnt = [tensor for tensor in tensors if tensor.requires_grad]
    node = edge = None
    if learnt and torch.is_grad_enabled():
        # also where x needs no gradient, backward comes to what has saved it, and lets go of it
        anchor = None if x.requires_grad else learnt[0] if saved is None else saved
        edge = _Input.apply(x, anchor, saved is None)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        node = (edge if saved is None else saved).grad_fn
    needs_x, value = x.requires_grad, x.detach()
    for number, tile in enumerate(tiles):
        is_first, is_last = number == 0, number == len(tiles) - 1
        step = _TileStep(
            spec, tile, bias if is_first else None, is_first, is_last, needs_x, node, x.dtype
        )
        if edge is None:
            step.write(value, out, total)
            continue
        given = {"edge": edge, "out": out, **step.tensors()}
        step.names = (*given,)
        out, edge = _MlpTile.apply(step, value, total, *given.values())  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return out


def inputs_saved_once(x: Tensor, calls: int) -> tuple[Tensor | None, Iterator[Tensor]]:
    """The edge of what saves x (N, H) for several calls of `mlp_of_tiles`, and x for each of them.

    Gradients of the calls are summed in float32. An outer checkpoint ends its recomputation here,
    before any of the calls.
    """
    if not torch.is_grad_enabled():
        return None, repeat(x, calls)
    anchor = None if x.requires_grad else x.new_zeros((), requires_grad=True)
    edge = _Input.apply(x, anchor, True)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    each = repeat(x, calls) if anchor is not None else edges_of(edge, x.detach(), calls)
    return edge, each


def asking_first(y: Tensor, saved: Tensor | None) -> Tensor:
    """The result of these calls: its backward asks for x before any of theirs begins.

    A recomputation then runs before an engine gathers what they need: it may use the same modules,
    and frees them.
    """
    if saved is None or not y.requires_grad:
        return y
    result: Tensor = _Asking.apply(y, saved.grad_fn)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return result


class _Asking(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, node: Any) -> Tensor:
        ctx.node = node
        return y.detach()  # no view: it may be written in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        _saved_input(ctx.node, ctx.node.dtype)
        return grads[0], None


class _Input(torch.autograd.Function):
    """Saves x; gives what its gradient is summed through. `anchor` requires grad where x does not.

    The gradient of 16-bit tiles is float32: the edge is a float32 tensor that owns no memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor | None, saves: bool) -> Tensor:
        ctx.set_materialize_grads(False)
        if saves:
            ctx.save_for_backward(x)
        ctx.dtype, ctx.x, ctx.task = x.dtype, None, None
        if x.dtype in SIXTEEN_BITS:
            return x.new_zeros(1, dtype=torch.float32).expand(x.shape)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        (grad,), ctx.x, ctx.task = grads, None, None
        if grad is None or grad.dtype == ctx.dtype:
            return grad, None, None
        if torch.is_grad_enabled() or is_batched(grad) or not grad.is_contiguous():
            return grad.to(ctx.dtype), None, None
        return narrow_in_place(grad, ctx.dtype), None, None  # no other node has it


def _saved_input(node: Any, dtype: torch.dtype) -> Tensor:
    """x; asked for once a backward, since a checkpoint gives what it recomputed only once.

    An engine may have cast it for the call.
    """
    task = torch._C._current_graph_task_id()
    if node.task != task:
        node.x, node.task = node.saved_tensors[0], task
    x: Tensor = node.x
    return x.to(dtype)


@dataclass(eq=False)
class _TileStep:
    """What one node of the chain does."""

    spec: MlpSpec
    tile: MlpTile
    bias: Tensor | None  # of the whole output; with the first tile
    is_first: bool
    is_last: bool
    needs_x: bool  # whether the gradient of x is wanted
    node: Any  # that has x
    dtype: torch.dtype  # of x
    names: tuple[str, ...] = ()  # of the tensors that the node was called with

    def __post_init__(self) -> None:
        self.sources = {name: ParkedSource(each) for name, each in self.tile.weights().items()}

    def tensors(self) -> dict[str, Tensor]:
        """All that may get a gradient here, by their names."""
        own = self.tile.tensors()
        return own if self.bias is None else {**own, "bias": self.bias}

    def write(self, x: Tensor, out: Tensor, total: Tensor | None) -> None:
        """Add the tile's part to the output."""
        if not len(x):  # no tokens: nothing is read
            return
        begun, sums = clock() if recording.active else 0, out if total is None else total
        if self.bias is not None:
            sums.copy_(self.bias)
        with no_autocast(x), values_together([*self.sources.values()], x.device) as values:
            self._visit(x, values).add_output(sums, is_first=self.is_first and self.bias is None)
        if self.is_last and total is not None:
            out.copy_(total)
        if begun:
            recording.add(FORWARD, begun, allocation_of(self.tile.up) or self.tile.up)

    def gradients(self, ctx: Any, grad: Tensor, dx: Tensor | None) -> Gradients:
        """Those that are needed, by the names of their tensors; a gradient that went home is None.

        That of x is added to `dx`, in place.
        """
        x, tensors = _saved_input(self.node, self.dtype), self.tensors()
        begun, is_first = clock() if recording.active else 0, dx is None
        found: Gradients = {**_made({name: tensors[name] for name in self._needed(ctx)}, x.device)}
        own = {name: out for name, out in found.items() if out is not None and name != "bias"}
        if self.needs_x:
            found["edge"] = own["x"] = (
                torch.empty_like(x, dtype=wide_dtype(x.dtype)) if dx is None else dx
            )
        with no_autocast(x):
            if own:
                read = [*self.sources.values()] if len(x) else []
                with values_together(read, x.device) as values:
                    self._visit(x, values).add_gradients(grad, own, is_first)
            if "bias" in found:
                found["bias"] = sum_of_rows(grad).to(tensors["bias"].dtype)
            nodes = dict(zip(self.names, ctx.next_functions[-len(self.names) :], strict=True))
            for name, weight in self.tile.weights().items():
                out = found.get(name)
                if out is not None and is_parked(weight):
                    node, source = nodes[name][0], self.sources[name]
                    found[name] = form_gradient(node, weight, source, partial(_copy, out))
        if begun:
            recording.add(BACKWARD, begun, allocation_of(self.tile.up) or self.tile.up)
        return found

    def differentiably(self, ctx: Any, grad: Tensor, dx: Tensor | None) -> Gradients:
        """The same in ordinary operations, on the parameters themselves where they are parked."""
        x, needed = _saved_input(self.node, self.dtype), self._needed(ctx)
        catch_up(self.tile.weights().values())  # a replay may still be on its way home
        with torch.enable_grad():
            # aliases, so that hooks on the tensors themselves are not called here
            tensors = {"x": x, **self.tile.tensors()}
            given = {name: tensor.view_as(tensor) for name, tensor in tensors.items()}
            weights: Any = {name: tensor for name, tensor in given.items() if name != "x"}
            tile = self.tile._replace(**weights)
            y = plain_mlp_tile(given["x"], tile, self.spec.activate, self._dropped)
            names = [name for name in needed if name != "bias"] + ["x"] * self.needs_x
            parts = torch.autograd.grad(
                y, [given[name] for name in names], grad, create_graph=torch.is_grad_enabled()
            )
        found: Gradients = dict(zip(names, parts, strict=True))
        if "bias" in needed:
            found["bias"] = grad.sum(0)
        if self.needs_x:
            own = parts[-1].to(wide_dtype(x.dtype))
            found["edge"] = own if dx is None else dx + own
        return found

    def _dropped(self, h: Tensor) -> Tensor:
        if not self.spec.dropout:
            return h
        kept = self.spec.kept_of_tile(len(h), self.tile.span, h.device)
        return self.spec.drop(h.clone(), kept)

    def _needed(self, ctx: Any) -> list[str]:
        flags = zip(self.names, ctx.needs_input_grad[-len(self.names) :], strict=True)
        return [name for name, needed in flags if needed and name not in ("edge", "out")]

    def _visit(self, x: Tensor, values: Sequence[Tensor]) -> MlpVisit:
        read: Any = dict(zip(self.sources, values, strict=False))  # none of no tokens
        return MlpVisit(self.spec, x, self.tile._replace(**read))


class _MlpTile(torch.autograd.Function):
    """One tile in the chain; gives the output, and the edge for the next tile."""

    @staticmethod
    def forward(
        ctx: Any,  # torch gives FunctionCtx no fields, so mypy cannot know those set here
        step: _TileStep,
        x: Tensor,
        total: Tensor | None,
        edge: Tensor,
        out: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(out)
        ctx.step = step
        for source in step.sources.values():
            source.note_use()
        step.write(x, out, total)
        return out, None if step.is_last else edge.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (grad, dx), step = grads, ctx.step
        found: Gradients = {"edge": dx}
        if grad is not None:
            for source in step.sources.values():
                source.resume()
            grad = grad.contiguous()  # once: the next nodes get this one
            in_operations = torch.is_grad_enabled() or is_batched(grad)
            form = step.differentiably if in_operations else step.gradients
            found = {**form(ctx, grad, dx), "out": grad}
        return None, None, None, *(found.get(name) for name in step.names)


def _made(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """What their gradients are written to; those of two halves of a matrix are halves of one."""
    made: dict[str, Tensor] = {}
    for names in (("gate", "up"), ("up", "gate")):
        first, second = map(tensors.get, names)
        if first is None or second is None or is_parked(first) or not follows(first, second):
            continue
        whole = torch.empty((2 * len(first), first.shape[1]), dtype=first.dtype, device=device)
        made.update(zip(names, whole.chunk(2), strict=True))
    for name, tensor in tensors.items():
        if name not in made:
            made[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return made


def _copy(values: Tensor, out: Tensor) -> None:
    out.copy_(values)
