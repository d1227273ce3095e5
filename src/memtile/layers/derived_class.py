"""Classes of modules that are changed in place: each is derived from the module's own class.

Names, hooks, attributes, state dicts and `isinstance` stay. A module may have several changes, each
derived from the one before.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from torch import nn


class ChangedModule(nn.Module):
    """A module whose forward is another one than that of its own class."""

    whole_class: type[nn.Module]  # without this change
    change: type["ChangedModule"]
    keeps_values = False  # whether it is for others what its own class is (`class_of`)

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A module of its own class: `nn.Sequential` makes its slices by calling its class."""
        return cls.whole_class(*args, **kwargs)

    def run(self, forward: partial[Any], args: Any, kwargs: Any) -> Any:
        """The changed forward; `forward` is that of the class without this change, with `self`."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the classes of `_derived` have no place to import from: they are made again
        given: Any = super().__reduce_ex__(protocol)  # typed as str | tuple of any length
        make, arguments, *rest = given
        cls, changes = _parts(type(self))
        known = tuple(cls if a is type(self) else a for a in arguments)
        return _remake, (changes, make, *known), *rest


def _remake(
    changes: list[type[ChangedModule]], make: Callable[..., nn.Module], *arguments: Any
) -> nn.Module:
    module = make(*arguments)
    for change in changes:
        apply_change(module, change)
    return module


def apply_change(module: nn.Module, change: type[ChangedModule]) -> None:
    """Give the module a class that has this change, unless its own has it."""
    if not isinstance(module, change):
        module.__class__ = _derived(change, type(module))


def undo_change(module: nn.Module, change: type[ChangedModule]) -> bool:
    """Take this change away, and no other; False where the module does not have it."""
    cls, changes = _parts(type(module))
    if change not in changes:
        return False
    for each in changes:
        cls = cls if each is change else _derived(each, cls)
    module.__class__ = cls
    return True


def _parts(cls: type[nn.Module]) -> tuple[type[nn.Module], list[type[ChangedModule]]]:
    """The class without its changes, and those from the first to the last."""
    changes: list[type[ChangedModule]] = []
    while issubclass(cls, ChangedModule) and "whole_class" in vars(cls):
        changes.insert(0, cls.change)
        cls = cls.whole_class
    return cls, changes


_classes: dict[tuple[type[ChangedModule], type[nn.Module]], type[ChangedModule]] = {}


def _derived(change: type[ChangedModule], cls: type[nn.Module]) -> type[ChangedModule]:
    """The class of modules of this class with this change: always the same one."""

    @wraps(cls.forward)
    def forward(self: ChangedModule, *args: Any, **kwargs: Any) -> Any:
        return change.run(self, partial(cls.forward, self), args, kwargs)

    key = change, cls
    if key not in _classes:
        own = {"forward": forward, "whole_class": cls, "change": change}
        if change.keeps_values:
            own["acts_as"] = getattr(cls, "acts_as", cls)
        body = {**own, "__module__": cls.__module__}
        _classes[key] = type(f"{change.__name__}{cls.__name__}", (change, cls), body)
    return _classes[key]
