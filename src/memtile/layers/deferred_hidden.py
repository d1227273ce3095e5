"""`DeferredHidden`: what the first linear of an MLP gives, where another module has the second.

Element-wise functions of it are noted. The second linear gets it, and computes all by tiles; what
else is done with it computes the values, as the linear would have.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

# Private by name; PyTorch's own docs and tools use both.
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from memtile.errors import DeferredLogitsError
from memtile.layers.deferred import Deferred, LayerState
from memtile.layers.handle import FREE, written_by
from memtile.layers.mlp_structure import Slot, Step, Steps, between, without_dropout

_OF_GRAPH: Final = ("grad_fn", "is_leaf", "output_nr")


class Family:
    """A linear's result and all that was made of it; slot 0 is what the linear gives."""

    def __init__(self, up: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self.up, self.x = up, x
        self.records, self.state = torch.is_grad_enabled(), LayerState.of(up, x)
        self.steps: dict[Slot, Step] = {}
        self.values: dict[Slot, Tensor] = {}
        self._forward, self._given = forward, self._now()

    def _now(self) -> tuple[Any, ...]:
        """What else the values depend on: the input, and what is trained."""
        version = 0 if self.x.is_inference() else self.x._version
        return version, *(p.requires_grad for p in self.up.parameters())

    @property
    def is_current(self) -> bool:
        """Whether the linear would give the same here and now, with the same graph."""
        same = self.records == torch.is_grad_enabled() and self._given == self._now()
        return same and self.state == LayerState.of(self.up, self.x)

    def compute(self, stale: str) -> None:
        """Compute all of it."""
        for slot in (Slot(0), *self.steps):
            self.value(slot, stale)

    def value(self, slot: Slot, stale: str) -> Tensor:
        """The values in a slot, computed once, and differentiable where gradients were on."""
        if slot not in self.values:
            if self._given != self._now() and not self.values:
                raise DeferredLogitsError(stale)
            step = None if slot == Slot(0) else self.steps[slot]
            given = {each: self.value(each, stale) for each in (step.given if step else ())}
            with self.state.again(self.x, self.records, stale):
                self.values[slot] = self._forward(self.x) if step is None else step(given)
        return self.values[slot]


class DeferredHidden(Deferred):
    """An intermediate activation (…, I) that is computed when its values are used."""

    free = FREE - {getattr(Tensor, name).__get__ for name in _OF_GRAPH}
    stale = (
        "the intermediate activation of an MLP was left to be computed with the MLP, and its "
        "input, or the weight that it is made with, was replaced, written to or frozen since; call "
        "memtile.tile_mlps(model, False)"
    )
    refused = (
        "the gradient of an intermediate activation is asked for that was left to be computed with "
        "the MLP, by an autograd.Function, a reentrant checkpoint, a scripted function or "
        "torch.autograd.grad; call memtile.tile_mlps(model, False)"
    )
    family: Family
    _slot: Slot

    @classmethod
    def of(
        cls, up: nn.Module, features: int, forward: Callable[[Tensor], Tensor], x: Tensor
    ) -> "DeferredHidden":
        """What `forward` of the linear `up` gives x (…, H): so many features."""
        family = Family(up, forward, x)
        trained = x.requires_grad or any(p.requires_grad for p in up.parameters())
        dtype = family.state.autocast or x.dtype
        made = cls.empty((*x.shape[:-1], features), dtype, x.device, family.records and trained)
        made.family, made._slot = family, Slot(0)
        return made  # type: ignore[no-any-return]  # `empty` is of any class

    @property
    def up(self) -> nn.Module:
        """The linear that gave it."""
        return self.family.up

    @property
    def x(self) -> Tensor:
        """What that linear was given."""
        return self.family.x

    @property
    def is_used(self) -> bool:
        """Whether its values, or those of anything made of the same linear's, were computed."""
        return bool(self.family.values)

    @property
    def is_current(self) -> bool:
        """Whether the linear would give the same here and now."""
        return self.family.is_current

    def activation(self) -> tuple[Steps, float]:
        """What was done to what the linear gives, and the part that dropout zeroes after that."""
        steps = {step.made: step for step in self.family.steps.values()}
        end, dropout = without_dropout(steps, self._slot)
        return between(steps, Slot(0), end, "its linears"), dropout

    def computed(self) -> Tensor:
        """The values, differentiable if they were made where gradients are on."""
        return self.family.value(self._slot, self.stale)

    def compute_family(self) -> None:
        """Compute all that was made of what the linear gives."""
        self.family.compute(self.stale)

    @classmethod
    def kept(cls, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The result of an element-wise function, deferred."""
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        own = [each for each in given if isinstance(each, DeferredHidden)]
        if func is torch.autograd.grad:
            raise DeferredLogitsError(cls.refused)
        if len(own) == len(given) and own[0]._keeps(func, args, kwargs, own):
            return own[0]._made_by(func, args, kwargs, own)
        for each in own:
            each.compute_family()  # the function may write to it, or give a view
        return None

    def _keeps(self, func: Any, args: Any, kwargs: Any, given: Sequence["DeferredHidden"]) -> bool:
        """Whether a function gives a tensor of this shape, with a graph, and writes to none."""
        family = self.family
        if (
            any(each.family is not family for each in given)
            or family.values
            or family.records != torch.is_grad_enabled()  # it may be an autograd.Function's forward
            or any(isinstance(e, Tensor) for e in tree_leaves(written_by(func, args, kwargs)[1]))
        ):
            return False
        uncounted = _disable_current_modes()  # by a plan
        with uncounted, torch.inference_mode(False), torch.enable_grad():
            sample = torch.empty(self.shape, dtype=self.dtype, device="meta", requires_grad=True)
            shapes = tree_map_only(DeferredHidden, lambda each: sample, (tuple(args), kwargs))
            try:
                found = func(*shapes[0], **shapes[1])
            except Exception:  # it takes values, or writes
                return False
        same = isinstance(found, Tensor) and (found.shape, found.dtype) == (self.shape, self.dtype)
        return same and found.requires_grad

    def _made_by(
        self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], given: Sequence[Any]
    ) -> "DeferredHidden":
        family, trained = self.family, bool(self.requires_grad)
        made = self.empty(self.shape, self.dtype, self.device, trained)
        made.family, made._slot = family, Slot(len(family.steps) + 1)
        own_args, own_kwargs = tree_map(_slot_of, (tuple(args), kwargs))
        slots = tuple(each._slot for each in given)
        family.steps[made._slot] = Step(func, own_args, own_kwargs, slots, made._slot)
        return made  # type: ignore[no-any-return]  # `empty` is of any class


def _slot_of(value: Any) -> Any:
    return value._slot if isinstance(value, DeferredHidden) else value
