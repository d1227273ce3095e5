"""A function that is called with the rows of a tile, and the tiles of one call in turn.

Shapes: inputs (*L, …) whose leading dimensions L hold N rows; a tile of n rows is (1, …, 1, n, …),
of the same rank. Results are (*L, …) too. Other inputs are whole in each tile.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from memtile.errors import RowTilesError
from memtile.geometry import Span


@dataclass(frozen=True)
class RowCall:
    """A function that is called with the rows of each tile.

    Args:
        function: gives results of as many rows from the inputs of a tile: a tensor, or a tuple,
            list or dict of them, with None where there is nothing.
        lead: the leading dimensions of the inputs that are cut.
        cut: for each input, whether it is cut.
        spans: the rows of each tile; a tile may be empty.
        name: of the function, in messages.
    """

    function: Callable[[Sequence[Tensor]], Any]
    lead: torch.Size
    cut: tuple[bool, ...]
    spans: tuple[Span, ...]
    name: str

    def flat(self, tensor: Tensor) -> Tensor:
        """(N, …) of (*L, …)."""
        return tensor.reshape(self.lead.numel(), *tensor.shape[len(self.lead) :])

    def part(self, flat: Tensor, span: Span) -> Tensor:
        """A tile of (N, …)."""
        return self.shaped(flat[span.as_slice()])

    def shaped(self, rows: Tensor) -> Tensor:
        """(1, …, 1, n, …) of (n, …)."""
        return rows.view(*(1,) * (len(self.lead) - 1), *rows.shape)


class Tiles:
    """The tiles of one call, one after another, whose results are written into whole ones."""

    def __init__(self, call: RowCall, tensors: Sequence[Tensor]) -> None:
        self.call = call
        self.flat = [
            call.flat(tensor) if cut else tensor
            for tensor, cut in zip(tensors, call.cut, strict=True)
        ]

    def results(self) -> list[Tensor]:
        """All results."""
        whole: list[Tensor] = []
        for span in self.call.spans:
            self._write(span, self.tile(span), whole)
        return whole

    def _write(self, span: Span, found: Sequence[Tensor], whole: list[Tensor]) -> None:
        call, rank = self.call, len(self.call.lead)
        if not whole:
            whole += [each.new_empty((*call.lead, *each.shape[rank:])) for each in found]
        parts = [call.part(call.flat(each), span) for each in whole]
        if [part.shape for part in parts] != [result.shape for result in found]:
            raise RowTilesError(
                f"{call.name}: it gave {[tuple(result.shape) for result in found]} for rows "
                f"{span.start} to {span.stop}, and {[tuple(part.shape[rank:]) for part in parts]} "
                "a row before; its results must be alike for all rows"
            )
        for part, result in zip(parts, found, strict=True):
            part.copy_(result)

    def tile(self, span: Span) -> Sequence[Tensor]:
        """The results of one tile."""
        pairs = zip(self.flat, self.call.cut, strict=True)
        return self.called([self.call.part(x, span) if cut else x for x, cut in pairs])

    def called(self, given: Sequence[Tensor]) -> list[Tensor]:
        """The function's results for these inputs."""
        results, self.form = flattened(self.call.function(given))
        return results


def checkpointed_row_tiles(
    call: RowCall, tensors: Sequence[Tensor], *, is_hooked: bool = False
) -> Any:
    """The results of all rows, with an activation checkpoint of each tile.

    For engines' shards, and compilers. Gradients of what tiles share are added up by autograd, in
    their own dtype. With `is_hooked`, tiles of frozen inputs need a gradient too: engines that hook
    the gradient of a module's input would not free the module between the tiles.
    """
    if is_hooked and torch.is_grad_enabled():
        token = torch.empty(0, requires_grad=True)
        tensors = [_Hooked.apply(token, x) if x.is_floating_point() else x for x in tensors]  # type: ignore[no-untyped-call]  # torch leaves it untyped
    sizes = [span.size for span in call.spans]
    split = [
        call.flat(tensor).split(sizes) if is_cut else (tensor,) * len(sizes)
        for tensor, is_cut in zip(tensors, call.cut, strict=True)
    ]
    found = []
    for parts in zip(*split, strict=True):
        given = [call.shaped(x) if cut else x for x, cut in zip(parts, call.cut, strict=True)]
        if torch.is_grad_enabled():
            found.append(checkpoint(call.function, given, use_reentrant=False))
        else:
            found.append(call.function(given))
    flat, rank = [flattened(result) for result in found], len(call.lead)
    columns = zip(*(results for results, _ in flat), strict=True)
    whole = [torch.cat([each.flatten(0, rank - 1) for each in column]) for column in columns]
    return packed([each.view(*call.lead, *each.shape[1:]) for each in whole], flat[0][1])


class _Hooked(torch.autograd.Function):
    """Gives a tensor as one that needs a gradient, which ends here unless the tensor needs it."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, x: Tensor) -> Tensor:  # torch types no context
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]


def flattened(result: Any) -> tuple[list[Tensor], Any]:
    """The tensors of a result, and the form in which they are in it."""
    each, form = tree_flatten(result)
    return [one for one in each if one is not None], ([one is not None for one in each], form)


def packed(tensors: Sequence[Tensor], form: Any) -> Any:
    """The reverse."""
    following, (there, tree) = iter(tensors), form
    return tree_unflatten([next(following) if yes else None for yes in there], tree)
