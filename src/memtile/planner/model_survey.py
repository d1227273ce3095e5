"""Lists what the planner needs of a model: weights, other parameters, optimizer state."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memtile.checkpoints.opening import way_to
from memtile.convert import (
    Cut,
    TilingDecision,
    Work,
    choose,
    has_checkpointing,
    integrations,
    kind_of,
    tileable,
    tiled_layers,
)
from memtile.costmodel import LooseModule, Parameter, PlannedLayer, ShardedLayer, Uses
from memtile.costmodel.model_records import Activations, Rest, StateSizes, Weight
from memtile.costmodel.plan_parts import PARKED, RESIDENT, check_tokens
from memtile.errors import ArgumentError, CannotTileError
from memtile.geometry import Grid
from memtile.optim import CHUNK_ELEMENTS, ParameterSlice, SliceOptimizer
from memtile.planner.operation_count import live_peak

_SIXTEEN_BITS = 2
_LARGE = 0.01  # of a model's bytes: a parameter that a plan names although it cannot cut it


@dataclass(frozen=True)
class Survey:
    """What both planners need to know of a model and of its step."""

    model: nn.Module
    decisions: Sequence[TilingDecision]  # its linears, embeddings and stacks
    weights: Sequence[Weight]  # of these, shared ones once
    state: StateSizes | None  # what the optimizer keeps; None: inference
    work: Work  # the forward of a step
    checkpointing: Sequence[bool]  # the possible values

    @property
    def trains(self) -> bool:
        """Whether a step has a backward."""
        return self.state is not None

    def layer(self, decision: TilingDecision, grid: Grid | None, reason: str) -> PlannedLayer:
        """What a plan says of a layer that is cut by this grid; None: it is resident."""
        weight = self.weight_of(decision)
        return PlannedLayer(
            name=decision.name,
            shape=decision.shape,
            dtype=weight.dtype,
            nbytes=weight.nbytes,
            grid=grid,
            place=RESIDENT if grid is None else PARKED,
            reason=reason,
            trainable=weight.trainable,
            ties=decision.ties,
        )

    def activations(self, parks: bool | None, in_tiles: bool | None) -> list[Activations]:
        """What may be done with activations; None: either, of parking and of MLPs in tiles."""
        either = [(False, True) if asked is None else (asked,) for asked in (parks, in_tiles)]
        return [Activations(*each) for each in product(*either, self.checkpointing)]

    def weight_of(self, decision: TilingDecision) -> Weight:
        """The weight of a layer."""
        return next(weight for weight in self.weights if decision.name in weight.names)


def survey(
    source: object,
    dtype: torch.dtype | None,
    optimizer: type[torch.optim.Optimizer] | None,
    options: object,
    masters: bool,
    tokens: int,
    batch: int,
    work: Work | None,
    checkpointing: bool | None,
) -> Survey:
    """Check the arguments that both planners have, and look at the model."""
    check_tokens(tokens, batch)
    if work is not None and not callable(work):
        raise ArgumentError(
            f"work={work!r} must be a function of the model; leave it out, or give one"
        )
    if options is not None and not isinstance(options, Mapping):
        raise ArgumentError(f"options={options!r} must be what the optimizer takes, by name")
    check_choice("checkpointing", checkpointing, (None, True, False))
    trains = optimizer is not None
    model = _model_of(source, dtype)
    decisions = choose(model, Cut(parks=True), None)
    return Survey(
        model,
        decisions,
        _weights_of(model, decisions, trains),
        _state_of(model, optimizer, options or {}, masters) if optimizer else None,
        work or _work_for(model, tokens, batch, trains),
        _checkpointing_choices(model, checkpointing, trains),
    )


def check_choice(name: str, value: object, known: Sequence[object]) -> None:
    """Refuse a value that is none of those that are known."""
    if value not in known or (isinstance(value, int) and not isinstance(value, bool)):
        raise ArgumentError(f"{name}={value!r} must be one of {', '.join(map(repr, known))}")


def _model_of(source: object, dtype: torch.dtype | None) -> nn.Module:
    """The model itself, or an empty one that a config or a folder describes."""
    if isinstance(source, nn.Module):
        _check_model(source, dtype)
        return source
    if isinstance(source, str | os.PathLike) and not (Path(source) / "config.json").is_file():
        place, way_out = Path(source), "give a folder that save_pretrained wrote"
        way_out = way_out if place.exists() else way_to(place, way_out)
        raise ArgumentError(f"{str(source)!r} holds no config.json; {way_out}")
    for integration in integrations(imported_only=False):
        model = integration.empty(source, dtype)
        if model is not None:
            return model
    raise ArgumentError(
        f"{source!r} is no model: give an nn.Module, a transformers config, or a folder with a "
        "config.json (and have transformers installed)"
    )


def _check_model(model: nn.Module, dtype: torch.dtype | None) -> None:
    if dtype is not None:
        raise ArgumentError(
            f"dtype={dtype}: a model has its own; convert it first, with model.to(dtype)"
        )
    for name, _ in tiled_layers(model):
        raise CannotTileError(
            f"{name or type(model).__name__} is tiled already; plan before tiling, or call "
            "memtile.untile(model) first"
        )
    for name, parameter in model.named_parameters():
        if parameter.device.type not in ("cpu", "meta"):
            raise CannotTileError(
                f"{name} is on {parameter.device}: plans are for work on the CPU so far; choose "
                "the tiles there with memtile.tile(model, max_tile_bytes=…, home=…)"
            )


def _checkpointing_choices(model: nn.Module, given: bool | None, trains: bool) -> tuple[bool, ...]:
    can = trains and has_checkpointing(model)
    if given and not can:
        raise ArgumentError(
            f"checkpointing=True: {type(model).__name__} "
            + ("has no gradient_checkpointing_enable" if trains else "is not trained by this plan")
            + "; leave it out"
        )
    return (False, True) if given is None and can else (bool(given),)


def _work_for(model: nn.Module, tokens: int, batch: int, trains: bool) -> Work:
    """The forward that an integration knows, or one of what the first layer takes."""
    for integration in integrations():
        work = integration.work(model, tokens, batch, trains)
        if work is not None:
            return work
    layers = ((each, kind) for each in model.modules() if (kind := kind_of(each)) is not None)
    first, kind = next(layers, (None, None))
    if first is None or kind is None:
        raise ArgumentError(
            f"it is not known what {type(model).__name__} takes: give work=…, a function that is "
            "called with the model and gives the loss of one step"
        )
    rows, columns = kind.shape(first)
    shape, rows_only = (batch, tokens // batch), kind.rows_only

    def forward(meta_copy: nn.Module) -> Tensor | None:
        ids = torch.arange(tokens).view(shape) % rows
        x = ids if rows_only else torch.empty(*shape, columns, device="meta")
        result: Tensor = meta_copy(x)
        return result.float().square().mean() if trains else None

    return forward


def _weights_of(
    model: nn.Module, decisions: Sequence[TilingDecision], trains: bool
) -> list[Weight]:
    """The weight of each linear, embedding and stack, those that are shared once."""
    groups: dict[int, list[TilingDecision]] = {}
    for decision in decisions:
        weight = tileable(model, decision.name).weight
        groups.setdefault(id(weight), []).append(decision)
    return [_weight(model, group, trains) for group in groups.values()]


def _weight(model: nn.Module, group: Sequence[TilingDecision], trains: bool) -> Weight:
    first = group[0]
    found = [tileable(model, decision.name) for decision in group]
    parameter, stack = found[0].weight, found[0].stack
    rows_only = any(each.kind is not None and each.kind.rows_only for each in found)
    return Weight(
        names=tuple(decision.name for decision in group),
        shape=first.shape,
        dtype=str(parameter.dtype).removeprefix("torch."),
        element_bytes=parameter.element_size(),
        trainable=trains and parameter.requires_grad,
        rows_only=rows_only,
        obstacle="" if first.tiled else first.reason,
        experts=found[0].experts,
        used=0 if stack is None else stack.used,
    )


def rest_of(seen: Survey) -> Rest:
    """The buffers, and the parameters that are none of these weights."""
    model, names = seen.model, (name for weight in seen.weights for name in weight.names)
    known = {id(tileable(model, name).weight) for name in names}
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    large, large_bytes = _large_of(model, known)
    trained: dict[int, int] = {}
    for parameter in others:
        if seen.trains and parameter.requires_grad:
            size = parameter.element_size()
            trained[size] = trained.get(size, 0) + parameter.numel()
    return Rest(
        nbytes=sum(parameter.nbytes for parameter in others),
        trainable=tuple(sorted(trained.items())),
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
        tensors=len(others),
        large=large,
        large_bytes=large_bytes,
    )


def _large_of(model: nn.Module, known: set[int]) -> tuple[str, int]:
    """The large parameters that have no rule to be cut by, in a few words, and their bytes."""
    least = _LARGE * sum(parameter.nbytes for parameter in model.parameters())
    sizes = {
        name: parameter.nbytes
        for name, parameter in model.named_parameters()
        if id(parameter) not in known and parameter.dim() > 1 and parameter.nbytes >= least
    }
    if not sizes:
        return "", 0
    name, more = max(sizes, key=sizes.__getitem__), len(sizes) - 1
    found = f"{name} and {more} more" if more else name
    return f"whole: {found}, no linear, embedding or known stack", sum(sizes.values())


def sharded_of(seen: Survey) -> tuple[list[ShardedLayer], list[LooseModule]]:
    """The layers that can be tiled, as engines see them, and the modules of all other parameters.

    How often a step uses them is not known here: their uses are 0.
    """
    model, trains = seen.model, seen.trains
    layers, known, places = [], set[int](), _places(model)
    for weight in (each for each in seen.weights if not each.obstacle):
        owners = [tileable(model, name) for name in weight.names]
        modules = [each.module for each in owners if each.stack is None]
        found = [b for m in modules if (b := m._parameters.get("bias")) is not None]
        biases = {id(b): b for b in found if places[id(b)] == 1}  # a shared one is kept whole
        known.update({id(owners[0].weight), *biases})
        layers.append(
            ShardedLayer(
                name=weight.names[0],
                weight=Parameter(*weight.shape, weight.element_bytes, weight.trainable),
                biases=tuple(_parameter(bias, trains) for bias in biases.values()),
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


def _parameter(parameter: Tensor, trains: bool) -> Parameter:
    rows = parameter.shape[0] if parameter.dim() else 1
    trained = trains and parameter.requires_grad
    return Parameter(rows, parameter.numel() // rows, parameter.element_size(), trained)


def _state_of(
    model: nn.Module,
    optimizer: type[torch.optim.Optimizer],
    options: Mapping[str, Any],  # what the optimizer's class takes
    masters: bool,
) -> StateSizes:
    """What an optimizer keeps of one element of each dtype, and its temporary memory."""
    inner = SliceOptimizer(optimizer, options)
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    kept = {}
    for dtype in dtypes:
        wide = masters and dtype.itemsize == _SIXTEEN_BITS
        stepped = torch.float32 if wide else dtype
        moments = [each.itemsize for each in inner.state_dtypes(inner.defaults, stepped).values()]
        kept[dtype.itemsize] = (*moments, *([stepped.itemsize] if wide else []))
    return StateSizes(tuple(sorted(kept.items())), _temporary_bytes(inner, model))


def _temporary_bytes(inner: SliceOptimizer, model: nn.Module) -> int:
    """The most that the optimizer makes while it steps as many rows as are stepped at once."""
    largest = max((p.numel() for p in model.parameters() if p.requires_grad), default=0)
    value = torch.zeros(min(largest, CHUNK_ELEMENTS))
    piece = ParameterSlice(value, torch.zeros_like(value))
    inner.step([piece], inner.defaults)
    return live_peak(lambda: inner.step([piece], inner.defaults)) + value.nbytes
