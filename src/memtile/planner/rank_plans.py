"""`plan_ranks`: from a model, or what describes one, and a number of ranks to a `RankPlan`."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from memtile.convert import Choice, Cut, Work, choose
from memtile.errors import ArgumentError
from memtile.planner import surveying
from memtile.planner.plans import check_choice, checkpointing_choices, planned_layer
from memtile.planner.sources import model_of
from memtile.planner.steps import StepCount
from memtile.planner.works import work_for
from memtile.planning import PlannedLayer, RankPlan, Sharding, Speeds, Uses
from memtile.planning.budget import checked_size
from memtile.planning.model_records import Counted, ParkedLayout, Weight
from memtile.planning.plan_parts import check_tokens
from memtile.planning.rank_memory import Offload, RankSetting, shards
from memtile.planning.rank_search import RankFound, RankSearch
from memtile.planning.rank_traffic import rank_floors, traffic
from memtile.planning.shards import Engine


def plan_ranks(
    source: Any,  # a model, or whatever config an integration knows
    *,
    world_size: int,
    engine: Engine,
    tokens: int,
    batch: int = 1,
    device_memory: int | str | None = None,
    max_tile_bytes: int | None = None,
    offload: Offload = "none",
    prefetch: int = 1,
    unit_bytes: int = 1 << 20,
    optimizer: type[torch.optim.Optimizer] | None = torch.optim.AdamW,
    options: Mapping[str, Any] | None = None,  # what the optimizer's class takes
    checkpointing: bool | None = None,
    dtype: torch.dtype | None = None,
    work: Work | None = None,
    speeds: Speeds | None = None,
) -> RankPlan:
    """What one rank of a cluster holds and moves, in the fewest tiles that its device has room for.

    Nothing is loaded, no process is started and the model is unchanged. What can be a tile is one,
    also where it is not cut: then it is gathered and let go of by itself.

    Args:
        source: as for `memtile.plan`.
        world_size: ranks.
        engine: "fsdp2" (`memtile.engines.torch_fsdp2.shard`) or "zero3" (DeepSpeed).
        tokens: of one rank's step: its batch's size times its length.
        batch: sequences of one rank's step.
        device_memory: of one rank's device, such as "80GiB"; None: as much as is needed.
        max_tile_bytes: the size of tiles, instead of one that is looked for; not with
            `device_memory`.
        offload: where shards, gradients and moments live: "none": on the device; "cpu"; "nvme":
            with ZeRO-3.
        prefetch: units that are gathered ahead of the one that works.
        unit_bytes: as for `shard`.
        optimizer: the class; None: inference.
        options: what that class takes besides parameters, where it changes what it keeps.
        checkpointing: whether the model recomputes activations; None: where it does not fit else.
        dtype: of a model that a config or a folder describes, if not its own.
        work: as for `memtile.plan`.
        speeds: what a rank does in a second; None: bytes alone are told.

    Raises:
        BudgetError: nothing fits; the message says how many ranks would do.
        ArgumentError: an argument has no meaning.
        CannotTileError: the model is tiled already, or its step asks for values.
        OptimizerError: the optimizer is not element-wise: it cannot step shards.
    """
    _check(world_size, engine, offload, prefetch, unit_bytes)
    check_tokens(tokens, batch)
    check_choice("checkpointing", checkpointing, (None, True, False))
    memory = checked_size(device_memory, "device_memory")
    if memory is not None and max_tile_bytes is not None:
        raise ArgumentError(
            "device_memory chooses the size of tiles by itself; give it alone, or max_tile_bytes"
        )
    trains = optimizer is not None
    model = model_of(source, dtype)
    choices = choose(model, Cut(parks=True), None)
    weights = surveying.weights_of(model, choices, trains)
    masters = engine == "zero3"
    state = surveying.state_of(model, optimizer, options or {}, masters) if optimizer else None
    setting = RankSetting(offload, prefetch, state)
    layers, loose = surveying.sharded_of(model, weights, trains)
    watched = {weight.names[0]: weight.names for weight in weights}
    watched |= {module.name: (module.name,) for module in loose}
    count = _Count(model, choices, watched, work or work_for(model, tokens, batch, trains), trains)
    search = RankSearch(setting, weights, layers, loose, count, memory)
    agains = checkpointing_choices(model, checkpointing, trains)
    sharding = Sharding(engine, world_size, unit_bytes)
    if max_tile_bytes is not None:
        found = search.cut(
            sharding, Cut(max_tile_bytes=max_tile_bytes).max_tile_bytes or 1, agains[0]
        )
    else:
        found = search.best(sharding, agains)
    smallest = None if memory is None else search.smallest_world(sharding, agains)
    moved = traffic(setting, sharding, found.units)
    speeds = speeds or Speeds()
    return RankPlan(
        model=type(model).__name__,
        engine=engine,
        world=world_size,
        offload=offload,
        prefetch=prefetch,
        unit_bytes=unit_bytes,
        layers=tuple(_layer(choice, found, weights) for choice in choices),
        tokens=tokens,
        batch=batch,
        optimizer=None if optimizer is None else optimizer.__name__,
        checkpointing=found.checkpointing,
        device_memory=memory,
        kept=found.kept,
        moments=found.moments,
        padding_bytes=shards(setting, sharding, found.units).padding,
        traffic=moved,
        flops=found.counted.flops,
        speeds=speeds,
        floors=rank_floors(found.counted.flops, moved, speeds),
        smallest_world=smallest,
    )


class _Count:
    """Counts one rank's step of a layout, and how often it runs each layer."""

    def __init__(
        self,
        model: nn.Module,
        choices: Sequence[Choice],
        watched: Mapping[str, Sequence[str]],
        work: Work,
        trains: bool,
    ) -> None:
        self._watched, self._uses = watched, dict[str, _Uses]()
        self._step = StepCount(
            model,
            choices,
            work,
            trains=trains,
            drops_gradients=True,
            goes_home=True,
            watch=self._watch,
        )

    def __call__(
        self, layout: ParkedLayout, checkpointing: bool
    ) -> tuple[Counted, Mapping[str, Uses]]:
        """The step, and the uses of all modules that are counted under a name."""
        begun = itertools.count(1)
        self._uses = {name: _Uses(begun) for name in self._watched}
        counted = self._step(layout, checkpointing)
        return counted, {name: found.counted() for name, found in self._uses.items()}

    def _watch(self, twin: nn.Module) -> None:
        for name, modules in self._watched.items():
            for module in map(twin.get_submodule, modules):
                module.register_forward_pre_hook(self._uses[name].begin)
                module.register_forward_hook(self._uses[name].end)


