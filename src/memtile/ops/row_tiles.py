"""The autograd function of a call that is computed in row tiles, and again in backward.

Shapes: inputs (*L, …) whose leading dimensions L hold N rows; a tile of n rows is (1, …, 1, n, …),
of the same rank. Results are (*L, …) too. Other inputs are whole in each tile.

There is one function for the whole call, and its inputs are everything that needs a gradient:
tensors, and the leaves (parameters) that the tiles were seen to use. So each of them gets one
gradient, once, whatever hooks and engines it has. In backward each tile is computed again and
differentiated with `autograd.grad`. Gradients of what all tiles share are added up one tensor at a
time, as soon as a tile has each: in float32 where they have 16 bits. That a tensor's own hooks are
called with the sum only, ours take their place meanwhile. Gradients of parked leaves are added up
in their homes.

Inputs are saved by a function of its own that comes before the tiles: an outer activation
checkpoint of which this call is the last part stops its recomputation there.

Source: tiles of tokens computed again in backward are in Arctic Long Sequence Training
(arXiv 2506.13996); they are checkpoints of rows (arXiv 1604.06174).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memtile.errors import RowTilesError
from memtile.geometry import Span
from memtile.homes import is_parked
from memtile.ops.parked import Destination, destination_of, flush_before
from memtile.ops.products import is_batched
from memtile.ops.recomputing import AutocastState, RandomStates, saved_for_itself
from memtile.ops.row_calls import RowCall, Tiles, flattened, packed
from memtile.ops.shared_gradients import SharedGradients, without_hooks
from memtile.transfer import ParkedSource, gradients_go_home


def row_tiles(call: RowCall, tensors: Sequence[Tensor]) -> Any:
    """The results (*L, …) of all rows, in the function's form; backward computes each tile again.

    Raises:
        RowTilesError: the function uses a tensor that was computed before and needs a gradient.
    """
    if not torch.is_grad_enabled():
        plain = Tiles(call, tensors)
        return packed(plain.results(), plain.form)
    token = _Saved.apply(torch.empty(0, requires_grad=True), *tensors)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    tiles = _TrackedTiles(call, tensors, token.grad_fn)
    results = tiles.results()
    if not any(tiles.record.differentiable):
        return packed(results, tiles.form)
    made = _RowTiles.apply(token, tiles.record, results, *tensors, *tiles.record.leaves)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return packed(made, tiles.form)


@dataclass(eq=False)
class _Record:
    """What backward needs of a forward, besides the inputs, which `saved` has."""

    call: RowCall
    saved: Any  # the graph's node of `_Saved`
    random: RandomStates
    autocast: AutocastState
    leaves: list[Tensor]
    versions: list[int]
    sources: dict[int, ParkedSource]  # of the parked leaves, by their places
    differentiable: list[bool]  # whether each result needs a gradient

    def check_versions(self) -> None:
        """RowTilesError where a leaf was written to since."""
        for leaf, version in zip(self.leaves, self.versions, strict=True):
            if leaf._version != version:
                raise RowTilesError(
                    f"{self.call.name}: a parameter of shape {tuple(leaf.shape)} was modified "
                    f"between its forward (version {version}) and its backward (version "
                    f"{leaf._version}): row tiles would be computed again with other values; run "
                    "backward before the optimizer steps or weights are written"
                )


class _TrackedTiles(Tiles):
    """The same, with gradients on: finds the leaves that the tiles use."""

    def __init__(self, call: RowCall, tensors: Sequence[Tensor], saved: Any) -> None:
        super().__init__(call, tensors)
        self._needed = [tensor.requires_grad for tensor in tensors]
        state = RandomStates(tensors), AutocastState(tensors)
        self.record = _Record(call, saved, *state, [], [], {}, [])
        self._found: dict[int, Tensor] = {}  # leaves by id

    def results(self) -> list[Tensor]:
        """All results; the record is complete then."""
        whole, record = super().results(), self.record
        record.random.close()
        record.leaves = list(self._found.values())
        record.versions = [leaf._version for leaf in record.leaves]
        for place, leaf in enumerate(record.leaves):
            if is_parked(leaf):
                record.sources[place] = ParkedSource(leaf)  # type: ignore[arg-type]  # a parked leaf is a parameter
                record.sources[place].note_use()
        return whole

    def tile(self, span: Span) -> Sequence[Tensor]:
        """The results of one tile, without its graph."""
        self.record.random.note()
        given = [
            (self.call.part(x, span) if cut else x).detach().requires_grad_(needed)
            for x, cut, needed in zip(self.flat, self.call.cut, self._needed, strict=True)
        ]
        with saved_for_itself():
            results = self.called(given)
        self._note_leaves(results, {id(tensor) for tensor in given})
        tracked = [result.requires_grad for result in results]
        before = self.record.differentiable or tracked
        # results of another number are refused where they are written
        self.record.differentiable = [a or b for a, b in zip(before, tracked, strict=False)]
        return [result.detach() for result in results]

    def _note_leaves(self, results: Sequence[Tensor], given: set[int]) -> None:
        leaves = [r for r in results if r.requires_grad and r.grad_fn is None]
        nodes = [r.grad_fn for r in results if r.grad_fn is not None]
        nodes, since = list(dict.fromkeys(nodes)), self.record.saved._sequence_nr()
        seen = set(nodes)
        while nodes:
            node: Any = nodes.pop()
            if hasattr(node, "variable"):
                leaves.append(node.variable)
                continue
            if node._sequence_nr() < since and not _is_cached_cast(node):
                raise RowTilesError(
                    f"{self.call.name}: it uses a tensor that was computed before the call, by "
                    f"{node.name()}, and needs a gradient, which row tiles cannot give it; pass "
                    "it as an argument, compute it inside, or detach it"
                )
            # In one order on all ranks: ZeRO-2 reduces gradients in the order of the leaves.
            further = [n for n, _ in node.next_functions if n is not None and n not in seen]
            seen.update(further)
            nodes += dict.fromkeys(further)
        self._found |= {id(leaf): leaf for leaf in leaves if id(leaf) not in given}


def _is_cached_cast(node: Any) -> bool:
    """Whether it may be a cast of a weight that autocast has kept from an earlier call."""
    (after, _), *more = node.next_functions or ((None, 0),)
    return node.name() == "ToCopyBackward0" and not more and hasattr(after, "variable")


class _Saved(torch.autograd.Function):
    """Saves inputs; gives an empty tensor, of which `_RowTiles` asks for them."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, *tensors: Tensor) -> Tensor:
        # ctx: torch gives FunctionCtx no fields, so mypy cannot know those set here
        ctx.save_for_backward(*tensors)
        return token.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)


