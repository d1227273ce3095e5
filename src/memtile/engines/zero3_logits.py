"""Losses without logits under ZeRO-3, whose hooks would compute deferred logits wherever they pass.

DeepSpeed puts an `autograd.Function` around each tensor that a module takes or gives. Logits whose
loss is known are kept from it; others are computed before it sees them, inside of the module.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch import nn
from torch.utils._pytree import tree_any, tree_map_only

from memtile.layers import DeferredLogits, defer_in_engine


def keep_deferred(
    model: nn.Module, optimizer: Any
) -> None:  # the torch optimizer inside DeepSpeed's
    """Have the heads of a model defer their logits, and the results of its modules keep them."""
    heads = defer_in_engine(model)
    if not heads:
        return
    inside = {inner for head in heads for inner in head.modules()}
    for module in model.modules():
        if module in inside:
            continue
        module.register_forward_pre_hook(_hide_given(module), prepend=True)
        module.register_forward_pre_hook(lambda _, inputs: _shown(inputs))
        if not inside.isdisjoint(module.modules()):
            module.register_forward_hook(lambda _, __, result: _hidden(result), prepend=True)
            module.register_forward_hook(lambda _, __, result: _shown(result))
    if hasattr(optimizer, "register_step_post_hook"):
        # masters are stepped; what torch counts of the parameters stays as it is
        optimizer.register_step_post_hook(lambda *_: _note_step(heads))


def _note_step(heads: list[Any]) -> None:
    for head in heads:
        head.steps_of_engine = getattr(head, "steps_of_engine", 0) + 1


def _hide_given(module: nn.Module) -> Callable[[nn.Module, Any], Any]:
    takes_deferred = isinstance(module, nn.CrossEntropyLoss)
    return lambda _, inputs: _hidden(inputs, takes_deferred)


def _hidden(value: Any, also_without_loss: bool = False) -> Any:
    """With functions, of which DeepSpeed makes nothing, in place of deferred logits."""

    def hide(logits: DeferredLogits) -> Any:
        if not (logits.has_loss or also_without_loss):
            return logits.computed()

        def found() -> DeferredLogits:
            return logits

        return found

    return tree_map_only(DeferredLogits, hide, value) if tree_any(_is_deferred, value) else None


def _shown(value: Any) -> Any:
    """With the deferred logits again."""
    if not tree_any(_is_hidden, value):
        return None
    return tree_map_only(FunctionType, lambda each: each() if _is_hidden(each) else each, value)


def _is_deferred(value: Any) -> bool:
    return isinstance(value, DeferredLogits)


def _is_hidden(value: Any) -> bool:
    return isinstance(value, FunctionType) and value.__module__ == __name__
