"""`tile_mlps`: the MLPs of a model are computed without their intermediate activation, in place."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import nn

from memtile.convert.kinds import kind_of, tileable
from memtile.convert.select import Cut, TilingDecision
from memtile.costmodel.model_records import Mlp
from memtile.errors import ArgumentError, TileShapeError
from memtile.geometry import Grid
from memtile.layers import (
    MlpInTiles,
    MlpLayers,
    MlpPair,
    MlpPairs,
    MlpStructure,
    NoMlpError,
    TiledLinear,
    TiledModule,
    checked_structure,
    is_gathered_when_called,
    layers_of,
    low_rank_of,
    pairs_of,
    put_in_tiles,
    put_pairs_in_tiles,
    structure_of,
    take_out_of_tiles,
    take_pairs_out_of_tiles,
)

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class MlpDecision:
    """Whether one module is an MLP that `tile_mlps` takes.

    Args:
        name: the module's name in the model.
        taken: whether it is.
        reason: what it is, or why it is not taken.
    """

    name: str
    taken: bool
    reason: str

    def __str__(self) -> str:
        return f"{'yes' if self.taken else 'no ':3} {self.name}: {self.reason}"


def tile_mlps(model: Model, on: bool = True) -> Model:
    """Compute the MLPs of a model without their intermediate activation from now on (`tiled_mlp`).

    An MLP is told by what its forward does, and not by its name: gate and up of its one input, or
    one linear that is both, or up alone; an element-wise activation, a product, dropout, down. Up
    and down of a plain one may stand beside attention (OPT) or in two modules (BERT).
    Names, parameters, state dicts and classes are as they were, adapters (LoRA) may be around its
    linears, before or after. Where a call cannot be tiled (hooks on its linears, `torch.compile`,
    adapters of one that is gate and up), the module's own forward runs; so it does in inference
    where the intermediate activation is small, at most 2 MiB.

    Linears in tiles must be cut along the intermediate dimension: `tile(model, …, tile_mlps=True)`
    cuts them so. `memtile.convert.select_mlps` lists which are taken, and why not the others.

    Args:
        model: or an MLP itself.
        on: False: each module's own forward again, as `untile` does too.

    Returns:
        The same model.

    Raises:
        ArgumentError: it has no MLP that can be taken, or `on` is no truth value.

    Examples:
        >>> mlp = memtile.tile_mlps(
        ...     nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        ... )
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"the model is a {type(model).__name__}; it must be an nn.Module")
    if not isinstance(on, bool):
        raise ArgumentError(f"on={on!r} must be True or False")
    if not on:
        for module in model.modules():
            take_out_of_tiles(module)
            take_pairs_out_of_tiles(module)
    elif not put_mlps_in_tiles(model):
        raise ArgumentError(why_no_mlp(model))
    return model


def select_mlps(model: nn.Module) -> list[MlpDecision]:
    """What `tile_mlps` would do to each module that has linears of its own, with the reasons."""
    return [each.decision for each in _candidates(model)]


def put_mlps_in_tiles(model: nn.Module) -> bool:
    """Compute those that can be by `tiled_mlp`; whether there are any."""
    taken = [each for each in _candidates(model) if each.decision.taken]
    for each in taken:
        if each.pairs:
            put_pairs_in_tiles(each.module, each.pairs)
        else:
            put_in_tiles(each.module, each.sizes)
    return bool(taken)


def has_mlps_in_tiles(model: nn.Module) -> bool:
    """Whether any of them are computed so already."""
    return any(isinstance(module, MlpInTiles | MlpPairs) for module in model.modules())


def why_no_mlp(model: nn.Module) -> str:
    """What to say where no MLP can be taken."""
    refused = sorted(_candidates(model), key=lambda each: not each.mlps())  # MLPs first
    first = f" ({refused[0].decision.name}: {refused[0].decision.reason})" if refused else ""
    return (
        f"{type(model).__name__} has no MLP that can be computed by tiles{first}; "
        "memtile.convert.select_mlps(model) gives the reason for each module"
    )


