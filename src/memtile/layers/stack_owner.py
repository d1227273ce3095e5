"""`StackOwner`: what a module becomes whose stacks of experts are tiles."""

from typing import Any, ClassVar

from torch import nn

from memtile.layers.tiled_stack import TiledStack


class StackOwner(nn.Module):
    """A module some of whose stacks are tiles, each a child with its parameter's name.

    `put_stack` makes a module one by giving it a subclass of its own class, as torch's
    parametrizations do: what the class is and does stays, but for what subclasses of this one
    override. `restore_stack` gives the class back.
    """

    dense_class: ClassVar[type[nn.Module]]  # the module's own
    dense_names: tuple[str, ...]  # of all its parameters, in its order

    @classmethod
    def adopt(cls, module: nn.Module) -> None:
        """Make a module one, with no stack in tiles yet."""
        if not isinstance(module, StackOwner):
            names = tuple(module._parameters)
            module.__class__ = _owner_class(cls, type(module))
            module.dense_names = names  # type: ignore[assignment]  # of its new class

    @classmethod
    def put_stack(cls, module: nn.Module, own: str, stack: TiledStack) -> None:
        """Put a stack in place of the module's parameter of that name."""
        cls.adopt(module)
        del module._parameters[own]
        module._modules[own] = stack

    def restore_stack(self, own: str, parameter: nn.Parameter) -> None:
        """Put a parameter in place of the stack of that name."""
        del self._modules[own]
        held = {**self._parameters, own: parameter}
        self._parameters.clear()
        self._parameters.update({name: held[name] for name in self.dense_names if name in held})
        if not any(isinstance(child, TiledStack) for child in self.children()):
            del self.dense_names
            self.__class__ = self.dense_class  # type: ignore[assignment]  # of any class

    def get_parameter(self, target: str) -> Any:
        """As torch's; the handle of the dense parameter for the name of a stack in tiles.

        torch's own does not ask here when it is called on a module further up: there the name of a
        stack's handle ends in ".weight", and an AttributeError says that the stack's own name is
        no parameter's.
        """
        child = self._modules.get(target)
        return child.weight if isinstance(child, TiledStack) else super().get_parameter(target)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the subclass is made at run time: it is made again where the module is unpickled
        base = next(c for c in type(self).__mro__[1:] if issubclass(c, StackOwner))
        return _owner_without_state, (base, self.dense_class), self.__dict__

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """torch's own hook: the dense name of a stack is handed to it as its weight."""
        for own, child in self._modules.items():
            if isinstance(child, TiledStack) and prefix + own in state_dict:
                state_dict[f"{prefix}{own}.weight"] = state_dict.pop(prefix + own)
        super()._load_from_state_dict(state_dict, prefix, *rest)


_classes: dict[tuple[type[StackOwner], type[nn.Module]], type[nn.Module]] = {}


def _owner_class(base: type[StackOwner], dense_class: type[nn.Module]) -> type[nn.Module]:
    key = base, dense_class
    if key not in _classes:
        attributes = {"dense_class": dense_class, "__module__": dense_class.__module__}
        _classes[key] = type(f"Tiled{dense_class.__name__}", key, attributes)
    return _classes[key]


def _owner_without_state(base: type[StackOwner], dense_class: type[nn.Module]) -> nn.Module:
    cls = _owner_class(base, dense_class)
    return cls.__new__(cls)
