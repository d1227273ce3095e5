"""Losses without logits under ZeRO-3, whose hooks would compute deferred logits wherever they pass.

DeepSpeed puts an `autograd.Function` around each tensor that a module takes or gives, to gather the
parameters of the module itself. Deferred logits are kept from it, but where a module has some.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import nn

from memtile.layers import (
    DeferredLogits,
    DeferringHead,
    compute_those_without_loss,
    defer_in_engine,
    hidden,
    is_of_engine,
    shown,
)

Optimizer = Any  # the one of torch inside DeepSpeed's, or None


def keep_deferred(model: nn.Module, optimizer: Optimizer) -> None:
    """Have the heads of a model defer their logits, and the results of its modules keep them."""
    heads = defer_in_engine(model)
    for module in _modules_around(heads, model):
        _put_around_engine(
            module,
            module.register_forward_hook(_hide_result).id,
            module.register_forward_hook(lambda _, __, result: shown(result)).id,
        )
    inside = {inner for head in heads for inner in head.modules()}
    for module in (module for module in model.modules() if heads and module not in inside):
        if isinstance(module, nn.CrossEntropyLoss):
            module.register_forward_pre_hook(lambda _, inputs: hidden(inputs), prepend=True)
            module.register_forward_pre_hook(lambda _, inputs: shown(inputs))
        else:
            module.register_forward_pre_hook(_compute_given, prepend=True)
    if heads and hasattr(optimizer, "register_step_post_hook"):
        # masters are stepped; what torch counts of the parameters stays as it is
        optimizer.register_step_post_hook(partial(_note_step, heads))


def _put_around_engine(module: nn.Module, before: int, after: int) -> None:
    """Call the hook `before` just before DeepSpeed's, and `after` after them: not around others."""
    hooks: Any = module._forward_hooks  # an OrderedDict, to stubs a dict
    own = {before, after}
    others = [key for key in hooks if key not in own]
    places = [place for place, key in enumerate(others) if is_of_engine(hooks[key])] or [0]
    first, last = places[0], places[-1] + 1
    for key in (*others[:first], before, *others[first:last], after, *others[last:]):
        hooks.move_to_end(key)


def _note_step(heads: list[DeferringHead], *_: object) -> None:
    for head in heads:
        head.steps_of_engine = getattr(head, "steps_of_engine", 0) + 1  # it may defer no more


def _compute_given(_: nn.Module, inputs: tuple[Any, ...]) -> Any:
    if not any(isinstance(each, DeferredLogits) for each in inputs):
        return None
    return tuple(each.computed() if isinstance(each, DeferredLogits) else each for each in inputs)


def _hide_result(module: nn.Module, _: object, result: Any) -> Any:
    has_own = any(True for _ in module.parameters(recurse=False))  # gathered for this gradient
    return hidden(compute_those_without_loss(result) if has_own else result)


def _modules_around(heads: Sequence[nn.Module], model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model that have some of these in them."""
    for module in model.modules():
        if module not in heads and any(inner in heads for inner in module.modules()):
            yield module