def cut_for_mlps(
    model: nn.Module, decisions: Sequence[TilingDecision], cut: Cut
) -> list[TilingDecision]:
    """The same decisions, the layers of each MLP cut alike along its intermediate dimension.

    Raises:
        ArgumentError: the model has no MLP, or all linears are to be cut over columns.
    """
    if cut.in_splits > 1:
        raise ArgumentError(
            f"tile_mlps=True with in_splits={cut.in_splits}: layers of an MLP are cut along its "
            "intermediate dimension only; give out_splits=… or max_tile_bytes=…"
        )
    mlps = mlp_layers(model)
    if not mlps:
        raise ArgumentError(why_no_mlp(model))
    found = {decision.name: decision for decision in decisions}
    for inner, down, _ in mlps:
        own = [found[name] for name in (*inner, down) if name in found]
        if len(own) <= len(inner) or not all(d.tiled and d.grid and not d.ties for d in own):
            continue  # one of them stays whole, or is cut as others are
        splits = _splits(own, cut, tileable(model, down).weight.element_size())
        width, features = found[down].shape
        for name in inner if splits else ():
            grid = Grid.of_mlp(*found[name].shape, features, splits)
            found[name] = replace(found[name], grid=grid)
        if splits:
            found[down] = replace(found[down], grid=Grid.uniform(width, features, 1, splits))
    return list(found.values())


def mlp_layers(model: nn.Module) -> list[Mlp]:
    """The linears of each MLP that is known, however they are cut."""
    found = []
    known = {module: name for name, module in model.named_modules()}
    for each in _candidates(model):
        for names in each.mlps():
            *inner, down = map(each.path, names)
            lows = {name: low_rank_of(each.module.get_submodule(name)) for name in names}
            parts = [low.part_of_tiles(name == names[-1]) for name, low in lows.items() if low]
            found.append(Mlp(tuple(inner), down, tuple(known[part] for part in parts)))
    return found


def _splits(layers: Sequence[TilingDecision], cut: Cut, element_bytes: int) -> int:
    """Into how many parts the intermediate dimension is cut; 0: a feature of it is too long."""
    if cut.max_tile_bytes is None:
        return cut.out_splits or 1
    out, inner = layers[-1].shape
    width, elements = max(layers[0].shape[1], out), cut.max_tile_bytes // element_bytes
    return 0 if elements < width else Grid.splits_of_mlp(inner, width, elements)


@dataclass(frozen=True)
class _Candidate:
    """A module with linears of its own, and what is known of it."""

    module: nn.Module
    sizes: dict[str, int]  # the features that each of its linears gives, by its name
    structure: MlpStructure | None  # where its linears are one MLP
    decision: MlpDecision
    pairs: tuple[MlpPair, ...] = ()  # the MLPs of linears below it

    def mlps(self) -> list[list[str]]:
        """The names of the linears of each MLP, down at the end."""
        if self.structure is None:
            return [list(pair) for pair in self.pairs]
        return [[name for name in dict.fromkeys(self.structure[:3]) if name]]

    def path(self, name: str) -> str:
        """The name in the model of one of its linears, inside adapters."""
        base = "".join(".base_layer" for _ in _wrappers(self.module.get_submodule(name)))
        return f"{_prefix(self.decision.name)}{name}{base}"


def _prefix(name: str) -> str:
    return f"{name}." if name else ""


