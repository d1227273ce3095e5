"""Gradients of what all tiles of a call share, added up as soon as a tile has each of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from memtile.ops.products import add_into, needs_float32_sum


@contextmanager
def without_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    """A context in which leaves have no hooks, or those that are put on them inside."""
    before = [tensor._backward_hooks for tensor in tensors]
    for tensor in tensors:
        tensor._backward_hooks = None
    try:
        yield
    finally:
        for tensor, hooks in zip(tensors, before, strict=True):
            tensor._backward_hooks = hooks


class SharedGradients:
    """Gradients of tensors that several tiles share, added up as soon as a tile has each.

    Those of 16 bits are added up in float32.
    """

    def __init__(self, tensors: Sequence[Tensor], tiles: int) -> None:
        self._tensors, self._tiles = tensors, tiles
        self._totals: dict[int, Tensor] = {}
        self._taken: set[int] = set()  # in this tile

    @contextmanager
    def taking(self) -> Iterator[None]:
        """A context in which the tensors have no hooks but ours, which adds their gradients up."""
        is_open = True

        def take(place: int, grad: Tensor) -> Tensor | None:
            if not is_open or grad.layout is not torch.strided:
                return None
            self._add(place, grad)
            self._taken.add(place)
            return grad.new_zeros(()).expand_as(grad)  # nothing large waits for the tile's end

        with without_hooks(self._tensors):
            for place, tensor in enumerate(self._tensors):
                tensor.register_hook(partial(take, place))
            try:
                yield
            finally:
                is_open = False  # for threads whose backward has come to a tensor meanwhile

    def end_tile(self, found: Sequence[Tensor | None]) -> None:
        """A tile is over; these are its gradients, as far as they were not taken."""
        for place, grad in enumerate(found):
            if grad is not None and place not in self._taken:
                self._add(place, grad)
        self._taken.clear()

    def pop(self, place: int) -> Tensor | None:
        """The gradient of a tensor, in its dtype."""
        total = self._totals.pop(place, None)
        return None if total is None else total.to(self._tensors[place].dtype)

    def _add(self, place: int, grad: Tensor) -> None:
        total = self._totals.get(place)
        if total is not None and total.layout is torch.strided:
            add_into(total, grad)
        elif total is not None:
            self._totals[place] = total + grad
        else:
            wide = needs_float32_sum(grad.dtype, self._tiles)
            self._totals[place] = grad.to(torch.float32 if wide else grad.dtype, copy=True)
