"""`tile`: a model's linears and embeddings become tiles, in place."""

import warnings
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import TypeVar

from torch import nn

from memtile.checkpoints import Paths
from memtile.convert.filling import Stored, checked_for_empty, fill_or_untile, make_values
from memtile.convert.finding import left_out, some
from memtile.convert.kinds import kind_of, replace_module
from memtile.convert.parking import has_parked_weight, home_for, settle_down
from memtile.convert.planned import (
    check_alone,
    check_checkpointing,
    planned_choices,
    planned_home,
    set_checkpointing,
)
from memtile.convert.replaced import replacing
from memtile.convert.select import Choice, Cut, choose
from memtile.convert.still_held import Replaced
from memtile.convert.workspaces import take_workspace
from memtile.errors import (
    ArgumentError,
    CannotTileError,
    CheckpointWarning,
    NewWeightsWarning,
    TileSizeWarning,
)
from memtile.geometry import Grid
from memtile.homes import Home, is_parked, keep_freed_memory_out
from memtile.layers import TiledLinear, TiledModule, is_shard
from memtile.planning import Plan, RankPlan

Model = TypeVar("Model", bound=nn.Module)


def tile(
    model: Model,
    plan: Plan | RankPlan | None = None,
    *,
    out_splits: int | None = None,
    in_splits: int = 1,
    max_tile_bytes: int | None = None,
    modules: Collection[str] | None = None,
    home: Home | str | None = None,
    checkpoint: Paths | None = None,
    strict: bool = False,
    return_freed_memory: bool | None = None,
) -> Model:
    """Cut the linears and embeddings of a model into tiles, in place.

    Values are bit-identical; frozen stays frozen, tied stays tied; training mode, dtype, device,
    gradients stay. Each replaced layer is freed before the next is made, so the peak is the model
    and one layer. Make the optimizer afterwards, and look modules up anew: the parameters are new
    ones. An optimizer that was made before warns when it steps (`ReplacedParametersWarning`);
    what holds a replaced module elsewhere (a plain list of modules) keeps the old one, of which a
    warning tells.

    Args:
        model: any module that holds linears.
        plan: what `memtile.plan` gave for this model: which layers, which grids, which home.
            Parked layers go to its home, unless `home` is given; what it leaves resident stays
            dense. Or what `memtile.plan_ranks` gave: tiles for an engine, which have no home.
        out_splits: rows of tiles for every module.
        in_splits: columns of tiles for every linear (embeddings, and what is tied to them, keep 1).
        max_tile_bytes: the largest weight tile; weights that fit stay dense.
        modules: names to tile; all that can be by default (`select_linears` lists them).
        home: where the tiles' weights are parked: "disk", "disk:FOLDER", "host", "device" or a
            `Home`; None: nowhere. With a home, layers that fit in one tile are parked whole,
            and a size is optional. "checkpoint", with a checkpoint: they stay in its files, to be
            read and never trained.
        checkpoint: a folder, or a file, of safetensors, for a model whose parameters are on the
            meta device (`memtile.empty_model`): their values stream to where the tiles live, so
            that the dense model never exists. What is not tiled is in memory afterwards. Or
            several of them: a base and the adapters of its `PeftModel`, say.
        strict: refuse a checkpoint that holds more than the model has, or lacks what the model
            makes by its own rule (a new head); False: tell it.
        return_freed_memory: whether the whole process gives freed memory back to the system at once
            from now on, as a plan's numbers suppose: a setting of glibc's malloc, logged, which
            costs page faults. None: with what `memtile.plan` gave. False: the peak may be more.

    Returns:
        The same model.

    Raises:
        ArgumentError: no size or a wrong one is given, sizes beside a plan, a name is no module of
            the model, or a checkpoint is given for a model that has values.
        CannotTileError: an engine has sharded the model, it is itself a linear, a module in
            `modules` cannot be tiled, out_splits and in_splits fit no module at all, or the plan is
            of another model.
        HomeFullError: the home has no room for all tiles; the model is unchanged.
        CheckpointError: it is missing, damaged, quantized or not of this model; the model is
            unchanged, on the meta device. So it is after an error half-way, but its parameters are
            new objects.

    Warns:
        TileSizeWarning: parameters stay above `max_tile_bytes`, or with a home alone in memory and
            larger than the largest weight that is parked: experts kept as one tensor, rows of an
            embedding that are longer, layers that are tiled already.
        CheckpointWarning: the checkpoint holds more than the model has; or adapters wait for their
            own. A NewWeightsWarning: it lacks what the model then made.
        ReplacedModuleWarning: a module holds one that was replaced, or the memory of its weight, in
            an attribute, a list, a bound method: it would go on using the old one.
    """
    _refuse_shards(model)
    if plan is not None:
        if not isinstance(plan, Plan | RankPlan):
            raise ArgumentError(
                f"the plan is a {type(plan).__name__}; give what memtile.plan(model, …) gave "
                "(Plan.from_json reads its text), or a size as out_splits=… or max_tile_bytes=…"
            )
        sizes = {"out_splits": out_splits, "in_splits": in_splits}
        check_alone({**sizes, "max_tile_bytes": max_tile_bytes, "modules": modules})
        returns = isinstance(plan, Plan) if return_freed_memory is None else return_freed_memory
        return _carry_out(model, plan, home, checkpoint, strict, returns)
    cut = Cut(out_splits, in_splits, max_tile_bytes, parks=home is not None)
    if not cut.is_given:
        raise ArgumentError(
            "tile(model) needs a size: out_splits=…, in_splits=…, or max_tile_bytes=…; with "
            "home=… whole layers can be parked"
        )
    choices = choose(model, cut, modules)
    if kind_of(model) is not None or isinstance(model, TiledModule):
        raise CannotTileError(
            f"the model is itself a {type(model).__name__}, which cannot be replaced in place; use "
            "TiledLinear.from_linear(linear, …) or TiledEmbedding.from_embedding(embedding, …)"
        )
    needs_one = cut.max_tile_bytes is None or home is not None
    if needs_one and not any(choice.tiled for choice in choices):
        why = f"{choices[0].name}: {choices[0].reason}" if choices else "it has no linear"
        raise CannotTileError(
            f"nothing of {type(model).__name__} can be tiled ({why}); "
            "memtile.select_linears(model, …) gives the reason for each module"
        )
    if home is not None and modules is None:
        _refuse_tiled_before(model)
    if return_freed_memory:
        keep_freed_memory_out()
    replaced = replace_chosen(model, choices, home, checkpoint, strict)
    replaced.warn(model, stacklevel=2)
    if modules is None:
        _warn_of_larger(model, cut, choices)
    return model


