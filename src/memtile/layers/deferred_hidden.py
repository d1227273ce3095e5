"""`DeferredHidden`: what the first linear of an MLP gives, where another module has the second.

Element-wise functions of it are noted. The second linear gets it, and computes all by tiles; what
else is done with it computes the values, as the linear would have.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from memtile.layers.deferred import Deferred, LayerState
from memtile.layers.handle import written_by
from memtile.layers.mlp_structure import Slot, Step, Steps, between, without_dropout


class _Chain:
    """A linear's result and all that was made of it; slot 0 is what the linear gives."""

    def __init__(self, up: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self.up, self.x = up, x
        self.state, self.records = LayerState.of(up, x), torch.is_grad_enabled()
        self.steps: dict[Slot, Step] = {}
        self.values: dict[Slot, Tensor] = {}
        self._forward = forward

    def value(self, slot: Slot, stale: str) -> Tensor:
        """The values in a slot, computed once, and differentiable where gradients were on."""
        if slot not in self.values:
            if slot == Slot(0):
                with self.state.again(self.x, self.records, stale):
                    self.values[slot] = self._forward(self.x)
            else:
                step = self.steps[slot]
                given = {each: self.value(each, stale) for each in step.given}
                with self.state.again(self.x, self.records, stale):
                    self.values[slot] = _called(step, given)
        return self.values[slot]


def _called(step: Step, values: Mapping[Slot, Tensor]) -> Tensor:
    args, kwargs = tree_map_only(Slot, values.__getitem__, (step.args, step.kwargs))
    found: Tensor = step.function(*args, **kwargs)
    return found


class DeferredHidden(Deferred):
    """An intermediate activation (…, I) that is computed when its values are used."""

    stale = (
        "the intermediate activation of an MLP was left to be computed when it is needed, and the "
        "weight that it is made with was replaced or written to since; call "
        "memtile.tile_mlps(model, False)"
    )
    refused = (
        "a gradient came to an intermediate activation that was left to be computed when it is "
        "needed, from an autograd.Function, which takes it for computed; call "
        "memtile.tile_mlps(model, False)"
    )
    _chain: _Chain
    _slot: Slot

    @classmethod
    def of(
        cls, up: nn.Module, features: int, forward: Callable[[Tensor], Tensor], x: Tensor
    ) -> "DeferredHidden":
        """What `forward` of the linear `up` gives x (…, H): so many features."""
        chain = _Chain(up, forward, x)
        trained = x.requires_grad or any(p.requires_grad for p in up.parameters())
        dtype = chain.state.autocast or x.dtype
        made = cls.empty((*x.shape[:-1], features), dtype, x.device, chain.records and trained)
        made._chain, made._slot = chain, Slot(0)
        return made  # type: ignore[no-any-return]  # `empty` is of any class

    @property
    def up(self) -> nn.Module:
        """The linear that gave it."""
        return self._chain.up

    @property
    def x(self) -> Tensor:
        """What that linear was given."""
        return self._chain.x

    @property
    def is_used(self) -> bool:
        """Whether its values, or those of anything made of the same linear's, were computed."""
        return bool(self._chain.values)

    def activation(self) -> tuple[Steps, float]:
        """What was done to what the linear gives, and the part that dropout zeroes after that."""
        steps = {step.made: step for step in self._chain.steps.values()}
        end, dropout = without_dropout(steps, self._slot)
        return between(steps, Slot(0), end, "its linears"), dropout

    def computed(self) -> Tensor:
        """The values, differentiable if they were made where gradients are on."""
        return self._chain.value(self._slot, self.stale)

    def compute_family(self) -> None:
        """Compute all that was made of what the linear gives."""
        for slot in (Slot(0), *self._chain.steps):
            self._chain.value(slot, self.stale)

    @classmethod
    def kept(cls, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The result of an element-wise function, deferred."""
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        first = next(each for each in given if isinstance(each, DeferredHidden))
        chain = first._chain
        if (
            not all(isinstance(each, DeferredHidden) and each._chain is chain for each in given)
            or chain.values
            or chain.records != torch.is_grad_enabled()  # it may be an autograd.Function's forward
            or any(isinstance(e, Tensor) for e in tree_leaves(written_by(func, args, kwargs)[1]))
        ):
            return None
        shape = torch.Size((*(1 for _ in first.shape[:-1]), first.shape[-1]))
        with torch.inference_mode(False), torch.no_grad():  # or writes were not counted
            sample = torch.empty(shape, dtype=first.dtype, device="meta")
            shapes = tree_map_only(DeferredHidden, lambda each: sample, (tuple(args), kwargs))
            try:
                found = func(*shapes[0], **shapes[1])
            except Exception:  # it takes values
                return None
        if sample._version:
            first.compute_family()  # it is written, by an option of the function
            return None
        same = isinstance(found, Tensor) and (found.shape, found.dtype) == (shape, sample.dtype)
        return first._made_by(func, args, kwargs, given) if same else None

    def _made_by(
        self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], given: Sequence[Any]
    ) -> "DeferredHidden":
        chain, made = self._chain, self.empty(self.shape, self.dtype, self.device, _trained(self))
        made._chain, made._slot = chain, Slot(len(chain.steps) + 1)
        own_args, own_kwargs = tree_map(_slot_of, (tuple(args), kwargs))
        slots = tuple(each._slot for each in given)
        chain.steps[made._slot] = Step(func, own_args, own_kwargs, slots, made._slot)
        return made  # type: ignore[no-any-return]  # `empty` is of any class


def _slot_of(value: Any) -> Any:
    return value._slot if isinstance(value, DeferredHidden) else value


def _trained(hidden: DeferredHidden) -> bool:
    return hidden.requires_grad
