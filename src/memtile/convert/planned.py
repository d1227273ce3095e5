"""How `tile` carries out a plan: its decisions, its home, recomputed activations, its workspace."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from memtile.convert.kinds import tileable
from memtile.convert.select import Cut, TilingDecision, choose
from memtile.costmodel import Plan, PlannedLayer, Products, RankPlan
from memtile.errors import ArgumentError, CannotTileError
from memtile.homes import Home, allocation_of, resolve_home, trim_heap
from memtile.layers import TiledStack
from memtile.transfer import SavedPieces, home_of_activations, park_each_forward

_CHECKPOINTING = ("activation", "gradient")  # the second is what transformers called it before 5.23


def planned_decisions(model: nn.Module, plan: Plan | RankPlan) -> list[TilingDecision]:
    """What happens to each linear, embedding and stack of the model by this plan."""
    planned = {layer.name: layer for layer in plan.layers}
    decisions = choose(model, Cut(parks=True), None)
    for name in sorted(planned.keys() ^ {decision.name for decision in decisions}):
        where = "it" if name in planned else "the model"
        raise _other_model(model, f"{name} is only in {where}")
    found = []
    for decision in decisions:
        layer = planned[decision.name]
        dtype = str(tileable(model, decision.name).weight.dtype).removeprefix("torch.")
        ours, theirs = (
            (layer.shape, layer.dtype, layer.ties),
            (decision.shape, dtype, decision.ties),
        )
        if ours != theirs or (layer.grid is not None and not decision.tiled):
            raise _other_model(
                model,
                f"{decision.name} is {theirs} there ({decision.reason}) and {ours} in the plan",
            )
        _check_layer(model, layer, plan)
        found.append(
            replace(decision, tiled=layer.grid is not None, reason=layer.reason, grid=layer.grid)
        )
    return found


def _check_layer(model: nn.Module, layer: PlannedLayer, plan: Plan | RankPlan) -> None:
    """Refuse columns of an embedding, and weights that train though planned as frozen."""
    found = [tileable(model, name) for name in layer.ties or (layer.name,)]
    rows_only = any(each.kind is not None and each.kind.rows_only for each in found)
    if layer.grid is not None and layer.grid.in_splits > 1 and rows_only:
        raise _other_model(model, f"{layer.name} is looked up by rows, which the plan cuts")
    if plan.optimizer and not layer.trainable and found[0].weight.requires_grad:
        raise _other_model(
            model, f"{layer.name} is frozen in the plan and trains here, which takes more memory"
        )


def planned_home(
    model: nn.Module, plan: Plan | RankPlan, home: Home | str | None
) -> Home | str | None:
    """The home that is given, or the one that a plan names; None where it parks nothing.

    A plan that recomputes what the model cannot is refused.
    """
    parks = plan.parks_activations or (isinstance(plan, Plan) and plan.parked_layers)
    if isinstance(plan, RankPlan) and home is not None and not parks:
        raise ArgumentError(
            f"home={home!r} beside a plan for ranks: its tiles live as shards of the engine; "
            "leave home out, or plan for one process with memtile.plan"
        )
    if plan.checkpointing and not has_checkpointing(model):
        raise _other_model(model, "it has no gradient checkpointing")
    found = plan.home if home is None and parks else home
    if isinstance(plan, RankPlan) and found is not None:
        return home_of_activations(found)  # before anything is tiled
    return found


def use_as_planned(model: nn.Module, plan: Plan | RankPlan, home: Home | str | None) -> None:
    """Park activations in this home where the plan does, and give all homes their memory."""
    if plan.parks_activations:
        _park_activations(model, plan, home)
    if isinstance(plan, Plan):
        _share_budget(model, plan)


def _park_activations(model: nn.Module, plan: Plan | RankPlan, home: Home | str | None) -> None:
    """Park what each call saves for backward: in the home of the tiles, where there are any."""
    shares = _shares(model.parameters())
    assert home is not None
    found = shares[0][0] if shares else resolve_home(home)
    found.mapped_bytes = plan.mapped_bytes if isinstance(plan, Plan) else 0
    park_each_forward(model, SavedPieces(found))


def _share_budget(model: nn.Module, plan: Plan) -> None:
    """Give the homes of a model what the plan has for them in memory, each by its share."""
    for home, share in _shares(model.parameters()):
        home.mapped_bytes = int(plan.mapped_bytes * share)
        home.slab_bytes = 0  # as planned: as large as the largest tile
    stacks = [module for module in model.modules() if isinstance(module, TiledStack)]
    for home, share in _shares({p for stack in stacks for p in stack.parameters()}):
        home.kept_bytes = int(plan.kept_bytes * share)


def _shares(parameters: Iterable[nn.Parameter]) -> list[tuple[Home, float]]:
    """Each home of these parameters, and what part of their rooms it has."""
    rooms = Counter[Home]()
    for parameter in parameters:
        allocation = allocation_of(parameter)
        if allocation is not None:
            rooms[allocation.home] += allocation.room
    return [(home, room / rooms.total()) for home, room in rooms.items()]


def has_checkpointing(model: nn.Module) -> bool:
    """Whether a model can recompute its activations, as those of transformers can."""
    able = getattr(model, "supports_gradient_checkpointing", True)
    return able and any(hasattr(model, f"{name}_checkpointing_enable") for name in _CHECKPOINTING)


def set_checkpointing(model: nn.Module, on: bool) -> None:
    """Turn gradient checkpointing on or off, where the model has it."""
    act, arguments = ("enable", [{"use_reentrant": False}]) if on else ("disable", [])
    for name in _CHECKPOINTING:
        switch = getattr(model, f"{name}_checkpointing_{act}", None)
        if switch is not None and has_checkpointing(model):
            switch(*arguments)
            return


def check_alone(plan: object, given: dict[str, object]) -> None:
    """Refuse what is no plan, and sizes beside one."""
    if not isinstance(plan, Plan | RankPlan):
        raise ArgumentError(
            f"the plan is a {type(plan).__name__}; give what memtile.plan(model, …) gave "
            "(Plan.from_json reads its text), or a size as out_splits=… or max_tile_bytes=…"
        )
    others = [name for name, value in given.items() if value is True or value not in (None, 1)]
    if others:
        raise ArgumentError(
            f"tile(model, plan, {others[0]}=…): a plan says how each layer is cut; give the plan "
            "alone, or sizes alone"
        )


def _other_model(model: nn.Module, why: str) -> CannotTileError:
    return CannotTileError(
        f"the plan does not fit this {type(model).__name__}: {why}; make one for it with "
        "memtile.plan(model, …), before the model is tiled"
    )


def take_workspace(products: Products) -> None:
    """Make the widest float32 product of a step, with factors whose pages take no memory.

    MKL keeps the workspace of each product for the next one, and takes another where none is large
    enough. By ever larger products of SmolLM2-135M it came to hold 41 MiB; with the largest first,
    11 (torch 2.13 on an AMD EPYC). The CPU decides what stays: `memtile.planner.product_memory`
    measures it.
    """
    if products.widest is not None:
        multiply(*products.widest)
        trim_heap()  # where the result was


def multiply(rows: int, depth: int, columns: int) -> None:
    """Make a product of factors that are never written."""
    torch.mm(torch.empty(rows, depth), torch.empty(columns, depth).t())
