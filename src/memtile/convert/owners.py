"""Who holds which parameter in a model."""

from collections import defaultdict
from collections.abc import Iterator

from torch import nn

Place = tuple[str, str]


class Owners:
    """Every place, (module's name, parameter's own name), where a model holds each parameter.

    Parameters are told apart by identity, so keep none of them alive through this longer than the
    model is left as it is.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[int, list[Place]] = defaultdict(list)
        self._storages: dict[int, dict[int, Place]] = defaultdict(dict)
        for path, module in model.named_modules():
            for own, parameter in module._parameters.items():
                if parameter is not None:
                    self._places[id(parameter)].append((path, own))
                    self._storages[_storage(parameter)].setdefault(id(parameter), (path, own))

    def of(self, parameter: nn.Parameter) -> list[Place]:
        """Where the parameter stands."""
        return self._places[id(parameter)]

    def sharing_memory(self, parameter: nn.Parameter) -> Iterator[Place]:
        """Where other parameters stand that are views of the same memory."""
        if _storage(parameter):
            for other, place in self._storages[_storage(parameter)].items():
                if other != id(parameter):
                    yield place


def _storage(parameter: nn.Parameter) -> int:
    """What tells memory apart; 0 for a parameter that has none to compare."""
    if type(parameter) is not nn.Parameter or parameter.is_meta:
        return 0
    return parameter.untyped_storage().data_ptr()
