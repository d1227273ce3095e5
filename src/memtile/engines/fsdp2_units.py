"""FSDP2 units: which modules are gathered together, and which units are gathered ahead.

A unit is a tile, small neighbouring tiles, a tied tile, or a layer without tiles. Gathered ahead
are the next ones in forward and the ones before in backward. Forward follows the order of the last
forward, backward that of its own forward. A unit that was gathered ahead and is not used, because
a step took another path, is freed as soon as that is seen.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from memtile.convert import tiled_layers
from memtile.errors import EngineError
from memtile.layers import TiledModule
from memtile.transfer.iterations import in_backward

FsdpUnit = list[nn.Module]
UnitModule = Any  # first FSDPModule of a unit; to mypy, FSDPModule is no nn.Module
_NONE: Final[list[UnitModule]] = []


def units_of(model: nn.Module, unit_bytes: int) -> list[FsdpUnit]:
    """The units of a model, in the order of its modules.

    Neighbouring tiles of a layer are one unit up to `unit_bytes`; a tied tile is one alone. So is a
    module without tiles whose own parameters have as many bytes; what is smaller is in no unit.
    """
    seen: set[nn.Module] = set()
    units: list[FsdpUnit] = []
    for layer in _layers(model, unit_bytes):
        unit: FsdpUnit = []
        for module in _modules(layer):
            if module in seen:
                continue
            seen.add(module)
            if isinstance(module, SharedTile):
                units.append([module])
            elif unit and _nbytes([*unit, module]) <= unit_bytes:
                unit.append(module)
            else:
                unit = [module]
                units.append(unit)
    return units


def _nbytes(modules: Sequence[nn.Module]) -> int:
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())


def _layers(model: nn.Module, unit_bytes: int) -> Iterator[nn.Module]:
    """Tiled layers, and modules with enough parameters of their own that no other one shares."""
    inside = {inner for _, layer in tiled_layers(model) for inner in layer.modules()}
    own = {
        module: [parameter for parameter in module._parameters.values() if parameter is not None]
        for module in model.modules()
    }
    uses = Counter(parameter for parameters in own.values() for parameter in parameters)
    for module, parameters in own.items():
        if isinstance(module, TiledModule):
            yield module
        elif module not in inside and module is not model and not list(module.children()):
            alone = all(uses[parameter] == 1 for parameter in parameters)
            if parameters and alone and _nbytes([module]) >= max(unit_bytes, 1):
                yield module


def _modules(layer: nn.Module) -> list[nn.Module]:
    return [tile for _, tile in layer.tiles()] if isinstance(layer, TiledModule) else [layer]


class SharedTile(nn.Linear):
    """A tile of a tied head and embedding: an embedding of integers, a linear of anything else."""

    multiplies_floats: ClassVar[bool] = True  # see `layers.gathered_calls`
    padding_idx: int | None = None
    scale_grad_by_freq: bool = False

    def forward(self, input: Tensor) -> Tensor:
        """The rows of integers (…) as (…, in_features), or the product (…, out_features)."""
        if input.is_floating_point():
            return super().forward(input)
        return functional.embedding(
            input, self.weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq
        )


def share_tied_tiles(model: nn.Module) -> None:
    """Put one module in the places of all tiles that share a weight: FSDP2 shards by module."""
    places: dict[object, list[tuple[TiledModule, tuple[int, int]]]] = {}
    for _, layer in tiled_layers(model):
        for index, tile in layer.tiles():
            places.setdefault(tile.weight, []).append((layer, index))
    for tied in places.values():
        if len(tied) < 2:
            continue
        shared = _shared([layer.tile(*index) for layer, index in tied], tied[0][0])
        for layer, index in tied:
            path, _, name = layer.tile_path(*index).rpartition(".")
            setattr(layer.get_submodule(path), name, shared)


def _shared(tiles: list[nn.Module], layer: TiledModule) -> nn.Module:
    if len({id(tile) for tile in tiles}) == 1:
        return tiles[0]
    biases = [bias for tile in tiles if (bias := tile._parameters.get("bias")) is not None]
    weight = tiles[0]._parameters["weight"]
    assert weight is not None
    if len(biases) > 1 or any(type(tile) not in (nn.Linear, nn.Embedding) for tile in tiles):
        raise EngineError(
            f"{layer.full_name()}: its tiles are tied to others in a way that one module cannot "
            "stand for (several biases, or tiles of a class of their own); untie them, or leave "
            "them untiled"
        )
    rows, columns = weight.shape
    shared = SharedTile(columns, rows, bias=False, device="meta")
    shared.register_parameter("weight", weight)
    shared.register_parameter("bias", biases[0] if biases else None)
    for tile in tiles:
        if isinstance(tile, nn.Embedding):
            shared.padding_idx = tile.padding_idx
            shared.scale_grad_by_freq = tile.scale_grad_by_freq
    return shared.train(tiles[0].training)


def bring_ahead(model: nn.Module, units: Sequence[Sequence[nn.Module]], ahead: int) -> None:
    """Gather so many units of a sharded model ahead of the one in use."""
    order = _Order(model, ahead)
    for unit in units:
        _Prefetch(unit, order)


class _Order:
    """The order in which a forward uses units, and so the neighbours of each."""

    def __init__(self, model: nn.Module, ahead: int) -> None:
        self._root: UnitModule = model
        self._ahead = ahead
        self._has_begun, self._has_ended = False, True
        self._used: list[UnitModule] = []
        self.with_backward: set[UnitModule] = set()  # in this forward, whose results require grad
        self._before: dict[UnitModule, list[UnitModule]] = {}  # likewise
        self._waiting: set[UnitModule] = set()  # gathered ahead, and not used yet
        self._open: set[UnitModule] = set()  # in use: those of an MLP in tiles are together
        self._following: dict[UnitModule, list[UnitModule]] = {}
        model.register_forward_pre_hook(self._begin, prepend=True)
        model.register_forward_hook(self._end)

    def use(self, unit: UnitModule) -> tuple[list[UnitModule], list[UnitModule]]:
        """Note that a unit is used now; give the units after it and before it, nearest first."""
        if not self._has_begun:
            raise EngineError(
                f"a layer inside the {type(self._root).__name__} was called before the model "
                "itself: FSDP2 finds its root in the model's first forward; call model(…) once, "
                "then its parts"
            )
        self._open.add(unit)
        following = [u for u in self._following.get(unit, _NONE) if u not in self._open]
        self._waiting.discard(unit)
        self._free(self._waiting.difference(following))
        self._waiting.update(following)
        earlier = (each for each in reversed(self._used) if each in self.with_backward)
        before = [each for each, _ in groupby(earlier) if each is not unit][: self._ahead]
        if self._before.setdefault(unit, before) != before:  # a second use, after other units
            before = _NONE
        self._used.append(unit)
        return following, before

    def close(self, unit: UnitModule) -> None:
        """Note that it is not in use any more."""
        self._open.discard(unit)

    def _begin(self, *_: object) -> None:
        self._has_begun = True
        self._open.clear()
        for unit in [] if self._has_ended else self._used:  # the forward before raised
            unit.reshard()
        self._free(self._waiting)
        self._has_ended = False
        self._used, self.with_backward, self._before = [], set(), {}

    def _end(self, *_: object) -> None:
        self._has_ended = True
        self._free(self._waiting)
        used, ahead = [unit for unit, _ in groupby(self._used)], self._ahead
        places: dict[UnitModule, set[tuple[UnitModule, ...]]] = {}
        for place, unit in enumerate(used):
            places.setdefault(unit, set()).add(tuple(used[place + 1 : place + 1 + ahead]))
        self._following = {
            unit: list(found.pop()) if len(found) == 1 else _NONE for unit, found in places.items()
        }

    def _free(self, units: Iterable[UnitModule]) -> None:
        for unit in list(units):
            self._waiting.discard(unit)
            unit.unshard()  # waits for a gather that is under way
            unit.reshard()


class _Prefetch:
    """Sets what one unit prefetches in forward and backward; nothing where it is recomputed.

    FSDP2 keeps what is recomputed in backward until its own backward: all tiles of a checkpointed
    block. So such a unit is freed after its recomputation and prefetches nothing; nor does any
    unit in its first backward, which shows whether it is recomputed.
    """

    def __init__(self, unit: Sequence[nn.Module], order: _Order) -> None:
        self._first: UnitModule = unit[0]
        self._order = order
        self._recomputed, self._trained = False, False
        unit[0].register_forward_pre_hook(self._choose, prepend=True)
        for module in unit:
            module.register_forward_hook(self._note)
        unit[-1].register_forward_hook(self._end)

    def _choose(self, *_: object) -> None:
        following, before = _NONE, _NONE
        if in_backward():
            self._recomputed = True
        else:
            following, before = self._order.use(self._first)
        self._first.set_modules_to_forward_prefetch(following)
        if torch.is_grad_enabled():
            if not self._trained or self._recomputed:
                before = _NONE
            # The unit itself, gathered already, stands for none: after an empty list FSDP2 guesses,
            # which left a third unit gathered where a tied one has other units before each use.
            self._first.set_modules_to_backward_prefetch(before or [self._first])
            self._trained = True

    def _note(self, module: nn.Module, inputs: object, result: object) -> None:
        results = result if isinstance(result, tuple) else (result,)
        if any(isinstance(each, torch.Tensor) and each.requires_grad for each in results):
            self._order.with_backward.add(self._first)

    def _end(self, *_: object) -> None:
        self._order.close(self._first)
        if in_backward():
            self._first.reshard()
