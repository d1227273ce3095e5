"""What each process of the tests of row tiles under engines does: all cases in one group."""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from processes import start_ranks
from row_models import Mlp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from zero3_group import join

import memtile
from memtile.engines.torch_fsdp2 import shard
from memtile.layers import gathered

ROWS = [(5, 9), (1, 7), (6, 0), (4, 4)]  # of each step, on each rank: other numbers of tiles
STEPS = len(ROWS)


class Stack(nn.Module):
    """Two MLPs, each over row tiles, and between them one without its intermediate activation."""

    def __init__(self, tiled: bool, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.first, self.last = Mlp(), Mlp()
        self.middle = nn.Sequential(nn.Linear(13, 29), nn.GELU(), nn.Linear(29, 13))
        if tiled:
            memtile.tile_mlps(self.middle)
            memtile.tile_rows(self.first, rows=2)
            memtile.tile_rows(self.last, rows=2)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of the squares of the results, by a number that does not depend on the rows."""
        y: Tensor = self.last(torch.tanh(self.middle(self.first(x))))
        return y.square().sum() / 50


def part(step: int, rank: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The rows of this rank in this step."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(1, ROWS[step % len(ROWS)][rank], 13, generator=generator).to(dtype)


def dense() -> nn.Module:
    """One process and no tiles: the mean over ranks of their losses, in float64."""
    model = Stack(tiled=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        (sum(model(part(step, rank)) for rank in range(2)) / 2).backward()
        optimizer.step()
    return model


def train(model: nn.Module, rank: int) -> None:
    """SGD, with an evaluation between the steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(part(step, rank)).backward()
        optimizer.step()
        with torch.no_grad():
            model(part(step + 1, rank))


def ddp(rank: int) -> dict[str, Tensor]:
    """Two such modules, one behind the other."""
    model = Stack(tiled=True)
    train(DistributedDataParallel(model), rank)
    return model.state_dict()


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The values of all shards."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def fsdp2(units: Callable[[Stack], list[nn.Module]], rank: int) -> dict[str, Tensor]:
    """These modules are gathered for their calls, and the rest with the model."""
    model = Stack(tiled=True)
    for unit in units(model):
        fully_shard(unit)
    fully_shard(model)
    train(model, rank)
    return whole(model)


def linears(model: nn.Module) -> list[nn.Module]:
    """All linears."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def fsdp2_of_tiles(rank: int) -> dict[str, Tensor]:
    """Tiles of the linears are gathered one after another."""
    model = shard(memtile.tile(Stack(tiled=True), out_splits=3), unit_bytes=0)
    train(model, rank)
    same = memtile.tile(Stack(tiled=True), out_splits=3)
    same.load_state_dict(whole(model))
    return dict(memtile.dense_state_dict(same))


def zero(stage: int, rank: int) -> dict[str, Tensor]:
    """Under DeepSpeed, in float32."""
    import deepspeed

    model = Stack(tiled=True, dtype=torch.float32)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine: Any = deepspeed.initialize(model=model, config=config, optimizer=optimizer)[0]
    for step in range(STEPS):
        engine.backward(engine(part(step, rank, torch.float32)))
        engine.step()
        with torch.no_grad():
            engine(part(step + 1, rank, torch.float32))
    found = {}
    for name, parameter in model.named_parameters():
        with gathered([parameter]):
            found[name] = parameter.detach().clone()
    engine.destroy()
    return found


CASES: dict[str, Callable[[int], dict[str, Tensor]]] = {
    "ddp": ddp,
    "fsdp2, linears inside": lambda rank: fsdp2(linears, rank),
    "fsdp2, the modules": lambda rank: fsdp2(lambda model: [model.first, model.last], rank),
    "fsdp2, tiles inside": fsdp2_of_tiles,
    "zero 2": lambda rank: zero(2, rank),
    "zero 3": lambda rank: zero(3, rank),
}


def run(rank: int, folder: str) -> None:
    """Every case."""
    join(rank, 2, folder)
    found = {name: copy.deepcopy(case(rank)) for name, case in CASES.items()}
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


def spawn() -> list[dict[str, dict[str, Tensor]]]:
    """What the two ranks ended with."""
    with tempfile.TemporaryDirectory() as folder:
        start_ranks(run, 2, folder)
        return [torch.load(Path(folder) / f"rank{rank}.pt") for rank in range(2)]
