"""What two processes under ZeRO-3 save as a distributed checkpoint, and load."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from dcp_worker import Net
from processes import start_ranks
from torch import Tensor, nn
from zero3_group import join

import memtile
from memtile.engines.deepspeed_zero3 import attach, config
from memtile.engines.dense_views import dense_view
from memtile.engines.distributed_checkpoints import load, save

WORLD = 2
IDS = torch.randint(23, (4, 6), generator=torch.Generator().manual_seed(1))


def started(grid: tuple[int, int], lr: float) -> tuple[nn.Module, Any]:
    """A model in tiles and DeepSpeed's engine of it, which has no types."""
    import deepspeed

    model = memtile.tile(Net().float(), out_splits=grid[0], in_splits=grid[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    engine = deepspeed.initialize(model=model, config=config(model), optimizer=optimizer)[0]
    return model, attach(engine)


def step(engine: Any) -> None:
    """One step on this rank's part of the batch."""
    engine.backward(engine(IDS.chunk(WORLD)[dist.get_rank()]))
    engine.step()


def values(model: nn.Module) -> dict[str, Tensor]:
    """The dense parameters, on every rank."""
    return {name: tensor.clone() for name, tensor in memtile.dense_state_dict(model)}


def run(rank: int, folder: str) -> None:
    """Train and save; load what one process saved, and step without a rate."""
    place = Path(folder)
    join(rank, WORLD, folder)
    model, engine = started((3, 5), lr=1e-2)
    step(engine)
    save(place / "run", model, step=1)
    states = {"saved": values(model)}
    engine.destroy()
    model, engine = started((4, 1), lr=0.0)
    step(engine)
    undone = ""
    try:
        dcp.load({"model": dense_view(model)}, checkpoint_id=place / "alone" / "step-00000001")
    except BaseException as error:  # DCP's own is no Exception
        undone = str(error)
    load(place / "alone", model)
    states["loaded"] = values(model)
    step(engine)
    states["stepped"] = values(model)
    torch.save(states, place / f"rank{rank}.pt")
    (place / f"rank{rank}.json").write_text(json.dumps(undone))
    dist.destroy_process_group()


def spawn_zero3(folder: Path) -> tuple[list[dict[str, dict[str, Tensor]]], list[str]]:
    """What both ranks found, and what they were told."""
    start_ranks(run, WORLD, str(folder))
    ranks = range(WORLD)
    return (
        [torch.load(folder / f"rank{rank}.pt") for rank in ranks],
        [json.loads((folder / f"rank{rank}.json").read_text()) for rank in ranks],
    )