def _candidates(model: nn.Module) -> list[_Candidate]:
    """Modules with linears of their own, and those that have the two of an MLP below them."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"the model is a {type(model).__name__}; it must be an nn.Module")
    inside: tuple[str, ...] = ()
    found: list[_Candidate] = []
    linears: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        shapes = {own: s for own, child in module._modules.items() if (s := _shape(child))}
        if isinstance(module, TiledModule) or _shape(module):
            inside = (*inside, _prefix(name))
        elif shapes and type(module).forward is not nn.Module.forward:
            found.append(_candidate(name, module, shapes))
        if not found or found[-1].module is not module or not found[-1].mlps():
            linears |= {_prefix(name) + own: shape for own, shape in shapes.items()}
    pairs = {each.decision.name: each for each in _pair_candidates(model, linears)}
    in_pairs = {each.path(name) for each in pairs.values() for pair in each.pairs for name in pair}
    alone = [
        each
        for each in found
        if each.decision.name not in pairs and not {*map(each.path, each.sizes)} <= in_pairs
    ]
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    return sorted([*alone, *pairs.values()], key=lambda each: order[each.decision.name])


def _pair_candidates(
    model: nn.Module, linears: Mapping[str, tuple[int, int]]
) -> Iterator[_Candidate]:
    """Those that have MLPs whose linears stand beside others, or in several modules."""
    below: dict[str, set[tuple[int, int]]] = {}
    for name, shape in linears.items():
        for parent in _parents(name):
            below.setdefault(parent, set()).add(shape)
    wide = {name: shape for name, shape in linears.items() if shape[0] > shape[1]}
    owners = dict.fromkeys(
        next((parent for parent in _parents(name) if shape[::-1] in below[parent]), None)
        for name, shape in wide.items()
    )
    known: dict[object, tuple[MlpPair, ...]] = {}
    for owner in owners:
        module = None if owner is None else model.get_submodule(owner)
        if owner is None or module is None or "forward" in module.__dict__:
            continue
        own = {name: s for name, s in linears.items() if name.startswith(_prefix(owner))}
        shapes = {name[len(_prefix(owner)) :]: shape for name, shape in own.items()}
        kind = tuple(shapes.items()), tuple(map(_kind, module.modules()))
        if kind not in known:
            try:
                known[kind] = pairs_of(module, shapes)
            except NoMlpError:
                known[kind] = ()
        if known[kind]:
            yield _pair_candidate(owner, module, known[kind])


def _kind(module: nn.Module) -> tuple[object, ...]:
    """What tells modules apart whose forwards may differ; numbers count layers."""
    told = {k: v for k, v in vars(module).items() if isinstance(v, bool | str | float)}
    return type(module), *told.items()


def _parents(name: str) -> Iterator[str]:
    """The names of the modules that something is in, from the innermost outwards."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _pair_candidate(name: str, module: nn.Module, pairs: tuple[MlpPair, ...]) -> _Candidate:
    kind = "a plain MLP" if len(pairs) == 1 else "plain MLPs"
    reason = f"{kind} of " + ", ".join(f"{up} and {down}" for up, down in pairs)
    taken = True
    try:
        for pair in pairs:
            MlpLayers(None, *map(module.get_submodule, pair)).check()
    except TileShapeError as error:
        taken, reason = False, str(error)
    return _Candidate(module, {}, None, MlpDecision(name, taken, reason), pairs)


def _candidate(name: str, module: nn.Module, shapes: dict[str, tuple[int, int]]) -> _Candidate:
    sizes = {own: out for own, (out, _) in shapes.items()}
    structure = None
    try:
        structure = _structure(module, shapes, sizes)
        layers_of(module, structure).check()
    except (NoMlpError, TileShapeError) as error:
        return _Candidate(module, sizes, structure, MlpDecision(name, False, str(error)))
    kind = "a plain MLP" if structure.gate is None else "a gated MLP"
    return _Candidate(module, sizes, structure, MlpDecision(name, True, kind))


def _structure(
    module: nn.Module, shapes: dict[str, tuple[int, int]], sizes: dict[str, int]
) -> MlpStructure:
    if len(shapes) not in (2, 3):
        raise NoMlpError(f"an MLP has two or three linears of its own, and it has {len(shapes)}")
    if "forward" in module.__dict__ or isinstance(module, torch.jit.ScriptModule):
        raise NoMlpError("it has a forward of its own on the instance, or is a script")
    for own, child in module.named_children():
        if own not in sizes and any(True for _ in child.parameters()):
            raise NoMlpError(f"it has {own!r} with parameters besides its linears")
    cls: type[nn.Module] = module.whole_class if isinstance(module, MlpInTiles) else type(module)
    try:
        inspect.signature(cls.forward).bind(module, None)
    except TypeError as error:
        raise NoMlpError(f"its forward does not take one input: {error}") from error
    dtype = next(each.dtype for each in module.parameters())
    x = torch.empty(1, 1, next(iter(shapes.values()))[1], dtype=dtype, device="meta")
    found = checked_structure(module, cls.forward, sizes, x)
    if structure_of(module, cls.forward, sizes, x, rows=2) != found:
        raise NoMlpError("its forward depends on the number of rows")
    return found


def _shape(module: nn.Module | None) -> tuple[int, int] | None:
    """(out, in) of a linear, tiled or with adapters around it; None for others."""
    for inner in _wrappers(module):
        module = inner
    if module is None or isinstance(module, TiledLinear):
        return None if module is None else (module.out_features, module.in_features)
    if isinstance(module, nn.Linear) and is_gathered_when_called(module):
        return (module.out_features, module.in_features)
    kind = kind_of(module)
    is_linear = kind is not None and issubclass(kind.tiled, TiledLinear) and kind.matches(module)
    return kind.shape(module) if kind is not None and is_linear else None


def _wrappers(module: nn.Module | None) -> Iterator[nn.Module]:
    """What adapters (PEFT) have as their base, from the outermost inwards."""
    while isinstance(base := getattr(module, "base_layer", None), nn.Module):
        yield base
        module = base
