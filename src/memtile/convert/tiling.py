"""`tile`: a model's linears, embeddings and stacks of experts become tiles, in place."""

import math
import warnings
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import nn

from memtile.checkpoints import CheckpointHome, Paths
from memtile.convert.deferring import set_deferring_of
from memtile.convert.kinds import kind_of, tileable, tiled_layers
from memtile.convert.materializing import (
    checked_for_empty,
    filled_from,
    to_make,
    warn_of_differences,
)
from memtile.convert.name_matching import Findings
from memtile.convert.planned import (
    check_alone,
    planned_decisions,
    planned_home,
    set_checkpointing,
    take_workspace,
    use_as_planned,
)
from memtile.convert.replaced import Replaced, replacing
from memtile.convert.select import Cut, TilingDecision, choose
from memtile.convert.tiling_mlps import (
    cut_for_mlps,
    has_mlps_in_tiles,
    put_mlps_in_tiles,
    why_no_mlp,
)
from memtile.costmodel import Plan, RankPlan
from memtile.costmodel.byte_sizes import size_in_bytes
from memtile.errors import (
    ArgumentError,
    CannotTileError,
    TileSizeWarning,
)
from memtile.homes import (
    Home,
    Reservation,
    allocation_of,
    is_parked,
    keep_freed_memory_out,
    resolve_home,
    whole_pages,
)
from memtile.layers import DeferringHead, TiledLinear, TiledModule, is_shard, set_deferring
from memtile.transfer import watch_model

Model = TypeVar("Model", bound=nn.Module)


def tile(
    model: Model,
    plan: Plan | RankPlan | None = None,
    *,
    out_splits: int | None = None,
    in_splits: int = 1,
    max_tile_bytes: int | str | None = None,
    modules: Collection[str] | None = None,
    home: Home | str | None = None,
    checkpoint: Paths | None = None,
    strict: bool = False,
    return_freed_memory: bool | None = None,
    tile_mlps: bool = False,
) -> Model:
    """Cut the linears, embeddings and stacks of experts of a model into tiles, in place.

    Values are bit-identical; ties, frozen parameters, mode, dtype, device and gradients stay. Each
    replaced layer is freed before the next is made, so the peak is the model and one layer.
    Parameters and modules are new: make the optimizer afterwards, and look modules up anew. An
    older optimizer warns when it steps (`ReplacedParametersWarning`). transformers models compute
    losses without logits (`defer_logits`).

    Args:
        model: any module that holds linears.
        plan: of `memtile.plan` for this model: which layers, which grids, and which home unless
            `home` is given; resident layers stay dense. Or of `memtile.planner.plan_ranks`: tiles
            for an engine; a home is for activations alone, where the plan parks them.
        out_splits: rows of tiles for every module. In a stack bounds fall between experts; more
            rows than experts cut each of them into the same number of parts.
        in_splits: columns of tiles for every linear (embeddings, what is tied to them, and stacks
            keep 1).
        max_tile_bytes: the largest weight tile, such as "16MiB"; weights that fit stay dense.
        modules: names to tile; all that can be by default (`select_linears` lists them).
        home: where the tiles' weights are parked: "disk", "disk:FOLDER", "host", "device" or a
            `Home`; None: nowhere. With a home, layers that fit in one tile are parked whole,
            and a size is optional: without one each expert is a tile. "checkpoint", with a
            checkpoint: they stay in its files, to be read and never trained.
        checkpoint: a folder or file of safetensors, or several (a base and its adapters), for a
            model on the meta device (`memtile.empty_model`): values stream to where the tiles
            live, and the dense model never exists. What is not tiled is in memory afterwards.
        strict: refuse a checkpoint that holds more than the model has, or lacks what the model
            makes by its own rule (a new head); False: warn.
        return_freed_memory: whether the process gives freed memory back to the system at once from
            now on, as a plan's numbers suppose: a setting of glibc's malloc, logged, which costs
            page faults. None: with what `memtile.plan` gave, and without CUDA with a plan for ranks
            too. False: the peak may be more.
        tile_mlps: compute the MLPs without their intermediate activation (`memtile.tile_mlps`), and
            cut their layers alike along it; so they are cut also where `tile_mlps` came before.

    Returns:
        The same model.

    Raises:
        ArgumentError: no size or a wrong one is given, sizes beside a plan, a name is no module of
            the model, a checkpoint is given for a model that has values, or MLPs are to be tiled
            and there are none.
        CannotTileError: an engine has sharded the model, the model is itself a linear, a module in
            `modules` cannot be tiled, out_splits and in_splits fit no module at all, or the plan is
            of another model.
        HomeFullError: the home has no room for all tiles; the model is unchanged.
        CheckpointError: it is missing, damaged, quantized or not of this model; the model is on
            the meta device as before, after an error half-way with new parameter objects.

    Warns:
        TileSizeWarning: parameters stay above `max_tile_bytes`, or with a home alone in memory and
            larger than the largest weight that is parked: experts of an unknown class, rows of an
            embedding that are longer, layers that are tiled already. Or no MLP could be cut for
            `tile_mlps`, since a tile is smaller than a feature, say.
        CheckpointWarning: the checkpoint holds more than the model has, or adapters have no values
            yet. NewWeightsWarning: the model made what it lacks.
        ReplacedModuleWarning: a module still uses one that was replaced, or the memory of its
            weight, from an attribute, a list or a bound method.

    Examples:
        >>> model = memtile.tile(model, max_tile_bytes=64 << 10, home="disk")
    """
    _refuse_shards(model)
    cut = Cut()
    if plan is None:
        largest = size_in_bytes(max_tile_bytes, "max_tile_bytes")
        cut = Cut(out_splits, in_splits, largest, parks=home is not None)
        decisions = _checked_decisions(model, cut, modules)
        if tile_mlps or (cut.in_splits <= 1 and has_mlps_in_tiles(model)):
            decisions = cut_for_mlps(model, decisions, cut)
    else:
        sizes = {"out_splits": out_splits, "in_splits": in_splits}
        given = {**sizes, "max_tile_bytes": max_tile_bytes, "modules": modules}
        check_alone(plan, {**given, "tile_mlps": tile_mlps or None})
        decisions = planned_decisions(model, plan)
        home = planned_home(model, plan, home)
    if plan is not None or (home is not None and modules is None):
        _refuse_tiled_before(model)
    own = plan if isinstance(plan, Plan) else None  # of this process
    tiles_home = None if isinstance(plan, RankPlan) else home
    on_cpu = own is not None or not torch.cuda.is_available()  # a rank's device
    if return_freed_memory or (return_freed_memory is None and plan is not None and on_cpu):
        keep_freed_memory_out()
    if own is not None:
        take_workspace(own.products)
    if checkpoint is not None or any(decision.tiled for decision in decisions):
        _replace_and_fill(model, decisions, tiles_home, checkpoint, strict)
    if plan is not None:
        use_as_planned(model, plan, home)
    set_deferring_of(model, True)
    if (tile_mlps or (plan is not None and plan.tiles_mlps)) and not put_mlps_in_tiles(model):
        warnings.warn(why_no_mlp(model), TileSizeWarning, stacklevel=2)
    if plan is None and modules is None:
        _warn_of_larger(model, cut, decisions)
    if plan is not None and plan.optimizer is not None:
        set_checkpointing(model, plan.checkpointing)  # its hooks belong to the new modules
    return model


