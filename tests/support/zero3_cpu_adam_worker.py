"""What two processes train with DeepSpeed's own Adam for the CPU, in tiles and without."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine_cases import Case, Net, tiled
from processes import start_ranks
from torch import Tensor, nn
from zero3_group import join
from zero3_worker import train

import memtile
from memtile.engines.deepspeed_zero3 import attach, config

WORLD = 2
CASES = {
    "one tile": Case(grid=(1, 1)),
    "rows, tied": Case(),
    "columns": Case(grid=(1, 4)),
    "ragged, not tied": Case(grid=(3, 5), tied=False),
    "clipped": Case(clip=0.05),
}


def started(model: nn.Module, given: dict[str, Any]) -> Any:
    """DeepSpeed's engine, which has no types."""
    import deepspeed
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    optimizer = DeepSpeedCPUAdam(model.parameters(), lr=1e-2, weight_decay=0.01)
    return deepspeed.initialize(model=model, config=given, optimizer=optimizer)[0]


def in_tiles(case: Case, rank: int) -> dict[str, Tensor]:
    """The parameters of the tiled run."""
    model = tiled(case, torch.float32)
    given = config(model, clip=case.clip, offload_param="cpu", offload_optimizer="cpu")
    engine = attach(started(model, given))
    train(engine, case, rank, WORLD)
    state = {name: tensor.clone() for name, tensor in memtile.dense_state_dict(model)}
    engine.destroy()
    return state


def whole(case: Case, rank: int) -> dict[str, Tensor]:
    """The parameters of DeepSpeed's run without tiles."""
    from deepspeed import zero

    model = Net(case, torch.float32)
    offload = {"device": "cpu"}
    given = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": case.clip or 0.0,
        "zero_optimization": {
            "stage": 3,
            "offload_param": offload,
            "offload_optimizer": offload,
        },
    }
    engine = started(model, given)
    train(engine, case, rank, WORLD)
    with zero.GatheredParameters(list(model.parameters())):
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine.destroy()
    return state


def run(rank: int, world: int, folder: str) -> None:
    """Every case, in tiles and without."""
    join(rank, world, folder)
    found = {name: (in_tiles(case, rank), whole(case, rank)) for name, case in CASES.items()}
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


def spawn(folder: Path) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Of each case what rank 0 has: trained in tiles, and without."""
    start_ranks(run, WORLD, WORLD, str(folder))
    found: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = torch.load(folder / "rank0.pt")
    return found
