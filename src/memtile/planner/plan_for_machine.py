"""`plan`: from a model, or what describes one, and a budget to a `Plan`."""

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from memtile.convert import TilingDecision, Work, converting_bytes, mlp_layers, why_no_mlp
from memtile.costmodel import Budget, MachineProfile, Plan, PlannedLayer
from memtile.costmodel.memory_model import Rings, Setting
from memtile.costmodel.model_records import Activations, Mlp, ParkedLayout, Products, Rest, Weight
from memtile.costmodel.plan import OptimizerMode
from memtile.costmodel.search import Found, Search
from memtile.errors import ArgumentError
from memtile.home_names import IN_FILES, parse_home
from memtile.homes import (
    PAGE,
    Home,
    fits_page_cache,
    overwrites_in_place,
    trim_heap,
    usable_folder,
    word_for,
)
from memtile.planner.longest_step import longest_step
from memtile.planner.model_survey import Survey, check_choice, rest_of, survey
from memtile.planner.saved_rates import rates_of, workspaces_of
from memtile.planner.step_count import StepCount
from memtile.transfer import GRADIENT_SLABS, SLABS

_FAULT_BYTES = 64 << 10  # Linux maps so much around a page that is in the page cache


def plan(
    source: Any,  # a model, or whatever config an integration knows
    *,
    budget: "int | str | Budget",
    tokens: int | Literal["longest"],
    batch: int = 1,
    optimizer: type[torch.optim.Optimizer] | None = torch.optim.AdamW,
    options: Mapping[str, Any] | None = None,  # what the optimizer's class takes
    masters: bool = True,
    home: Home | str = "disk",
    mode: OptimizerMode = "in_backward",
    checkpointing: bool | None = None,
    park_activations: bool | None = None,
    tile_mlps: bool | None = None,
    dtype: torch.dtype | None = None,
    work: Work | None = None,
    rates: MachineProfile | str | os.PathLike[str] | None = None,
) -> Plan:
    """The plan with the fewest tiles that fits a budget, for `memtile.tile(model, plan)`.

    Nothing is loaded and the model is unchanged: a step is counted with shapes alone. Whatever can
    stay in memory stays there; the rest is parked, in tiles as large as fit. The first call
    on a machine measures its rates, in a few seconds.

    Args:
        source: a model, on whatever device, not tiled; a transformers config; or a folder with a
            `config.json`.
        budget: bytes above what the process holds when its work begins, or a size such as
            "2GiB", or a `Budget`. Weights count, even those that the model holds already.
        tokens: of one step: the batch's size times its length. For inference, the prompt and
            what is generated. "longest": as many as fit.
        batch: sequences of one step.
        optimizer: the class that `TileOptimizer` will get; None: inference.
        options: what that class takes besides parameters, where it changes what it keeps.
        masters: as in `TileOptimizer`.
        home: where parked tiles will live: "disk", "disk:FOLDER", "host", "device" or a home;
            "checkpoint": they stay in the files that `tile` gets, and only frozen ones are parked.
        mode: of `TileOptimizer`.
        checkpointing: whether the model recomputes activations in backward; None: what is faster.
        park_activations: whether what it keeps for backward lives in the home, a disk, as
            `memtile.park_activations` does; None: where nothing fits otherwise.
        tile_mlps: whether MLPs are computed without their intermediate activation, as by
            `memtile.tile_mlps`; None: in training, where nothing fits otherwise.
        dtype: of a model that a config or a folder describes, if not its own.
        work: a step's forward: called with a copy of the model on the meta device, gives the loss;
            for inference, whatever it makes. Needed where the model is neither of transformers nor
            begins with a linear or an embedding.
        rates: of another machine, or a JSON file of them; None: this machine's.

    Raises:
        BudgetError: nothing fits; the message says how much would be needed, and what to change.
        ArgumentError: an argument has no meaning.
        CannotTileError: the model is tiled already, or its step asks for values.
        OptimizerError: the optimizer cannot step tile by tile.
        HomeError: tiles cannot live in the folder.

    Examples:
        >>> plan = memtile.plan(model, budget="2GiB", tokens=1024)
        >>> model = memtile.tile(model, plan)
    """
    check_choice("mode", mode, get_args(OptimizerMode))
    for name, value in (("park_activations", park_activations), ("tile_mlps", tile_mlps)):
        check_choice(name, value, (None, True, False))
    allowed, (word, folder) = Budget.of(budget).on_cpu(), _home(home)
    known = None if rates is None else rates_of(rates, folder)  # errors before the model is made
    looks = partial(
        _look,
        word == IN_FILES,
        dtype=dtype,
        optimizer=optimizer,
        options=options,
        masters=masters,
        batch=batch,
        work=work,
        checkpointing=checkpointing,
    )
    first = batch if tokens == "longest" else tokens
    seen = looks(source, tokens=first)
    setting = Setting(
        tokens=first,
        rest=_rest(seen, source),
        state=seen.state,
        mode=mode,
        in_place=folder is None,
        in_files=word == IN_FILES,
        place="host",
        rings=Rings(SLABS, GRADIENT_SLABS, SLABS, SLABS, PAGE, _FAULT_BYTES),
        rates=known or rates_of(None, folder),
        imports=optimizer is not None and "torch._dynamo" not in sys.modules,
    )
    mlps = [] if tile_mlps is False or not (tile_mlps or seen.trains) else mlp_layers(seen.model)
    if tile_mlps and not mlps:
        raise ArgumentError(f"tile_mlps=True: {why_no_mlp(seen.model)}")
    choices = _choices(seen, setting, park_activations, tile_mlps if mlps else False)
    limits = allowed if setting.in_files else _with_disk(allowed, folder)
    with workspaces_of(rates, setting.rates) as workspaces:
        maps = folder is not None and not setting.in_files and overwrites_in_place(folder)
        search_of = partial(
            _search, setting, limits=limits, workspaces=workspaces, maps=maps, mlps=mlps
        )
        if tokens == "longest":
            sizes = partial(_excess, partial(looks, seen.model), search_of, choices)
            tokens = longest_step(sizes, batch)
            seen = looks(seen.model, tokens=tokens)
        found = search_of(seen, tokens).best(choices)
    trim_heap()  # the copies' objects lay between others
    given = {"optimizer": optimizer and optimizer.__name__, "mode": mode, "home": word}
    return _as_plan(seen, found, tokens, batch, budget=allowed, **given)


