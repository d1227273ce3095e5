"""Linears whose weights an engine (FSDP2, ZeRO-3) gathers by hooks, for as long as they are called.

An operation on the weights of several linears is computed inside a call of each of them, one inside
the other: all are gathered meanwhile, and again while its backward runs.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final

import torch.distributed as dist
from torch import Tensor, nn

from memtile.layers import checks
from memtile.layers.values import is_shard

# the last is a plan's, whose hooks stand for an engine's
_ENGINES: Final = (
    "deepspeed.",
    "torch.distributed.fsdp.",
    "memtile.engines.",
    "memtile.planner.",
)


def is_gathered_when_called(module: nn.Module) -> bool:
    """Whether an engine's hooks are all that calling it does besides its product.

    A class with a forward of its own says by `multiplies_floats` that it gives the product.
    """
    forward = type(module).forward
    return (
        isinstance(module, nn.Linear)
        and (forward is nn.Linear.forward or getattr(module, "multiplies_floats", False))
        and not module._modules  # parametrizations
        and checks.has_hooks(module)
        and has_only_hooks_of_engines(module)
    )


def has_only_hooks_of_engines(module: nn.Module) -> bool:
    """Whether there are no other hooks, and no forward on the instance but an engine's."""
    forward = module.__dict__.get("forward")
    own = forward is None or hasattr(forward, "around")
    return own and all(map(is_of_engine, checks.hooks_of(module)))


def is_of_engine(hook: Any) -> bool:
    """Whether a hook is an engine's, by the name of its module."""
    while isinstance(hook, partial):
        hook = hook.func
    return (getattr(hook, "__module__", None) or "").startswith(_ENGINES)


def has_shards(layer: nn.Module) -> bool:
    """Whether an engine has any of a layer's parameters: none has without a process group."""
    ranks = dist.is_available() and dist.is_initialized()
    return ranks and any(map(is_shard, layer.parameters()))


def call_around(modules: Sequence[nn.Module], act: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """act(x) inside a call of each of these modules, whose hooks see x and what that gives."""
    trains = any(p.requires_grad for module in modules for p in module.parameters(recurse=False))
    inner = act
    for module in reversed(modules):
        inner = partial(_call_around, module, inner, trains)
    return inner(x)


def _call_around(
    module: nn.Module, act: Callable[[Tensor], Tensor], trains: bool, x: Tensor
) -> Tensor:
    before = module.__dict__.get("forward")
    around = getattr(before, "around", None)
    module.__dict__["forward"] = act if around is None else around(act, trains)
    try:
        found: Tensor = nn.Module.__call__(module, x)  # a head's own would leave it for later
        return found
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


def without_hooks_of_engines(module: nn.Module | None) -> nn.Module | None:
    """The module, or a copy without them where it or a module in it has some."""
    if module is None or not any(map(is_of_engine, _hooks_inside(module))):
        return module
    copy: nn.Module = object.__new__(type(module))
    inner = {name: without_hooks_of_engines(child) for name, child in module._modules.items()}
    copy.__dict__ = {**module.__dict__, "_modules": inner}
    checks.drop_hooks(copy, is_of_engine)
    return copy


def _hooks_inside(module: nn.Module) -> Iterator[Any]:
    return (hook for inner in module.modules() for hook in checks.hooks_of(inner))
