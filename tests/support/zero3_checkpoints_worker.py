"""Training that goes on under another engine: what each process saves and loads."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from dcp_worker import message_of, ruined
from engine_cases import STEPS, Case, Net, batches, share_of, tiled
from processes import start_ranks
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from zero3_group import join

import memtile
from memtile.engines.deepspeed_zero3 import attach, config
from memtile.engines.distributed_checkpoints import load, save
from memtile.engines.torch_fsdp2 import shard

HALF = STEPS // 2


@dataclass(frozen=True)
class Way:
    """What is trained, and the grid in which it goes on."""

    case: Case
    grid: tuple[int, int]
    dtype: torch.dtype = torch.float32
    sub_group: int | None = None  # elements that DeepSpeed steps at once


WAYS = {
    "rows into a ragged grid": Way(Case(grid=(4, 1)), (3, 5)),
    "a ragged grid into columns": Way(Case(grid=(3, 5), tied=False, frozen=True), (1, 4)),
    "offloaded": Way(Case(grid=(3, 5), offload=True, whole=("down",)), (2, 2), sub_group=100),
}
SIXTEEN = Way(Case(grid=(3, 5), offload=True), (3, 5), torch.bfloat16)


def optimizer_of(model: nn.Module, *, frozen: bool = False) -> Optimizer:
    """AdamW with two groups; `frozen`: also over what is not trained."""
    ways: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or frozen:
            ways[name.endswith("bias")].append(parameter)
    return AdamW([{"params": ways[True], "weight_decay": 0.0}, {"params": ways[False]}], lr=1e-2)


def under_zero3(way: Way, grid: tuple[int, int]) -> tuple[nn.Module, Any]:
    """A model in tiles and DeepSpeed's engine of it, which has no types."""
    import deepspeed

    model = tiled(replace(way.case, grid=grid), way.dtype)
    offload = "cpu" if way.case.offload else None
    given = config(model, offload_param=offload, offload_optimizer=offload)
    if way.sub_group is not None:
        given["zero_optimization"]["sub_group_size"] = way.sub_group
    optimizer = optimizer_of(model)
    return model, attach(deepspeed.initialize(model=model, config=given, optimizer=optimizer)[0])


def train(
    model: nn.Module, optimizer: Optimizer, first: int, rank: int = 0, world: int = 1
) -> None:
    """Half of the steps, on this rank's part of each batch."""
    for batch in batches()[first : first + HALF]:
        optimizer.zero_grad()
        model(share_of(batch, rank, world)).backward()
        optimizer.step()


def train_engine(engine: Any, first: int, rank: int, world: int) -> None:
    """The same under ZeRO-3."""
    for batch in batches()[first : first + HALF]:
        engine.backward(engine(share_of(batch, rank, world)))
        engine.step()


def values(model: nn.Module) -> dict[str, Tensor]:
    """The dense parameters, on every rank."""
    return {name: tensor.clone() for name, tensor in memtile.dense_state_dict(model)}


def gone_on(way: Way, grid: tuple[int, int], place: Path, rank: int, world: int) -> dict[str, Any]:
    """Values after the other half of the steps under ZeRO-3; they are saved too."""
    model, engine = under_zero3(way, grid)
    resumed = memtile.resume_training(place, engine, engine.optimizer)
    train_engine(engine, resumed.step, rank, world)
    memtile.save_training(
        place.with_name(f"{place.name} gone on"), engine, engine.optimizer, step=STEPS
    )
    found = values(model)
    engine.destroy()
    return found


def sharded(way: Way, grid: tuple[int, int]) -> tuple[nn.Module, Optimizer]:
    """The model under FSDP2, whose optimizer has what is frozen too."""
    model = shard(tiled(replace(way.case, grid=grid), way.dtype), unit_bytes=0)
    return model, optimizer_of(model, frozen=True)