class _Uses:
    """Hooks that count how often layers which share a weight begin and end."""

    def __init__(self, order: Iterator[int]) -> None:
        self._begun, self._ended, self._back = [0, 0], [0, 0], 0
        self._order, self._last = order, 0

    def begin(self, *_: object) -> None:
        self._begun[_in_backward()] += 1
        if not _in_backward():
            self._last = next(self._order)

    def end(self, module: nn.Module, inputs: object, result: object) -> None:
        self._ended[_in_backward()] += 1
        if isinstance(result, Tensor) and result.requires_grad and not _in_backward():
            self._back += 1

    def counted(self) -> Uses:
        (forward, again), ended = self._begun, self._ended[True]
        return Uses(forward, again, self._back, again - ended, self._last)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1  # as torch's own checkpointing asks


def _layer(choice: Choice, found: RankFound, weights: Sequence[Weight]) -> PlannedLayer:
    weight = next(each for each in weights if choice.name in each.names)
    grid = found.grids.get(weight.names[0])
    if grid is None:
        reason = weight.obstacle
    elif grid.out_splits * grid.in_splits == 1:
        reason = "a unit of its own"
    else:
        reason = "cut, so that a device has room for what is gathered"
    return planned_layer(choice, weight, grid, reason + (", tied" if weight.is_tied else ""))


def _check(
    world_size: object, engine: object, offload: object, prefetch: object, unit_bytes: object
) -> None:
    """Refuse what no cluster is.

    Raises:
        ArgumentError: it is none.
    """
    check_choice("engine", engine, get_args(Engine))
    check_choice("offload", offload, get_args(Offload))
    if offload == "nvme" and engine == "fsdp2":
        raise ArgumentError("offload='nvme': FSDP2 offloads to 'cpu' alone; take engine='zero3'")
    for name, value, least in (
        ("world_size", world_size, 1),
        ("prefetch", prefetch, 0),
        ("unit_bytes", unit_bytes, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ArgumentError(f"{name}={value!r} must be a whole number of at least {least}")
