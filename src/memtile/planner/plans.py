"""`plan`: from a model, or what describes one, and a budget to a `Plan`."""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from memtile.convert import Choice, Cut, Work, choose, has_checkpointing
from memtile.errors import ArgumentError
from memtile.geometry import Grid
from memtile.homes import (
    PAGE,
    DeviceHome,
    DiskHome,
    Home,
    HostHome,
    fits_page_cache,
    trim_heap,
    usable_folder,
)
from memtile.planner import surveying
from memtile.planner.rates import rates_of, workspaces_of
from memtile.planner.sources import model_of
from memtile.planner.steps import StepCount
from memtile.planner.works import work_for
from memtile.planning import Budget, Plan, PlannedLayer, Rates
from memtile.planning.memory_model import Rings, Setting
from memtile.planning.model_records import ParkedLayout, Weight
from memtile.planning.plan import OptimizerMode
from memtile.planning.plan_parts import PARKED, RESIDENT, check_tokens
from memtile.planning.search import Found, Search
from memtile.planning.time_model import floors, moved
from memtile.transfer import GRADIENT_SLABS, SLABS

_FAULT_BYTES = 64 << 10  # Linux maps so much around a page that is in the page cache


def plan(
    source: Any,  # a model, or whatever config an integration knows
    *,
    budget: "int | str | Budget",
    tokens: int,
    batch: int = 1,
    optimizer: type[torch.optim.Optimizer] | None = torch.optim.AdamW,
    options: Mapping[str, Any] | None = None,  # what the optimizer's class takes
    masters: bool = True,
    home: Home | str = "disk",
    mode: OptimizerMode = "in_backward",
    checkpointing: bool | None = None,
    dtype: torch.dtype | None = None,
    work: Work | None = None,
    rates: Rates | str | os.PathLike[str] | None = None,
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
            what is generated.
        batch: sequences of one step.
        optimizer: the class that `TileOptimizer` will get; None: inference.
        options: what that class takes besides parameters, where it changes what it keeps.
        masters: as in `TileOptimizer`.
        home: where parked tiles will live: "disk", "disk:FOLDER", "host", "device" or a home.
        mode: of `TileOptimizer`.
        checkpointing: whether the model recomputes activations in backward; None: what is faster.
        dtype: of a model that a config or a folder describes, if not its own.
        work: what a step's forward is: called with a copy of the model that holds nothing, gives
            the loss; for inference, whatever it makes. Needed where the model is neither of
            transformers nor begins with a linear or an embedding.
        rates: of another machine, or a JSON file of them; None: this machine's.

    Raises:
        BudgetError: nothing fits; the message says how much would be needed, and what to change.
        ArgumentError: an argument has no meaning.
        CannotTileError: the model is tiled already, or its step asks for values.
        OptimizerError: the optimizer cannot step tile by tile.
        HomeError: tiles cannot live in the folder.
    """
    check_tokens(tokens, batch)
    if work is not None and not callable(work):
        raise ArgumentError(
            f"work={work!r} must be a function of the model; leave it out, or give one"
        )
    if options is not None and not isinstance(options, Mapping):
        raise ArgumentError(f"options={options!r} must be what the optimizer takes, by name")
    check_choice("mode", mode, get_args(OptimizerMode))
    check_choice("checkpointing", checkpointing, (None, True, False))
    allowed, (word, folder) = Budget.of(budget).on_cpu(), _home(home)
    trains = optimizer is not None
    imports = trains and "torch._dynamo" not in sys.modules
    model = model_of(source, dtype)
    choices = choose(model, Cut(parks=True), None)
    weights = surveying.weights_of(model, choices, trains)
    setting = Setting(
        tokens=tokens,
        rest=surveying.rest_of(model, weights, trains),
        state=surveying.state_of(model, optimizer, options or {}, masters) if optimizer else None,
        mode=mode,
        in_place=folder is None,
        place="host",
        rings=Rings(SLABS, GRADIENT_SLABS, SLABS, PAGE, _FAULT_BYTES),
        rates=rates_of(rates, folder),
        imports=imports,
    )
    again = checkpointing_choices(model, checkpointing, trains)
    with workspaces_of(rates, setting.rates) as workspaces:
        count = StepCount(
            model,
            choices,
            work or work_for(model, tokens, batch, trains),
            trains=trains,
            drops_gradients=mode == "in_backward",
            goes_home=folder is not None,
            workspaces=workspaces,
        )
        search = Search(setting, weights, count, _with_disk(allowed, folder), fits_page_cache)
        found = search.best(again)
    trim_heap()  # of the twins' objects, which lay between others
    named = {"tokens": tokens, "batch": batch, "mode": mode, "home": word, "budget": allowed}
    return _plan(model, choices, found, setting, optimizer, named)


def _plan(
    model: nn.Module,
    choices: Sequence[Choice],
    found: Found,
    setting: Setting,
    optimizer: type[torch.optim.Optimizer] | None,
    named: Mapping[str, Any],  # fields of the plan as they were given
) -> Plan:
    moves = moved(setting, found.layout, found.checkpointing)
    cached = fits_page_cache(found.bytes_of("disk"))
    return Plan(
        model=type(model).__name__,
        layers=tuple(_layer(model, choice, found.layout) for choice in choices),
        optimizer=None if optimizer is None else optimizer.__name__,
        device="cpu",
        checkpointing=found.checkpointing,
        terms=found.terms,
        read_bytes=moves.read_bytes,
        written_bytes=moves.written_bytes,
        floors=floors(setting, found.layout, found.counted, moves, cached=cached),
        products=found.counted.products,
        **named,
    )


def _layer(model: nn.Module, choice: Choice, layout: ParkedLayout) -> PlannedLayer:
    weight = next(each for each in layout.weights if choice.name in each.names)
    grid = layout.grid_of(weight)
    if grid is not None:
        reason = "does not fit in memory with all others" + (", tied" if weight.is_tied else "")
    else:
        reason = weight.obstacle or "fits in memory"
    return planned_layer(choice, weight, grid, reason)


def planned_layer(choice: Choice, weight: Weight, grid: Grid | None, reason: str) -> PlannedLayer:
    """What a plan says of a layer that is cut so, or, without a grid, is not."""
    return PlannedLayer(
        name=choice.name,
        shape=choice.shape,
        dtype=weight.dtype,
        nbytes=weight.nbytes,
        grid=grid,
        place=RESIDENT if grid is None else PARKED,
        reason=reason,
        trainable=weight.trainable,
        ties=choice.ties,
    )


def checkpointing_choices(model: nn.Module, given: bool | None, trains: bool) -> tuple[bool, ...]:
    """The choices that there are.

    Raises:
        ArgumentError: it is asked for where there is none.
    """
    can = trains and has_checkpointing(model)
    if given and not can:
        raise ArgumentError(
            f"checkpointing=True: {type(model).__name__} "
            + ("has no gradient_checkpointing_enable" if trains else "is not trained by this plan")
            + "; leave it out"
        )
    return (False, True) if given is None and can else (bool(given),)


def _home(home: object) -> tuple[str, Path | None]:
    """The word for a home, and the folder of one on disk.

    Raises:
        ArgumentError: it is no home.
        HomeError: tiles cannot live in its folder.
    """
    if isinstance(home, DiskHome):
        return f"disk:{home.folder}", home.folder
    if isinstance(home, HostHome) or home == "host":
        return "host", None
    if isinstance(home, DeviceHome) or home == "device":
        return "device", None
    kind, colon, folder = home.partition(":") if isinstance(home, str) else ("", "", "")
    if kind == "disk" and bool(colon) == bool(folder):
        return str(home), usable_folder(folder or None)
    raise ArgumentError(
        f"home={home!r} must be 'disk', 'disk:FOLDER', 'host', 'device', or a DiskHome"
    )


def _with_disk(budget: Budget, folder: Path | None) -> Budget:
    """The same with no more disk than is free there."""
    if folder is None:
        return budget
    free = max(1, shutil.disk_usage(folder).free)
    asked = budget.of_place("disk")
    return replace(budget, disk=free if asked is None else min(asked, free))


def check_choice(name: str, value: object, known: Sequence[object]) -> None:
    """Refuse what is none of the known values.

    Raises:
        ArgumentError: it is not.
    """
    if value not in known or (isinstance(value, int) and not isinstance(value, bool)):
        raise ArgumentError(f"{name}={value!r} must be one of {', '.join(map(repr, known))}")