def run_way(name: str, rank: int, world: int, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Save half-way under either engine; go on under either."""
    way = WAYS[name]
    found = {}
    model, optimizer = sharded(way, way.case.grid)
    train(model, optimizer, 0, rank, world)
    save(folder / f"{name} fsdp2", model, optimizer, step=HALF)
    with deepspeeds_linear():
        model, engine = under_zero3(way, way.case.grid)
        train_engine(engine, 0, rank, world)
        save(folder / f"{name} zero3", model, engine.optimizer, step=HALF)
        engine.destroy()
        found["zero3"] = gone_on(way, way.grid, folder / f"{name} zero3", rank, world)
        found["fsdp2 zero3"] = gone_on(way, way.grid, folder / f"{name} fsdp2", rank, world)
        if name == "rows into a ragged grid":
            found["alone zero3"] = gone_on(way, way.grid, folder / f"{name} alone", rank, world)
    model, optimizer = sharded(way, way.grid)
    ruined(model)
    load(folder / f"{name} zero3", model, optimizer)
    train(model, optimizer, HALF, rank, world)
    save(folder / f"{name} zero3 fsdp2", model, step=STEPS)
    return found


def run_sixteen(rank: int, world: int, folder: Path) -> dict[str, Tensor]:
    """Under ZeRO-3 with masters, without a break and with one; gives what is there half-way."""
    with deepspeeds_linear():
        model, engine = under_zero3(SIXTEEN, SIXTEEN.case.grid)
        train_engine(engine, 0, rank, world)
        save(folder / "16 bits", model, engine.optimizer, step=HALF)
        half = values(model)
        train_engine(engine, HALF, rank, world)
        save(folder / "16 bits whole", model, engine.optimizer, step=STEPS)
        load(folder / "16 bits of tiles", model, engine.optimizer)
        save(folder / "16 bits taken", model, engine.optimizer, step=STEPS)
        engine.destroy()
        gone_on(SIXTEEN, SIXTEEN.grid, folder / "16 bits", rank, world)
    return half


@contextmanager
def deepspeeds_linear() -> Iterator[None]:
    """Inside, `deepspeed.initialize` may replace torch's linear; it is put back."""
    own = nn.functional.linear
    try:
        yield
    finally:
        nn.functional.linear = own


class Scaled(nn.Module):
    """A tiled linear and a factor of one element, of which other ranks have none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.factor = nn.Linear(5, 1), nn.Parameter(torch.tensor([1.5]))

    def forward(self, x: Tensor) -> Tensor:
        """The mean square of what comes out."""
        result: Tensor = (self.linear(x) * self.factor).square().mean()
        return result


def train_scaled(model: nn.Module, optimizer: Optimizer) -> None:
    """Three steps on the same inputs everywhere."""
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 5, dtype=model.get_parameter("factor").dtype)).backward()
        optimizer.step()


def run_scaled(folder: Path) -> dict[str, Tensor]:
    """Three steps under ZeRO-3, after none, and after three in one process."""
    import deepspeed

    found = {}
    with deepspeeds_linear():
        for source in ("scaled new", "scaled alone"):
            model = memtile.tile(Scaled(), in_splits=2)
            optimizer = AdamW(model.parameters(), lr=1e-2)
            engine, *_ = deepspeed.initialize(
                model=model, config=config(model), optimizer=optimizer
            )
            if source == "scaled new":
                save(folder / source, model, engine.optimizer, step=0)
            load(folder / source, model, engine.optimizer)
            for _ in range(3):
                engine.backward(engine(torch.ones(2, 5)))
                engine.step()
            save(folder / f"{source} zero3", model, engine.optimizer, step=3)
            found[source] = values(model)
            engine.destroy()
    return found


def refusals(folder: Path) -> dict[str, str]:
    """What this rank is told of an optimizer that cannot be saved or loaded."""
    way = WAYS["rows into a ragged grid"]
    with deepspeeds_linear():
        model, engine = under_zero3(way, (4, 1))
        outer, inner, place = engine.optimizer, engine.optimizer.optimizer, folder / "refused"
        told = {"torch's": message_of(lambda: save(place, model, inner, step=1))}
        told["uneven"] = message_of(lambda: load(folder / "uneven", model, outer))
        outer.swap_optimizer = True
        told["on NVMe"] = message_of(lambda: save(place, model, outer, step=1))
        outer.swap_optimizer = False
        outer.optimizer = type("DeepSpeedCPUAdam", (), {"__module__": "deepspeed.ops.adam"})()
        told["DeepSpeed's"] = message_of(lambda: save(place, model, outer, step=1))
        outer.optimizer = inner
        engine.destroy()
    return told


def run_alone(folder: Path) -> None:
    """What one process without a group saves, for the others to load."""
    for name, way in WAYS.items():
        model = Net(way.case, way.dtype)
        optimizer = optimizer_of(model, frozen=True)
        train(model, optimizer, 0)
        save(folder / f"{name} alone", model, optimizer, step=HALF)
    save_sixteen(folder)
    scaled = Scaled()
    stepped = AdamW(scaled.parameters(), lr=1e-2)
    train_scaled(scaled, stepped)
    save(folder / "scaled alone", scaled, stepped, step=3)
    uneven = Net(WAYS["rows into a ragged grid"].case, torch.float32)
    optimizer = optimizer_of(uneven)
    train(uneven, optimizer, 0)
    optimizer.state[uneven.up.weight]["step"] += 1
    save(folder / "uneven", uneven, optimizer, step=HALF)


def save_sixteen(folder: Path) -> None:
    """What an optimizer with masters of its own saves, and the masters by themselves."""
    model = Net(SIXTEEN.case, SIXTEEN.dtype)
    groups = optimizer_of(model).param_groups
    optimizer = memtile.TileOptimizer(model, AdamW, params=groups)
    train(model, optimizer, 0)
    save(folder / "16 bits of tiles", model, optimizer, step=HALF)
    masters = {name: optimizer.state[p]["master"] for name, p in model.named_parameters()}
    torch.save(masters, folder / "masters.pt")


def run(rank: int, world: int, folder: str) -> None:
    """Every way, one after the other."""
    place = Path(folder)
    if rank == 0:
        run_alone(place)
    join(rank, world, folder)
    found: dict[str, Any] = {name: run_way(name, rank, world, place) for name in WAYS}
    found |= {"16 bits": run_sixteen(rank, world, place), **run_scaled(place)}
    if rank == 0:
        torch.save(found, place / "found.pt")
    (place / f"rank{rank}.json").write_text(json.dumps(refusals(place)))
    dist.destroy_process_group()


@dataclass(frozen=True)
class Outcome:
    """What the first rank found, what all were told, and the folder with what they saved."""

    found: dict[str, Any]
    told: list[dict[str, str]]
    folder: Path


def spawn(world: int, folder: Path) -> Outcome:
    """Run every way with so many processes."""
    start_ranks(run, world, world, str(folder))
    told = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]
    return Outcome(torch.load(folder / "found.pt"), told, folder)