def _checked_decisions(
    model: nn.Module, cut: Cut, modules: Collection[str] | None
) -> list[TilingDecision]:
    """What happens to each module; refused where nothing can be tiled."""
    if not cut.is_given:
        raise ArgumentError(
            "tile(model) needs a size: out_splits=…, in_splits=…, or max_tile_bytes=…; with "
            "home=… whole layers can be parked"
        )
    decisions = choose(model, cut, modules)
    if kind_of(model) is not None or isinstance(model, TiledModule):
        raise CannotTileError(
            f"the model is itself a {type(model).__name__}, which cannot be replaced in place; use "
            "TiledLinear.from_linear(linear, …) or TiledEmbedding.from_embedding(embedding, …)"
        )
    needs_one = cut.max_tile_bytes is None or cut.parks
    if needs_one and not any(decision.tiled for decision in decisions):
        why = f"{decisions[0].name}: {decisions[0].reason}" if decisions else "it has no linear"
        raise CannotTileError(
            f"nothing of {type(model).__name__} can be tiled ({why}); "
            "memtile.convert.select_linears(model, …) gives the reason for each module"
        )
    return decisions


def _replace_and_fill(
    model: nn.Module,
    decisions: Sequence[TilingDecision],
    home: Home | str | None,
    checkpoint: Paths | None,
    strict: bool,
) -> None:
    """Replace what was chosen, with a checkpoint's values where one is given; warn of the rest."""
    findings = None
    if checkpoint is not None:
        findings = checked_for_empty(model, checkpoint, strict=strict)
    replaced = replace_chosen(model, decisions, home, findings)
    if findings is not None:
        warn_of_differences(model, findings, stacklevel=3)
    replaced.warn(model, stacklevel=3)


def _refuse_shards(model: object) -> None:
    if not isinstance(model, nn.Module):
        return  # refused where its modules are asked for
    for name, parameter in model.named_parameters():
        if is_shard(parameter):
            raise CannotTileError(
                f"{name} is a shard over ranks already: tile the model first, then give it to the "
                "engine"
            )


