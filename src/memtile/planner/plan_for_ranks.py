"""`plan_ranks`: from a model, or what describes one, and a number of ranks to a `RankPlan`."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from memtile.convert import (
    Cut,
    TilingDecision,
    Work,
    converting_bytes,
    mlp_layers,
    why_no_mlp,
)
from memtile.costmodel import ClusterSpec, LooseModule, PlannedLayer, RankPlan, Sharding, Uses
from memtile.costmodel.budget import checked_size
from memtile.costmodel.byte_sizes import size_in_bytes
from memtile.costmodel.model_records import Activations, Counted, Mlp, ParkedLayout, in_turn
from memtile.costmodel.plan_parts import Place
from memtile.costmodel.rank_memory import Offload, RankSetting
from memtile.costmodel.rank_search import RankFound, RankSearch
from memtile.costmodel.rank_traffic import rank_floors, traffic
from memtile.costmodel.shards import Engine
from memtile.costmodel.tile_grids import cut_alike
from memtile.errors import ArgumentError, check_whole_number
from memtile.home_names import RANK_HOMES, parse_home
from memtile.layers import DeferringHead, TiledLinear, defer_in_engine
from memtile.planner.model_survey import Survey, check_choice, sharded_of, survey
from memtile.planner.step_count import StepCount
from memtile.transfer import COPIES_UNDER_WAY, SLABS
from memtile.transfer.iterations import in_backward


def plan_ranks(
    source: Any,  # a model, or whatever config an integration knows
    *,
    world_size: int,
    engine: Engine,
    tokens: int,
    batch: int = 1,
    device_memory: int | str | None = None,
    max_tile_bytes: int | str | None = None,
    offload: Offload = "none",
    prefetch: int = 1,
    unit_bytes: int = 1 << 20,
    optimizer: type[torch.optim.Optimizer] | None = torch.optim.AdamW,
    options: Mapping[str, Any] | None = None,  # what the optimizer's class takes
    checkpointing: bool | None = None,
    park_activations: bool | None = None,
    home: str = "host",
    tile_mlps: bool | None = None,
    dtype: torch.dtype | None = None,
    work: Work | None = None,
    speeds: ClusterSpec | None = None,
) -> RankPlan:
    """What one rank of a cluster holds and moves, in the fewest tiles that its device has room for.

    Nothing is loaded, no process is started and the model is unchanged. Each layer that can be
    tiled is, at least as one tile, which is gathered and freed by itself.

    Args:
        source: as for `memtile.plan`.
        world_size: ranks.
        engine: "fsdp2" (`memtile.engines.torch_fsdp2.shard`) or "zero3" (DeepSpeed).
        tokens: of one rank's step: its batch's size times its length.
        batch: sequences of one rank's step.
        device_memory: of one rank's device, such as "80GiB"; None: as much as is needed.
        max_tile_bytes: the size of tiles, instead of one that is searched for; not with
            `device_memory`.
        offload: where shards, gradients and moments live: "none": on the device; "cpu"; "nvme":
            with ZeRO-3.
        prefetch: units that are gathered ahead of the one in use.
        unit_bytes: as for `shard`.
        optimizer: the class; None: inference.
        options: what that class takes besides parameters, where it changes what it keeps.
        checkpointing: whether the model recomputes activations; None: only if nothing fits without.
        park_activations: whether what it keeps for backward lives in a home, as
            `memtile.park_activations` does; None: in training, where nothing fits otherwise.
        home: which: "host", "disk" or "disk:FOLDER".
        tile_mlps: whether MLPs are computed without their intermediate activation, as by
            `memtile.tile_mlps`; None: in training, where nothing fits otherwise.
        dtype: of a model that a config or a folder describes, if not its own.
        work: as for `memtile.plan`.
        speeds: what a rank does in a second; None: the plan has no times.

    Raises:
        BudgetError: nothing fits; the message says how many ranks would do.
        ArgumentError: an argument has no meaning.
        CannotTileError: the model is tiled already, or its step asks for values.
        OptimizerError: the optimizer is not element-wise: it cannot step shards.
    """
    _check(world_size, engine, offload, prefetch, unit_bytes)
    memory = _memory(device_memory, max_tile_bytes)
    masters = engine == "zero3"
    seen = survey(source, dtype, optimizer, options, masters, tokens, batch, work, checkpointing)
    is_folder = isinstance(source, str | Path)
    converting = converting_bytes(seen.model, source) if is_folder else 0
    setting = RankSetting(offload, prefetch, seen.state, *_home(home), converting)
    layers, loose = sharded_of(seen)
    mlps = _mlps(seen, tile_mlps)
    count = _Count(seen, loose, mlps)
    search = RankSearch(setting, seen.weights, layers, loose, count, memory, mlps)
    sharding = Sharding(engine, world_size, unit_bytes)
    choices = _choices(seen, park_activations, tile_mlps if mlps else False)
    if max_tile_bytes is None:
        found = search.best(sharding, choices)
    else:
        largest = size_in_bytes(max_tile_bytes, "max_tile_bytes")
        tile_bytes = Cut(max_tile_bytes=largest).max_tile_bytes or 1
        found = search.cut(sharding, tile_bytes, choices[0])
    moved, speeds = traffic(found.rank, found.counted), speeds or ClusterSpec()
    return RankPlan(
        model=type(seen.model).__name__,
        engine=engine,
        world=world_size,
        offload=offload,
        prefetch=prefetch,
        unit_bytes=unit_bytes,
        layers=tuple(_layer(seen, decision, found) for decision in seen.decisions),
        tokens=tokens,
        batch=batch,
        optimizer=None if optimizer is None else optimizer.__name__,
        checkpointing=found.activations.recomputed,
        parks_activations=found.activations.parked,
        home=home,
        tiles_mlps=found.activations.mlps_in_tiles,
        device_memory=memory,
        kept=found.kept,
        moments=found.moments,
        padding_bytes=found.rank.shards.padding,
        traffic=moved,
        flops=found.counted.flops,
        speeds=speeds,
        floors=rank_floors(found.counted.flops, moved, speeds),
        smallest_world=search.smallest_world(sharding, choices) if memory else None,
    )


def _memory(device_memory: int | str | None, max_tile_bytes: int | str | None) -> int | None:
    memory = checked_size(device_memory, "device_memory")
    if memory is not None and max_tile_bytes is not None:
        raise ArgumentError(
            "device_memory chooses the size of tiles by itself; give it alone, or max_tile_bytes"
        )
    return memory


def _home(home: str) -> tuple[Place, int, int]:
    """The place that a home is in, copies that are under way to it at most, and slabs before it."""
    kind, _ = parse_home(home, known=RANK_HOMES)
    return ("host", COPIES_UNDER_WAY, 0) if kind == "host" else ("disk", 0, SLABS)


def _mlps(seen: Survey, tile_mlps: bool | None) -> tuple[Mlp, ...]:
    """The MLPs that tiles may compute."""
    check_choice("tile_mlps", tile_mlps, (None, True, False))
    if tile_mlps is False or not (tile_mlps or seen.trains):
        return ()
    found = mlp_layers(seen.model)
    if tile_mlps and not found:
        raise ArgumentError(f"tile_mlps=True: {why_no_mlp(seen.model)}")
    return cut_alike(seen.weights, found)


def _choices(seen: Survey, parks: bool | None, tiles_mlps: bool | None) -> list[Activations]:
    """What may be done with activations, in the order in which it is tried."""
    check_choice("park_activations", parks, (None, True, False))
    if parks and not seen.trains:
        raise ArgumentError("park_activations=True: nothing is trained; leave it out")
    choices = seen.activations(parks if seen.trains else False, tiles_mlps)
    return list(itertools.chain.from_iterable(in_turn(choices)))


class _Count:
    """Counts one rank's step of a layout, and how often it runs each layer."""

    def __init__(
        self,
        seen: Survey,
        loose: Sequence[LooseModule],
        mlps: Sequence[Mlp] = (),
    ) -> None:
        self._trains = seen.trains
        self._watched = {weight.names[0]: weight.names for weight in seen.weights}
        self._watched |= {module.name: (module.name,) for module in loose}
        self._mlps = [(*mlp.inner, mlp.down) for mlp in mlps]
        self._in_tiles: set[str] = set()  # the layers of MLPs in tiles
        self._called: set[str] = set()  # those of them that are called themselves all the same
        self._uses: dict[str, _Uses] = {}
        self._step = StepCount(seen, drops_gradients=True, goes_home=True, watch=self._watch)

    def __call__(
        self, layout: ParkedLayout, activations: Activations
    ) -> tuple[Counted, Mapping[str, Uses]]:
        """The step, and the uses of all modules that are counted under a name."""
        begun = itertools.count(1)
        self._uses = {name: _Uses(begun) for name in self._watched}
        mlps = self._mlps if activations.mlps_in_tiles else []
        self._in_tiles, self._called = set(itertools.chain.from_iterable(mlps)), set()
        counted = self._step(layout, activations)
        found = {name: uses.counted() for name, uses in self._uses.items()}
        for layers in mlps:
            if self._called.isdisjoint(layers):
                found |= {name: replace(found[name], together=True) for name in layers}
        return counted, found

    def _watch(self, meta_copy: nn.Module) -> None:
        for head in defer_in_engine(meta_copy):
            head.is_on = self._trains  # in inference something reads the logits
        for name in self._in_tiles:
            layer = meta_copy.get_submodule(name)
            layer.register_forward_pre_hook(partial(self._note_call, name))
        for name, modules in self._watched.items():
            for module in map(meta_copy.get_submodule, modules):
                used, by_tiles = module, isinstance(module, DeferringHead) or name in self._in_tiles
                if by_tiles and isinstance(module, TiledLinear):
                    used = module.tile(0, 0)  # its tiles may be called where it is not
                used.register_forward_pre_hook(self._uses[name].begin)
                used.register_forward_hook(self._uses[name].end)

    def _note_call(self, name: str, *_: object) -> None:
        self._called.add(name)


