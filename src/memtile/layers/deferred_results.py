"""Deferred logits in what modules give, kept from engines that take results apart.

DeepSpeed puts an `autograd.Function` around each tensor that a module gives; so does DDP around the
results of its model, where it searches for unused parameters or learns a static graph.
"""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from memtile.layers.deferred_logits import DeferredLogits


def hidden(value: Any) -> Any:
    """What a module gives, with functions, of which engines make nothing, in place of them."""
    return _map_results(value, DeferredLogits, _function_of)


def _function_of(logits: DeferredLogits) -> Callable[[], DeferredLogits]:
    def found() -> DeferredLogits:
        return logits

    return found


def shown(value: Any) -> Any:
    """With the deferred logits again."""
    return _map_results(value, FunctionType, _logits_of)


def _logits_of(value: Any) -> Any:
    return value() if value.__module__ == __name__ else value


def computed(value: Any) -> Any:
    """What a module gives, with computed logits."""
    return _map_results(value, DeferredLogits, DeferredLogits.computed)


def compute_those_without_loss(value: Any) -> Any:
    """What a module gives, with computed logits but for those that have a loss."""
    return _map_results(
        value, DeferredLogits, lambda each: each if each.has_loss else each.computed()
    )


def _map_results(value: Any, kind: type, act: Callable[[Any], Any]) -> Any:
    """With act(x) for each x of a kind in it; dicts and dataclasses are changed in place."""
    if isinstance(value, kind):
        return act(value)
    if isinstance(value, dict):
        for key, each in [*value.items()]:
            if (found := _map_results(each, kind, act)) is not each:
                value[key] = found
    elif type(value) in (tuple, list) or hasattr(value, "_fields"):
        made = [_map_results(each, kind, act) for each in value]
        if any(found is not each for found, each in zip(made, value, strict=True)):
            cls: Any = type(value)
            return cls(*made) if hasattr(value, "_fields") else cls(made)  # a named tuple
    elif is_dataclass(value) and not isinstance(value, type):
        for name in [field.name for field in fields(value) if hasattr(value, field.name)]:
            each = getattr(value, name)
            if (found := _map_results(each, kind, act)) is not each:
                object.__setattr__(value, name, found)  # a frozen one too
    return value


def hide_from_ddp() -> None:
    """Keep deferred logits from the DDP whose forward is under way, if one is."""
    ddp = DistributedDataParallel._get_active_ddp_module()
    found = None if ddp is None else ddp.__dict__.get("_post_forward")
    if ddp is not None and getattr(found, "__func__", None) is not _post_forward:
        ddp.__dict__["_post_forward"] = MethodType(_post_forward, ddp)


def _post_forward(ddp: Any, results: Any) -> Any:  # with private attributes of torch's
    """In place of torch's own, which is called.

    Where that learns a static graph, a function around all results starts to reduce gradients: none
    may be left out. Where it searches for unused parameters, one result tells of all of them.
    """
    learns = ddp.static_graph and not ddp._static_graph_delay_allreduce_enqueued
    if not (learns or ddp.find_unused_parameters):
        return type(ddp)._post_forward(ddp, results)
    if torch.is_grad_enabled():
        results = computed(results) if learns else compute_those_without_loss(results)
    return shown(type(ddp)._post_forward(ddp, hidden(results)))
