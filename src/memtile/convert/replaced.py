"""Parameters that a model has no more: who still steps them is told, since that trains nothing."""

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from memtile.errors import ReplacedParametersWarning
from memtile.homes import lock_of_a_module
from memtile.optim import TileOptimizer

_replaced = WeakIdKeyDictionary()  # parameter: who replaced it
_hooking = lock_of_a_module()
_hook: RemovableHandle | None = None


@contextmanager
def replacing(model: nn.Module, act: str) -> Iterator[None]:
    """Inside, parameters of the model are replaced; those that outlive it are watched for.

    Who holds them is not asked: a list of parameters harms nobody. An optimizer does once it steps,
    so all optimizers of the process are looked at then, as long as such parameters are alive.

    Args:
        model: whose parameters they are.
        act: that replaces them, for the warning.
    """
    before = [weakref.ref(parameter) for parameter in model.parameters()]
    try:
        yield
    finally:
        kept = set(model.parameters())
        alive = [found for each in before if (found := each()) is not None and found not in kept]
        for parameter in alive:
            _replaced[parameter] = act
        if alive:
            _look_at_steps()


def _look_at_steps() -> None:
    """Have torch call us before steps; it is left in place, where it then finds nothing to do.

    To take it away is not safe: torch iterates over its hooks without a lock, and another thread's
    step would fail ("OrderedDict mutated during iteration").
    """
    global _hook
    with _hooking:
        if _hook is None:
            _hook = register_optimizer_step_pre_hook(_tell)


def _tell(optimizer: Optimizer, arguments: Any, options: Any) -> None:  # what its step was given
    if not len(_replaced) or isinstance(optimizer, TileOptimizer):  # which refuses by itself
        return
    groups = optimizer.param_groups
    acts = [_replaced.pop(p) for group in groups for p in group["params"] if p in _replaced]
    if not acts:
        return
    warnings.warn(
        f"this {type(optimizer).__name__} holds {len(acts)} parameters that {acts[0]} replaced, so "
        "it does not train the model; make the optimizer afterwards, of model.parameters() as "
        "they are now",
        ReplacedParametersWarning,
        stacklevel=3,
    )