class _Uses:
    """Hooks that count how often layers which share a weight begin and end."""

    def __init__(self, order: Iterator[int]) -> None:
        self._begun, self._ended, self._back = [0, 0], [0, 0], 0
        self._order, self._last = order, 0

    def begin(self, *_: object) -> None:
        self._begun[in_backward()] += 1
        if not in_backward():
            self._last = next(self._order)

    def end(self, module: nn.Module, inputs: object, result: object) -> None:
        self._ended[in_backward()] += 1
        if isinstance(result, Tensor) and result.requires_grad and not in_backward():
            self._back += 1

    def counted(self) -> Uses:
        (forward, recomputed), ended = self._begun, self._ended[True]
        return Uses(forward, recomputed, self._back, recomputed - ended, self._last)


def _layer(seen: Survey, decision: TilingDecision, found: RankFound) -> PlannedLayer:
    weight = seen.weight_of(decision)
    grid = found.grids.get(weight.names[0])
    if grid is None:
        reason = weight.obstacle
    elif grid.out_splits * grid.in_splits == 1:
        reason = "a unit of its own"
    else:
        reason = "cut, so that a device has room for what is gathered"
    return seen.layer(decision, grid, reason + (", tied" if weight.is_tied else ""))


def _check(
    world_size: object, engine: object, offload: object, prefetch: object, unit_bytes: object
) -> None:
    """Check what describes the cluster."""
    check_choice("engine", engine, get_args(Engine))
    check_choice("offload", offload, get_args(Offload))
    if offload == "nvme" and engine == "fsdp2":
        raise ArgumentError("offload='nvme': FSDP2 offloads to 'cpu' alone; take engine='zero3'")
    check_whole_number("world_size", world_size, 1)
    check_whole_number("prefetch", prefetch, 0)
    check_whole_number("unit_bytes", unit_bytes, 0)
