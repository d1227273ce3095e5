"""What each process of the distributed-checkpoint tests does: every case in one group of them."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import start_ranks, started
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import AdamW, Optimizer
from transformers.pytorch_utils import Conv1D

import memtile
from memtile.engines.dense_views import dense_view
from memtile.engines.distributed_checkpoints import load, save
from memtile.engines.torch_fsdp2 import shard
from memtile.errors import MemtileError
from memtile.testing import peak_allocated_bytes

HALF, STEPS, BATCH = 5, 10, 4
WIDTH = 1024  # of the layer whose allocations are watched


@dataclass(frozen=True)
class Case:
    """The grid that a checkpoint is saved from, and the one that it is loaded into."""

    saved: tuple[int, int]
    loaded: tuple[int, int]
    frozen: bool = False
    hybrid: bool = False  # with four ranks: two hold the same shards


CASES = {
    "one tile into rows": Case((1, 1), (4, 1)),
    "rows into a ragged grid": Case((4, 1), (3, 5), hybrid=True),
    "a ragged grid into columns": Case((3, 5), (1, 4), frozen=True),
}


class Net(nn.Module):
    """An embedding tied with its head, a linear, a transposed one, a buffer, and a norm."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(23, 12)
        self.up, self.down = nn.Linear(12, 31), Conv1D(12, 31)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 23, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.rand(12))
        self.up.weight.requires_grad_(not frozen)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        """The mean square of the logits."""
        x = self.embedding(ids)
        x = x + self.down(torch.tanh(self.up(x))) * self.scale
        loss: Tensor = self.head(self.norm(x)).square().mean()
        return loss


def optimizer_of(model: nn.Module) -> Optimizer:
    """AdamW with two groups, over what is trained."""
    ways: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            ways[parameter.dim() > 1].append(parameter)
    return AdamW([{"params": ways[True]}, {"params": ways[False], "weight_decay": 0.0}], lr=1e-2)


def train(
    model: nn.Module, optimizer: Optimizer, first: int, rank: int = 0, world: int = 1
) -> None:
    """Steps from a number on, on this rank's part of each batch."""
    batches = torch.randint(23, (STEPS, BATCH, 6), generator=torch.Generator().manual_seed(1))
    last = HALF if first < HALF else STEPS
    for batch in batches[first:last]:
        optimizer.zero_grad()
        model(batch.chunk(world)[rank]).backward()
        optimizer.step()


def tiled(case: Case, grid: tuple[int, int], sharded: bool = True) -> tuple[nn.Module, Optimizer]:
    """A model in tiles with its optimizer."""
    model = memtile.tile(Net(case.frozen), out_splits=grid[0], in_splits=grid[1])
    if sharded:
        mesh = None
        if case.hybrid and dist.get_world_size() == 4:
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        shard(model, mesh, unit_bytes=0)
    return model, optimizer_of(model)


def ruined(model: nn.Module) -> None:
    """Overwrite what is to be loaded."""
    with torch.no_grad():
        for parameter in [*model.parameters(), *model.buffers()]:
            parameter.fill_(7.0)