class _RowTiles(torch.autograd.Function):
    """Gives results that were computed before, and in backward all gradients."""

    @staticmethod
    def forward(
        ctx: Any, token: Tensor, record: _Record, results: Sequence[Tensor], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.record = record
        pairs = zip(results, record.differentiable, strict=True)
        ctx.mark_non_differentiable(*(result for result, needed in pairs if not needed))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        record, found = ctx.record, [grad for grad in grads if grad is not None]
        if not found:
            return (None,) * len(ctx.needs_input_grad)
        record.check_versions()
        inputs = len(record.call.cut)
        sources = [None] * inputs + [record.sources.get(n) for n in range(len(record.leaves))]
        nodes = [node for node, _ in ctx.next_functions[1:]]
        goes = [destination_of(node, of) for node, of in zip(nodes, sources, strict=True)]
        backward = _Backward(record, record.saved.saved_tensors, goes)
        if torch.is_grad_enabled() or any(map(is_batched, found)):
            return None, None, None, *backward.differentiably(grads)
        results = backward.gradients(grads)
        for node, source, to in zip(nodes, sources, goes, strict=True):
            if source is not None:
                source.resume()
                if to is Destination.HOME and source.may_be_storing():
                    flush_before(node, source)
        return None, None, None, *results


class _Backward:
    """The tiles of one call, computed again.

    Args:
        goes: where the gradient of each input and leaf goes.
    """

    def __init__(
        self, record: _Record, tensors: Sequence[Tensor], goes: Sequence[Destination]
    ) -> None:
        self.record, self.call, self._tensors = record, record.call, tensors
        cut = [*self.call.cut, *(False for _ in record.leaves)]
        self._rows, self._shared = (
            [n for n, to in enumerate(goes) if to is Destination.AUTOGRAD and cut[n] is is_cut]
            for is_cut in (True, False)
        )
        self._home = [n for n, to in enumerate(goes) if to is Destination.HOME]

    def gradients(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Those of inputs and leaves, in order; None where they went home."""
        call, record, tensors = self.call, self.record, [t.detach() for t in self._tensors]
        for place in self._shared:
            if place < len(tensors):
                tensors[place].requires_grad_()
        everything = [*tensors, *record.leaves]
        sums = SharedGradients([everything[place] for place in self._shared], len(call.spans))
        flat = [None if grad is None else call.flat(grad) for grad in grads]
        tiles, of_rows = Tiles(call, tensors), dict[int, Tensor]()
        with self._as_in_forward(), sums.taking(), gradients_go_home(), torch.enable_grad():
            for number, span in enumerate(call.spans):
                record.random.restore(number)
                self._tile(span, tiles, everything, flat, sums, of_rows)
        results: list[Tensor | None] = [None] * len(everything)
        for place, grad in of_rows.items():
            results[place] = grad.view(tensors[place].shape)
        for number, place in enumerate(self._shared):
            results[place] = sums.pop(number)
        return results

    @contextmanager
    def _as_in_forward(self) -> Iterator[None]:
        with self.record.random.kept(), self.record.autocast.restored():
            yield

    def _tile(
        self,
        span: Span,
        tiles: Tiles,
        everything: list[Tensor],
        grads: Sequence[Tensor | None],
        sums: SharedGradients,
        of_rows: dict[int, Tensor],
    ) -> None:
        call = self.call
        given = [
            call.part(x, span).requires_grad_(place in self._rows) if cut else x
            for place, (x, cut) in enumerate(zip(tiles.flat, call.cut, strict=True))
        ]
        wanted = [given[place] for place in self._rows]
        wanted += [everything[place] for place in (*self._shared, *self._home)]
        pairs = [
            (result, call.part(grad, span))
            for result, grad in zip(flattened(call.function(given))[0], grads, strict=True)
            if grad is not None and result.requires_grad
        ]
        if not pairs or not wanted:
            return
        results, gradients = zip(*pairs, strict=True)
        del pairs
        found = torch.autograd.grad(results, wanted, gradients, allow_unused=True)
        rows, shared = len(self._rows), len(self._rows) + len(self._shared)
        for place, grad in zip(self._rows, found[:rows], strict=True):
            if grad is not None:
                if place not in of_rows:
                    of_rows[place] = grad.new_zeros(tiles.flat[place].shape)
                call.part(of_rows[place], span).copy_(grad)
        sums.end_tile(found[rows:shared])
        for place, grad in zip(self._home, found[shared:], strict=True):
            if grad is not None:  # of an operation that knows no homes
                with self.record.sources[place - len(call.cut)].gradient() as out:
                    out.copy_(grad)

    def differentiably(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The same in ordinary operations, which keep the activations of all tiles."""
        call, record = self.call, self.record
        places = [*self._rows, *self._shared, *self._home]
        with self._as_in_forward(), without_hooks(record.leaves), torch.enable_grad():
            # aliases, so that hooks on the tensors themselves are not called here
            given = [t.view_as(t) if t.requires_grad else t for t in self._tensors]
            everything, tiles, pairs = [*given, *record.leaves], Tiles(call, given), []
            flat = [None if grad is None else call.flat(grad) for grad in grads]
            for number, span in enumerate(call.spans):
                record.random.restore(number)
                for result, grad in zip(tiles.tile(span), flat, strict=True):
                    if grad is not None and result.requires_grad:
                        pairs.append((result, call.part(grad, span)))
            found = torch.autograd.grad(
                [result for result, _ in pairs],
                [everything[place] for place in places],
                [grad for _, grad in pairs],
                allow_unused=True,
                create_graph=True,
            )
        by_place = dict(zip(places, found, strict=True))
        return [by_place.get(place) for place in range(len(everything))]
