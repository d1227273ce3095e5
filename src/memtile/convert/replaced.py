"""Warnings for what still uses parameters and modules that were replaced, since it trains nothing.

An optimizer of old parameters is found when it steps. Any other module is found from which an
attribute, a list in one, a bound method, a partial or a closure leads to an old module, or to a
tensor in the memory of its weight. Variables of a caller are not looked at.
"""

import gc
import types
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from memtile.errors import ReplacedModuleWarning, ReplacedParametersWarning
from memtile.homes import fork_safe_lock
from memtile.optim import TileOptimizer

_replaced = WeakIdKeyDictionary()  # parameter: who replaced it
_hooking = fork_safe_lock()
_hook: RemovableHandle | None = None


@contextmanager
def replacing(model: nn.Module, act: str) -> Iterator[None]:
    """Inside, parameters of the model are replaced; those that stay alive are noted.

    Only an optimizer that steps them does harm, so optimizers are looked at when they step.
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
    """Have torch call `_warn_of_step` before steps, for good.

    Removing the hook is not safe: torch iterates over its hooks without a lock, and another
    thread's step would fail ("OrderedDict mutated during iteration").
    """
    global _hook
    with _hooking:
        if _hook is None:
            _hook = register_optimizer_step_pre_hook(_warn_of_step)


def _warn_of_step(optimizer: Optimizer, *_: Any) -> None:  # what its step was given
    if not len(_replaced) or isinstance(optimizer, TileOptimizer):  # it raises itself
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


_MOST: Final = 1_000_000  # objects to look at: a module may lead to a whole data set
_TABLES: Final = ("_modules", "_parameters", "_buffers")
_ENDS: Final = (nn.Module, Tensor, types.FrameType, types.ModuleType, type, Optimizer)
_Attribute = tuple[nn.Module, str, str]  # the module, the name in it, the kind of what is there


class Replaced:
    """The modules that are replaced in one call."""

    def __init__(self) -> None:
        self._modules: list[tuple[str, weakref.ref[nn.Module]]] = []
        self._memory: list[tuple[str, StorageWeakRef]] = []

    def add(self, name: str, module: nn.Module | None, weight: nn.Parameter | None = None) -> None:
        """Note a module before it is replaced, and a weight that is copied."""
        if module is not None:
            self._modules.append((name, weakref.ref(module)))
        if weight is not None and not weight.is_meta:
            self._memory.append((name, StorageWeakRef(weight.untyped_storage())))

    def warn(self, model: nn.Module, stacklevel: int) -> None:
        """Warn of those that something still holds."""
        held = self._held(model)
        if held:
            gc.collect()  # a reference cycle may hold it
            held = self._held(model)
        if held:
            more = f", and {len(held) - 1} more are held" if len(held) > 1 else ""
            warnings.warn(
                f"{held[0]}{more}: what uses the old one from there computes with old values and "
                "trains nothing; set it anew after the call, from the model",
                ReplacedModuleWarning,
                stacklevel=stacklevel + 1,
            )

    def _held(self, model: nn.Module) -> list[str]:
        """A sentence for each replaced module that is held; nothing is searched if all are gone."""
        old = {id(m): name for name, ref in self._modules if (m := ref()) is not None}
        memory = {ref.cdata: name for name, ref in self._memory if not ref.expired()}
        if not old and not memory:
            return []
        modules = [
            m for m in gc.get_objects() if issubclass(type(m), nn.Module) and id(m) not in old
        ]
        near = _family(model, modules)
        modules.sort(key=lambda module: id(module) not in near)
        names = {id(module): name for name, module in model.named_modules()}
        told: dict[str, str] = {}
        for (holder, attribute, kind), thing in _reached(modules):
            name, what = old.get(id(thing)), "holds it"
            if name is None and id(holder) in near and _is_plain(thing):
                storage = StorageWeakRef(thing.untyped_storage())
                name, what = memory.get(storage.cdata), "has the memory of its weight"
            if name is not None and name not in told:
                owner = type(holder if id(holder) not in names else model).__name__
                path = filter(None, (owner, names.get(id(holder)), f"{attribute} (a {kind})"))
                told[name] = f"{name} was replaced, and {'.'.join(path)} {what}"
        return list(told.values())


def _family(model: nn.Module, modules: Sequence[nn.Module]) -> set[int]:
    """Ids of the modules in the same module trees as the model."""
    parents: dict[int, list[nn.Module]] = {}
    for module in modules:
        for child in (vars(module).get("_modules") or {}).values():
            parents.setdefault(id(child), []).append(module)
    above = {id(model): model}
    waiting = [model]
    while waiting:
        for parent in parents.get(id(waiting.pop()), ()):
            if id(parent) not in above:
                above[id(parent)] = parent
                waiting.append(parent)
    tops = [each for each in above.values() if id(each) not in parents] or [model]
    return {id(module) for top in tops for module in top.modules()}


def _reached(modules: Iterable[nn.Module]) -> Iterator[tuple[_Attribute, Any]]:  # of any kind
    """Each module or tensor that an attribute leads to, with the attribute."""
    seen: set[int] = set()
    for module in modules:
        for name, value in _attributes(module):
            attribute = module, name, type(value).__name__
            waiting = [value]
            while waiting and len(seen) < _MOST:
                thing = waiting.pop()
                if issubclass(type(thing), nn.Module | Tensor):  # proxies' classes may do work
                    yield attribute, thing
                elif id(thing) not in seen and gc.is_tracked(thing):
                    seen.add(id(thing))
                    waiting.extend(_below(thing))


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in list(vars(module).items()):
        yield from value.items() if name in _TABLES else ((name, value),)


def _below(thing: Any) -> Sequence[Any]:
    """What an object refers to; of a function, not its globals."""
    if issubclass(type(thing), _ENDS):
        return ()
    if type(thing) is types.FunctionType:
        return [thing.__closure__, thing.__defaults__, thing.__kwdefaults__, vars(thing)]
    return gc.get_referents(thing)


def _is_plain(thing: object) -> bool:
    """Whether it is a tensor with memory of its own."""
    return type(thing) in (Tensor, nn.Parameter) and thing.layout == torch.strided  # type: ignore[attr-defined]  # a tensor's