def replace_chosen(
    model: nn.Module,
    decisions: Sequence[TilingDecision],
    home: Home | str | None,
    findings: Findings | None = None,
) -> Replaced:
    """Replace what was chosen, once its home has room for all of it, and fill it if asked to."""
    if findings is None and home == "checkpoint":
        raise ArgumentError(
            'home="checkpoint" leaves the tiles in the files of a checkpoint: give its folder too, '
            "as checkpoint=folder, with a model of memtile.empty_model(lambda: …)"
        )
    if findings is not None and home == "checkpoint":
        made = {name.removesuffix(".weight") for name in to_make(model, findings)}  # in no file
        decisions = [c for c in decisions if made.isdisjoint(c.ties or (c.name,))]
    held = None if home is None else _room_for(model, decisions, home)
    parked = None if held is None else held.home
    parks = nullcontext() if held is None else held.used_by_this_thread()
    fills = nullcontext() if findings is None else filled_from(model, findings, parked)
    keep_bias = {decision.name for decision in decisions if decision.keeps_bias}
    replaced, done = Replaced(), set[str]()
    with parks, replacing(model, "memtile.tile"), fills:
        for decision in decisions:
            if decision.tiled and decision.name not in done:
                done.update(_tile_group(model, decision, parked, keep_bias, replaced))
    if parked is not None:
        for name, parameter in model.named_parameters():
            allocation = allocation_of(parameter)
            if allocation is not None and allocation.home is parked:
                allocation.label = name  # for messages
        watch_model(model)
    return replaced


def _room_for(
    model: nn.Module, decisions: Sequence[TilingDecision], home: Home | str
) -> Reservation:
    """A reservation in the home for every chosen tile; nothing is parked yet."""
    if home == "checkpoint":
        return Reservation(CheckpointHome())
    device = next(model.parameters(), torch.empty(0)).device
    found = resolve_home(home, "cpu" if device.type == "meta" else device)
    sizes: list[int] = []
    for decision in decisions:
        if (
            decision.tiled
            and decision.grid is not None
            and decision.ties[:1] in ((), (decision.name,))
        ):
            weight = tileable(model, decision.name).weight
            rects = (decision.grid.rect(*index) for index in decision.grid.indices())
            tiles = [whole_pages(math.prod(rect.shape) * weight.element_size()) for rect in rects]
            sizes += tiles if weight.grad is None else 2 * tiles  # gradients move there too
    return found.hold(sizes)


def _refuse_tiled_before(model: nn.Module) -> None:
    """Refuse a model with tiles that would stay in memory, though a home is given."""
    for name, layer in tiled_layers(model):
        weights = layer.tile_parameters("weight")
        if weights and not any(map(is_parked, weights.values())):
            raise CannotTileError(
                f"{name} is tiled already, and its tiles would stay in memory; call "
                "memtile.untile(model) first, then memtile.tile(model, …, home=…)"
            )


def _warn_of_larger(model: nn.Module, cut: Cut, decisions: list[TilingDecision]) -> None:
    """Warn of parameters above `max_tile_bytes`; without it, above the largest parked weight."""
    limit, rule = cut.max_tile_bytes, f"above max_tile_bytes={cut.max_tile_bytes}"
    parameters = dict(model.named_parameters())
    if limit is None and cut.parks:
        tiled = [model.get_submodule(decision.name) for decision in decisions if decision.tiled]
        limit = max(layer.weight.nbytes for layer in tiled if isinstance(layer, TiledModule))
        rule = f"in memory, larger than the largest parked weight, of {limit} bytes"
        parameters = {n: p for n, p in parameters.items() if not is_parked(p)}
    larger = {n: p.nbytes for n, p in parameters.items() if limit is not None and p.nbytes > limit}
    if not larger:
        return
    reasons = {decision.name: decision.reason for decision in decisions if not decision.tiled}
    name, size = max(larger.items(), key=lambda item: item[1])
    owners = (owner for owner in reasons if f"{name}.".startswith(f"{owner}."))
    why = reasons.get(next(owners, ""), "it belongs to no linear, embedding or known stack")
    warnings.warn(
        f"{len(larger)} parameters stay {rule}, {sum(larger.values())} bytes together; the largest "
        f"is {name} with {size} bytes: {why}",
        TileSizeWarning,
        stacklevel=3,
    )


def _tile_group(
    model: nn.Module,
    decision: TilingDecision,
    home: Home | None,
    keep_bias: Collection[str],
    replaced: Replaced,
) -> tuple[str, ...]:
    """Replace one module, and those tied to it, at every place where they stand."""
    first: TiledModule | None = None
    names = decision.ties or (decision.name,)
    for name in names:
        dense = tileable(model, name)
        assert decision.grid is not None
        module = None if dense.stack else dense.module  # which holds a stack and stays
        replaced.add(name, module, dense.weight)
        # A bias that others share stays whole: the layer gets the parameter itself.
        bias = dense.module._parameters.get("bias") if name in keep_bias else None
        dense.module._parameters |= {} if bias is None else {"bias": None}
        try:
            layer = dense.tiled(decision.grid, first, home)
        finally:
            dense.module._parameters |= {} if bias is None else {"bias": bias}
        if bias is not None:
            assert isinstance(layer, TiledLinear)  # nothing else has a bias
            layer.keep_bias(bias)
        layer.name_in_model = name
        if isinstance(module, DeferringHead):
            set_deferring(layer, True)
        first = first or layer
        dense.replace_by(layer, model)
        del dense, module
    return names