def whole(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The values of tiles and of moments, under the names of tiles."""
    options = StateDictOptions(full_state_dict=True)
    values, state = get_state_dict(model, optimizer, options=options)
    return {"model": values, "state": state["state"], "groups": state["param_groups"]}


def run_case(name: str, rank: int, world: int, folder: Path) -> None:
    """Save half-way; go on in another grid, and from what one process saved with none."""
    case = CASES[name]
    model, optimizer = tiled(case, case.saved)
    train(model, optimizer, 0, rank, world)
    memtile.save_training(folder / name, model, optimizer, step=HALF, extra={"name": name})
    dcp.save(dense_view(model), checkpoint_id=folder / f"{name} by torch")
    states = {"half": whole(model, optimizer)}
    for source, key in ((folder / name, "resumed"), (folder / f"{name} alone", "from one")):
        model, optimizer = tiled(case, case.loaded)
        ruined(model)
        memtile.resume_training(source, model, optimizer)
        train(model, optimizer, HALF, rank, world)
        states[key] = whole(model, optimizer)
    model, _ = tiled(case, case.loaded)
    ruined(model)
    dcp.load(dense_view(model), checkpoint_id=folder / f"{name} dense by torch")
    states["from torch"] = whole(model, optimizer_of(model))
    if rank == 0:
        torch.save(states, folder / f"{name}.pt")


def peaks(folder: Path) -> list[int]:
    """The most bytes that are allocated at once in saving and in loading one large layer."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    other = memtile.tile(nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)), in_splits=16)
    shard(memtile.tile(model, out_splits=16), unit_bytes=0)
    shard(other, unit_bytes=0)
    return [
        peak_allocated_bytes(lambda: save(folder / "large", model, step=1)),
        peak_allocated_bytes(lambda: load(folder / "large", other)),
        peak_allocated_bytes(lambda: load(folder / "large alone", other)),
    ]


def broadcasts(rank: int) -> bool:
    """Whether a sharded model with tied tiles takes what rank 0 alone has."""
    (first, _), (second, _) = (tiled(Case((3, 5), (3, 5)), (3, 5)) for _ in range(2))
    ruined(second)
    given = get_model_state_dict(first, options=StateDictOptions(full_state_dict=True))
    set_model_state_dict(
        second,
        dict(given) if rank == 0 else {},
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    )
    found = get_model_state_dict(second, options=StateDictOptions(full_state_dict=True))
    return all(torch.equal(found[name], value) for name, value in given.items())


def message_of(act: Callable[[], Any]) -> str:
    """What is raised, with its class."""
    try:
        act()
    except MemtileError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refusals(rank: int, folder: Path) -> dict[str, str]:
    """What this rank is told of what cannot be loaded or saved."""
    model = memtile.tile(Net(), out_splits=2)
    place = folder / "refused"
    save(place, model, step=1)
    other = memtile.tile(nn.Sequential(nn.Linear(5, 7)), out_splits=2)
    wider = Net()
    wider.up = nn.Linear(12, 32)
    lazy = memtile.tile(Net(), out_splits=2)
    lazy.extra = nn.Linear(2, 2)
    told = {
        "nothing there": message_of(lambda: load(folder / "nowhere", model)),
        "another model": message_of(lambda: load(place, other)),
        "another shape": message_of(lambda: load(place, wider)),
        "a missing name": message_of(lambda: load(place, lazy)),
        "no optimizer": message_of(lambda: load(place, model, optimizer_of(model))),
        "one rank alone": message_of(lambda: load(place, model if rank else other)),
        "a failing disk": message_of(lambda: save_with_full_disk(place, model, rank)),
    }
    dist.barrier()
    told["left"] = str(sorted(path.name for path in place.iterdir()))
    return told


def save_with_full_disk(place: Path, model: nn.Module, rank: int) -> None:
    """Save where the last rank cannot write."""
    plain = dcp.FileSystemWriter.write_data

    def write(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    if rank == dist.get_world_size() - 1:
        dcp.FileSystemWriter.write_data = write
    try:
        save(place, model, step=2)
    finally:
        dcp.FileSystemWriter.write_data = plain


def begin(rank: int, world: int, folder: str, seconds: int = 60) -> None:
    """Join the group of processes."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / f"store{world}"), world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=seconds)
    )


def run(rank: int, world: int, folder: str) -> None:
    """Every case, one after the other."""
    place = Path(folder)
    if rank == 0:
        run_alone(place)
    begin(rank, world, folder)
    for name in CASES:
        run_case(name, rank, world, place)
    found = {"peaks": peaks(place), "told": refusals(rank, place), "broadcast": broadcasts(rank)}
    (place / f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def run_alone(folder: Path) -> None:
    """What one process without a group saves, for the others to load."""
    for name, case in CASES.items():
        model = Net(case.frozen)
        optimizer = optimizer_of(model)
        train(model, optimizer, 0)
        save(folder / f"{name} alone", model, optimizer, step=HALF)
        dcp.save(model.state_dict(), checkpoint_id=folder / f"{name} dense by torch", no_dist=True)
    large = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    save(folder / "large alone", large, step=1)


def run_killed(rank: int, world: int, folder: str, doomed: int) -> None:
    """Save twice; in the middle of the second time one rank is killed."""
    begin(rank, world, folder, seconds=20)
    place = Path(folder)
    model, optimizer = tiled(Case((4, 1), (4, 1)), (4, 1))
    train(model, optimizer, 0, rank, world)
    memtile.save_training(place / "run", model, optimizer, step=HALF)
    train(model, optimizer, HALF, rank, world)
    if rank == doomed:
        dcp.FileSystemWriter.write_data = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    told = message_of(lambda: memtile.save_training(place / "run", model, optimizer, step=STEPS))
    (place / f"rank{rank}.txt").write_text(told)
    os._exit(0)  # a group without one of its ranks is never destroyed


@dataclass(frozen=True)
class Outcome:
    """What all ranks found, and the folder with what they saved."""

    ranks: list[dict[str, Any]]
    states: dict[str, dict[str, Any]]
    folder: Path


def spawn(world: int, folder: Path) -> Outcome:
    """Run every case with so many processes."""
    start_ranks(run, world, world, str(folder))
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]
    return Outcome(ranks, {name: torch.load(folder / f"{name}.pt") for name in CASES}, folder)


def spawn_killed(world: int, doomed: int, folder: Path) -> list[str]:
    """What the others are told when one of the ranks is killed while it saves."""
    processes = [started(run_killed, rank, world, str(folder), doomed) for rank in range(world)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes].count(-signal.SIGKILL) == 1
    return [(folder / f"rank{rank}.txt").read_text() for rank in range(world) if rank != doomed]