def _refuse_shards(model: object) -> None:
    if not isinstance(model, nn.Module):
        return  # refused where its modules are asked for
    for name, parameter in model.named_parameters():
        if is_shard(parameter):
            raise CannotTileError(
                f"{name} is a shard over ranks already: tile the model first, then give it to the "
                "engine"
            )


def _carry_out(
    model: Model,
    plan: Plan | RankPlan,
    home: Home | str | None,
    checkpoint: Paths | None,
    strict: bool,
    returns_memory: bool,
) -> Model:
    """Tile what a plan parks, and nothing else."""
    choices = planned_choices(model, plan)
    _refuse_tiled_before(model)
    if isinstance(plan, RankPlan):
        _refuse_home(home)
    else:
        check_checkpointing(model, plan)
    if returns_memory:
        keep_freed_memory_out()
    if isinstance(plan, Plan):
        take_workspace(plan.products)
    if checkpoint is not None or any(choice.tiled for choice in choices):
        where = planned_home(plan) if isinstance(plan, Plan) and home is None else home
        replace_chosen(model, choices, where, checkpoint, strict).warn(model, stacklevel=3)
    if plan.optimizer is not None:
        set_checkpointing(model, plan.checkpointing)  # its hooks belong to the new modules
    return model


def _refuse_home(home: object) -> None:
    """A tile has one place to live: a home, or an engine's shards."""
    if home is not None:
        raise ArgumentError(
            f"home={home!r} beside a plan for ranks: its tiles live as shards of the engine; leave "
            "home out, or plan for one process with memtile.plan"
        )


def replace_chosen(
    model: nn.Module,
    choices: Sequence[Choice],
    home: Home | str | None,
    checkpoint: Paths | None = None,
    strict: bool = False,
) -> Replaced:
    """Replace what was chosen, once its home has room for all of it, and its values are known."""
    if checkpoint is None and home == "checkpoint":
        raise ArgumentError(
            'home="checkpoint" leaves the tiles in the files of a checkpoint: give its folder too, '
            "as checkpoint=folder, with a model of memtile.empty_model(lambda: …)"
        )
    stored = None
    if checkpoint is not None:
        stored = checked_for_empty(model, checkpoint, strict=strict)
        if home == "checkpoint":
            choices = [choice for choice in choices if not _is_made(choice, stored)]
    held = None if home is None else home_for(model, choices, home)
    parked = None if held is None else held.home
    parks = nullcontext() if held is None else held.used_here()
    keep_bias = {choice.name for choice in choices if choice.keeps_bias}
    replaced = Replaced()
    with parks, replacing(model, "memtile.tile"):
        put_back = make_values(model, stored.made) if stored is not None else None
        done: set[str] = set()
        for choice in choices:
            if choice.tiled and choice.name not in done:
                done.update(_tile_group(model, choice, parked, keep_bias, replaced))
        if stored is not None and put_back is not None:
            fill_or_untile(model, stored.checkpoint, parked, put_back)
            _tell(model, stored)
    if parked is not None:
        settle_down(model, parked)
    return replaced


