"""What each process of the averaging tests does: parked tiles, a home for each rank."""

import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ddp_worker import Net
from processes import start_ranks
from small_experts import ExpertsLoss
from torch import Tensor, nn

import memtile
from memtile.convert import set_checkpointing
from memtile.engines.torch_ddp import GradientAverager
from memtile.errors import EngineError

STEPS = 6


@dataclass(frozen=True)
class Case:
    """One way to train."""

    mode: Any = "classic"
    parts: int = 1
    syncs_once: bool = False
    clip: float | None = None
    home: str = "disk"
    model: Callable[[], nn.Module] = Net


def checkpointed() -> ExpertsLoss:
    """One whose forward runs again in backward."""
    model = ExpertsLoss("qwen3", num_experts=16)
    set_checkpointing(model.inner, True)
    return model


CASES = {
    "classic": Case(),
    "in backward": Case(mode="in_backward"),
    "accumulated": Case(parts=2),
    "accumulated, averaged once": Case(parts=2, syncs_once=True),
    "clipped": Case(clip=0.05),
    "host": Case(home="host", mode="in_backward"),
}
MANY = partial(ExpertsLoss, "qwen3", num_experts=16)
EXPERTS = {
    "in backward": Case(mode="in_backward", model=MANY),
    "averaged once, clipped": Case(parts=2, syncs_once=True, clip=0.05, home="host", model=MANY),
    "recomputed": Case(mode="in_backward", home="host", model=checkpointed),
    "grouped rows": Case(home="host", model=partial(ExpertsLoss, "jetmoe")),
}


def batches() -> Tensor:
    """Ids (steps, batch, length)."""
    return torch.randint(23, (STEPS, 4, 5), generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, case: Case, rank: int = 0, world: int = 1) -> None:
    """Steps of AdamW on this rank's share of each part of each batch."""
    averaging = GradientAverager(model) if world > 1 else None
    optimizer = memtile.TileOptimizer(model, torch.optim.AdamW, mode=case.mode, lr=1e-2)
    for batch in batches():
        optimizer.zero_grad()
        for number, part in enumerate(batch.chunk(case.parts)):
            waits = case.syncs_once and averaging is not None and number + 1 < case.parts
            with averaging.no_sync() if waits else nullcontext():
                (model(part.chunk(world)[rank]) / case.parts).backward()
        if case.clip is not None:
            optimizer.clip_grad_norm_(case.clip)
        optimizer.step()


def run_case(case: Case, rank: int, folder: Path) -> tuple[dict[str, Tensor], int]:
    """The dense parameters after training, and the reductions of a backward for each parameter."""
    with memtile.DiskHome(folder) if case.home == "disk" else memtile.HostHome() as home:
        splits = {"out_splits": 3, "in_splits": 2} if case.model is Net else {}
        model = memtile.tile(case.model(), **splits, home=home)
        with torch.no_grad():
            next(model.parameters()).add_(rank)  # rank 0's values are to reach all
        calls, plain = [0], dist.all_reduce

        def counted(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            return plain(*arguments, **options)

        dist.all_reduce = counted
        try:
            train(model, case, rank, 2)
        finally:
            dist.all_reduce = plain
        each = calls[0] / STEPS / len(list(model.parameters()))
        return {k: v.clone() for k, v in memtile.dense_state_dict(model)}, each


def refused(rank: int) -> str:
    """What a rank is told whose grid is another."""
    try:
        GradientAverager(memtile.tile(Net(), out_splits=2 + rank))
    except EngineError as error:
        return str(error)
    return ""


def told_of_another_way(rank: int) -> str:
    """What a rank is told whose gradient is that of another parameter."""
    with memtile.HostHome() as home:
        layers = [nn.Linear(12, 12, bias=False) for _ in range(2)]
        model = memtile.tile(nn.ModuleList(layers), home=home)
        GradientAverager(model, dist.new_group())  # which has exchanged nothing yet
        try:
            model[rank](torch.ones(2, 12)).sum().backward()
        except EngineError as error:
            return str(error)
    return ""


def run(rank: int, folder: str) -> None:
    """Every case, one after the other."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), 2)
    limit = timedelta(seconds=300)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
    home = Path(folder) / f"home{rank}"
    home.mkdir()
    found = {name: run_case(case, rank, home) for name, case in CASES.items()}
    experts = {name: run_case(case, rank, home) for name, case in EXPERTS.items()}
    told = refused(rank), told_of_another_way(rank)
    torch.save((found, *told, experts), Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


def spawn() -> list[Any]:
    """What the two ranks found: of each case the parameters and reductions; what they were told;
    the same of each case with experts.
    """
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        start_ranks(run, 2, folder)
        return [torch.load(Path(folder) / f"rank{rank}.pt") for rank in range(2)]
