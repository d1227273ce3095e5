"""What is gathered together: a tile, small neighbours of a layer, or a layer without tiles."""

from collections import Counter
from collections.abc import Iterator, Sequence

from torch import nn

from memtile.engines.ties import SharedTile
from memtile.layers import TiledModule

Unit = list[nn.Module]


def units_of(model: nn.Module, unit_bytes: int) -> list[Unit]:
    """The units of a model, in the order of its modules.

    Neighbouring tiles of a layer are one unit up to `unit_bytes`; a tied tile is one alone. So is a
    module without tiles whose own parameters have as many bytes; what is smaller is in no unit.
    """
    seen: set[nn.Module] = set()
    return [unit for layer in _layers(model, unit_bytes) for unit in _cut(layer, unit_bytes, seen)]


def tiled_layers(model: nn.Module) -> list[TiledModule]:
    """The tiled layers of a model."""
    return [module for module in model.modules() if isinstance(module, TiledModule)]


def nbytes_of(modules: Sequence[nn.Module]) -> int:
    """Bytes of their parameters."""
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())


def _cut(layer: nn.Module, unit_bytes: int, seen: set[nn.Module]) -> Iterator[Unit]:
    unit: Unit = []
    for module in (module for module in _modules(layer) if module not in seen):
        seen.add(module)
        if isinstance(module, SharedTile):
            yield [module]
            continue
        if unit and nbytes_of([*unit, module]) > unit_bytes:
            yield unit
            unit = []
        unit = [*unit, module]
    if unit:
        yield unit


def _layers(model: nn.Module, unit_bytes: int) -> Iterator[nn.Module]:
    """Tiled layers, and modules with enough parameters of their own that no other one shares."""
    inside = {inner for layer in tiled_layers(model) for inner in layer.modules()}
    places = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    for module in model.modules():
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        if isinstance(module, TiledModule):
            yield module
        elif own and module not in inside and module is not model and not list(module.children()):
            alone = all(places[id(parameter)] == 1 for parameter in own)
            if alone and nbytes_of([module]) >= max(unit_bytes, 1):
                yield module


def _modules(layer: nn.Module) -> list[nn.Module]:
    return [tile for _, tile in layer.tiles()] if isinstance(layer, TiledModule) else [layer]