def _is_made(choice: Choice, stored: Stored) -> bool:
    """Whether a layer's weight is in no file."""
    return any(f"{name}.weight" in stored.made for name in choice.ties or (choice.name,))


def _tell(model: nn.Module, stored: Stored) -> None:
    """Warn of what the model and the checkpoint do not have in common."""
    where, found = stored.checkpoint.where, stored.findings
    waiting = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    said = {
        left_out(where, found.unexpected): found.unexpected,
        f"{where} lacks {some(found.made)}: initialised anew by the model's own rule, to be "
        "trained before use": found.made,
        f"{some(waiting)} have no values yet: give their folder to "
        "memtile.load_checkpoint(model, folder)": waiting,
    }
    for sentence, names in said.items():
        if names:
            kind = NewWeightsWarning if names is found.made else CheckpointWarning
            warnings.warn(sentence, kind, stacklevel=5)


def _refuse_tiled_before(model: nn.Module) -> None:
    """Tiles that would stay where they are, while their model is thought to be at home."""
    for name, layer in model.named_modules():
        if isinstance(layer, TiledModule) and not has_parked_weight(layer):
            raise CannotTileError(
                f"{name} is tiled already, and its tiles would stay in memory; call "
                "memtile.untile(model) first, then memtile.tile(model, …, home=…)"
            )


def _warn_of_larger(model: nn.Module, cut: Cut, choices: list[Choice]) -> None:
    """Say which parameters stay above the size, and why: a promise is not missed in silence.

    With a home and no size, those that are larger than the largest weight that went there.
    """
    limit, rule = cut.max_tile_bytes, f"above max_tile_bytes={cut.max_tile_bytes}"
    parameters = dict(model.named_parameters())
    if limit is None and cut.parks:
        limit = _largest_parked(model, choices)
        rule = f"in memory, larger than the largest weight that went home, of {limit} bytes"
        parameters = {n: p for n, p in parameters.items() if not is_parked(p)}
    larger = {
        name: parameter.nbytes
        for name, parameter in parameters.items()
        if limit is not None and parameter.nbytes > limit
    }
    if not larger:
        return
    reasons = {choice.name: choice.reason for choice in choices if not choice.tiled}
    name, size = max(larger.items(), key=lambda item: item[1])
    owners = (owner for owner in reasons if name.startswith(f"{owner}."))
    why = reasons.get(next(owners, ""), "it belongs to no linear or embedding")
    warnings.warn(
        f"{len(larger)} parameters stay {rule}; the largest is {name} with {size} bytes: {why}",
        TileSizeWarning,
        stacklevel=3,
    )


def _largest_parked(model: nn.Module, choices: list[Choice]) -> int:
    """Bytes of the largest weight, whole, that was parked."""
    layers = [model.get_submodule(choice.name) for choice in choices if choice.tiled]
    return max(layer.weight.nbytes for layer in layers if isinstance(layer, TiledModule))


def _tile_group(
    model: nn.Module,
    choice: Choice,
    home: Home | None,
    keep_bias: Collection[str],
    replaced: Replaced,
) -> tuple[str, ...]:
    """Replace one module, and those tied to it, at every place where they stand."""
    assert choice.grid is not None
    first: TiledModule | None = None
    names = choice.ties or (choice.name,)
    for name in names:
        dense = model.get_submodule(name)
        replaced.add(name, dense, [dense._parameters["weight"]])
        make = _with_its_bias if name in keep_bias else _tiled
        layer = make(dense, choice.grid, first, home)
        layer.name_in_model = name
        first = first or layer
        replace_module(model, dense, layer)
    return names


def _tiled(
    dense: nn.Module, grid: Grid, tied_to: TiledModule | None, home: Home | None
) -> TiledModule:
    kind = kind_of(dense)
    assert kind is not None
    return kind.tiled.from_dense(dense, grid, tied_to, home)


def _with_its_bias(
    dense: nn.Module, grid: Grid, tied_to: TiledModule | None, home: Home | None
) -> TiledModule:
    """The tiled form that has the very bias of the dense module: others share it."""
    bias = dense._parameters["bias"]
    assert bias is not None
    dense._parameters["bias"] = None
    try:
        layer = _tiled(dense, grid, tied_to, home)
    finally:
        dense._parameters["bias"] = bias
    assert isinstance(layer, TiledLinear)  # nothing else has a bias
    layer.keep_bias(bias)
    return layer
