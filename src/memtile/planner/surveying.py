"""A model as the planner sees it: its weights, what else it holds, what an optimizer keeps."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from memtile.convert import Choice, kind_of
from memtile.optim import CHUNK_ELEMENTS, Inner, Piece
from memtile.planner.counting import live_peak
from memtile.planning import LooseModule, Parameter, ShardedLayer, Uses
from memtile.planning.model_records import Rest, State, Weight

_SIXTEEN_BITS = 2


def weights_of(model: nn.Module, choices: Sequence[Choice], trains: bool) -> list[Weight]:
    """The weight of each linear and embedding, those that are shared once."""
    groups: dict[int, list[Choice]] = {}
    for choice in choices:
        weight = model.get_submodule(choice.name).weight
        groups.setdefault(id(weight), []).append(choice)
    return [_weight(model, group, trains) for group in groups.values()]


def _weight(model: nn.Module, group: Sequence[Choice], trains: bool) -> Weight:
    first = group[0]
    modules = [model.get_submodule(choice.name) for choice in group]
    parameter = modules[0].weight
    assert isinstance(parameter, torch.Tensor)
    rows_only = any(kind is not None and kind.rows_only for kind in map(kind_of, modules))
    return Weight(
        names=tuple(choice.name for choice in group),
        shape=first.shape,
        dtype=dtype_name(parameter),
        element_bytes=parameter.element_size(),
        trainable=trains and parameter.requires_grad,
        is_looked_up=rows_only,
        rows_only=rows_only,
        obstacle="" if first.tiled else first.reason,
    )


def rest_of(model: nn.Module, weights: Sequence[Weight], trains: bool) -> Rest:
    """The parameters that are no such weight, and the buffers."""
    known = {id(model.get_submodule(name).weight) for weight in weights for name in weight.names}
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    trained: dict[int, int] = {}
    for parameter in others:
        if trains and parameter.requires_grad:
            size = parameter.element_size()
            trained[size] = trained.get(size, 0) + parameter.numel()
    return Rest(
        nbytes=sum(parameter.nbytes for parameter in others),
        trainable=tuple(sorted(trained.items())),
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
        tensors=len(others),
    )


def sharded_of(
    model: nn.Module, weights: Sequence[Weight], trains: bool
) -> tuple[list[ShardedLayer], list[LooseModule]]:
    """The layers that can be tiled, as engines see them, and the modules of all other parameters.

    How often a step uses them is not known here: never.
    """
    layers, known, places = [], set[int](), _places(model)
    for weight in (each for each in weights if not each.obstacle):
        modules = [model.get_submodule(name) for name in weight.names]
        found = [b for m in modules if (b := m._parameters.get("bias")) is not None]
        biases = {id(b): b for b in found if places[id(b)] == 1}  # a shared one is kept whole
        known.update({id(modules[0].weight), *biases})
        layers.append(
            ShardedLayer(
                name=weight.names[0],
                weight=Parameter(*weight.shape, weight.element_bytes, weight.trainable),
                biases=tuple(_parameter(bias, trains) for bias in biases.values()),
                rows_only=weight.rows_only,
                shared=weight.is_tied,
                uses=Uses(0, 0, 0),
            )
        )
    return layers, list(_loose(model, known, trains))


def _loose(model: nn.Module, known: set[int], trains: bool) -> Iterator[LooseModule]:
    places = _places(model)
    seen = set(known)
    for name, module in model.named_modules():
        new = [p for p in _own(module) if id(p) not in seen]
        seen.update(map(id, new))
        shares = any(places[id(parameter)] > 1 for parameter in new)
        alone = bool(name) and not shares and not list(module.children())
        if new:
            parameters = tuple(_parameter(parameter, trains) for parameter in new)
            yield LooseModule(name, parameters, alone, Uses(0, 0, 0))


def _places(model: nn.Module) -> Counter[int]:
    """How many modules have each parameter, by its id."""
    return Counter(id(p) for module in model.modules() for p in _own(module))


def _own(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module._parameters.values() if p is not None and p.numel()]


def _parameter(parameter: torch.Tensor, trains: bool) -> Parameter:
    rows = parameter.shape[0] if parameter.dim() else 1
    trained = trains and parameter.requires_grad
    return Parameter(rows, parameter.numel() // rows, parameter.element_size(), trained)


def state_of(
    model: nn.Module,
    optimizer: type[torch.optim.Optimizer],
    options: Mapping[str, Any],  # what the optimizer's class takes
    masters: bool,
) -> State:
    """What an optimizer keeps of one element of each dtype of the model, and takes for a moment.

    Raises:
        OptimizerError: it cannot step tile by tile.
    """
    inner = Inner(optimizer, options)
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    kept = {}
    for dtype in dtypes:
        wide = masters and dtype.itemsize == _SIXTEEN_BITS
        stepped = torch.float32 if wide else dtype
        moments = [each.itemsize for each in inner.fields(inner.defaults, stepped).values()]
        kept[dtype.itemsize] = (*moments, *([stepped.itemsize] if wide else []))
    return State(tuple(sorted(kept.items())), _stepping(inner, model))


def _stepping(inner: Inner, model: nn.Module) -> int:
    """What the optimizer makes while it steps the rows that are stepped at once."""
    largest = max((p.numel() for p in model.parameters() if p.requires_grad), default=0)
    value = torch.zeros(min(largest, CHUNK_ELEMENTS))
    piece = Piece(value, torch.zeros_like(value))
    inner.step([piece], inner.defaults)
    return live_peak(lambda: inner.step([piece], inner.defaults)) + value.nbytes


def dtype_name(tensor: torch.Tensor) -> str:
    """Such as "float32"."""
    return str(tensor.dtype).removeprefix("torch.")