def _look(in_files: bool, source: object, **given: Any) -> Survey:
    seen = survey(source, **given)
    if in_files:
        seen = replace(seen, weights=[_only_read(weight) for weight in seen.weights])
    return seen


def _as_plan(
    seen: Survey, found: Found, tokens: int, batch: int, *, budget: Budget, **given: Any
) -> Plan:
    return Plan(
        model=type(seen.model).__name__,
        layers=tuple(_layer(seen, decision, found.layout) for decision in seen.decisions),
        tokens=tokens,
        batch=batch,
        device="cpu",
        checkpointing=found.activations.recomputed,
        parks_activations=found.activations.parked,
        tiles_mlps=found.activations.mlps_in_tiles,
        budget=budget,
        terms=found.terms,
        read_bytes=found.moved.read_bytes,
        written_bytes=found.moved.written_bytes,
        floors=found.floors,
        products=found.counted.products,
        **given,
    )


def _rest(seen: Survey, source: object) -> Rest:
    """What no tile is made of, and what converting the files of a folder takes."""
    rest = rest_of(seen)
    if not isinstance(source, str | Path):
        return rest
    return replace(rest, converting_bytes=converting_bytes(seen.model, source))


def _choices(
    seen: Survey, setting: Setting, parks: bool | None, tiles_mlps: bool | None
) -> list[Activations]:
    """What may be done with activations: they are parked on disks alone, in training."""
    can = seen.trains and not setting.in_place
    if parks and not can:
        raise ArgumentError(
            "park_activations=True: "
            + ("home= is memory, where they are already" if seen.trains else "nothing is trained")
            + "; leave it out"
        )
    return seen.activations(parks if can else False, tiles_mlps)


def _excess(
    looks: Callable[..., Survey],
    search_of: Callable[[Survey, int], Search],
    choices: Sequence[Activations],
    tokens: int,
) -> int | None:
    """Bytes over the budget of a step of so many tokens; None where the model reads fewer."""
    try:
        seen = looks(tokens=tokens)
    except ArgumentError:  # of the tokens: with fewer there was none
        return None
    return search_of(seen, tokens).least_excess(choices)


def _search(
    setting: Setting,
    seen: Survey,
    tokens: int,
    *,
    limits: Budget,
    workspaces: Callable[[Products], int],
    maps: bool,
    mlps: Sequence[Mlp],
) -> Search:
    setting = replace(setting, tokens=tokens)
    count = StepCount(
        seen,
        drops_gradients=setting.mode == "in_backward",
        goes_home=not setting.in_place,
        workspaces=workspaces,
    )
    return Search(setting, seen.weights, count, limits, fits_page_cache, maps, mlps)


def _only_read(weight: Weight) -> Weight:
    """A weight as it can be parked in files that are only read: not where it trains."""
    if weight.obstacle or not weight.trainable:
        return weight
    return replace(weight, obstacle="trains, and a checkpoint's files are only read")


def _layer(seen: Survey, decision: TilingDecision, layout: ParkedLayout) -> PlannedLayer:
    weight = seen.weight_of(decision)
    grid = layout.grid_of(weight)
    if grid is None:
        return seen.layer(decision, None, weight.obstacle or "fits in memory")
    tied = ", tied" if weight.is_tied else ""
    return seen.layer(decision, grid, f"does not fit in memory with all others{tied}")


def _home(home: Home | str) -> tuple[str, Path | None]:
    """The word for a home, and the folder of one on disk."""
    if home == IN_FILES:
        return IN_FILES, usable_folder(None)
    word = word_for(home)
    kind, folder = parse_home(word)
    return word, usable_folder(folder) if kind == "disk" else None


def _with_disk(budget: Budget, folder: Path | None) -> Budget:
    """The same with no more disk than is free there."""
    if folder is None:
        return budget
    free = max(1, shutil.disk_usage(folder).free)
    asked = budget.of_place("disk")
    return replace(budget, disk=free if asked is None else min(asked, free))
