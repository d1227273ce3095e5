"""A run that is saved and resumed: a small model with everything that could come out otherwise."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from small_training import ROWS, WIDTH, in_home, loss_of
from torch import Tensor, nn

import memtile
from memtile import TileOptimizer
from memtile.convert import Resumed
from memtile.optim import dense_parameters

INNER = 13
NONE = "none"  # the model as it is, untiled
HOMES = (NONE, "device", "host", "disk")


class Uncertain(nn.Module):
    """Tied, frozen in part, with dropout, and with batch statistics that are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(ROWS, WIDTH)
        self.up = nn.Linear(WIDTH, INNER)
        self.frozen = nn.Linear(INNER, INNER).requires_grad_(False)
        self.norm = nn.BatchNorm1d(INNER)
        self.down = nn.Linear(INNER, WIDTH)
        self.head = nn.Linear(WIDTH, ROWS, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        inner = nn.functional.dropout(torch.tanh(self.up(x)), 0.3)
        inner = self.norm(self.frozen(inner).float().flatten(0, 1)).view(*inner.shape)
        return self.head(x + self.down(inner.to(x.dtype)))


@dataclass
class Run:
    """What one process has of a run."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    done: int = 0

    def train(self, steps: int) -> list[float]:
        """The losses of so many steps; batches are drawn from Python's own generator."""
        losses = []
        for _ in range(steps):
            ids = torch.tensor([[random.randrange(ROWS) for _ in range(6)] for _ in range(3)])
            self.optimizer.zero_grad()
            loss = loss_of(self.model, ids)
            loss.backward()
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
            self.done += 1
            losses.append(loss.item())
        return losses

    def save(self, folder: Path, **options: Any) -> Path:
        """Save it after the steps that are done."""
        return memtile.save_training(
            folder, self.model, self.optimizer, self.scheduler, step=self.done, **options
        )

    def resume(self, folder: Path) -> Resumed:
        """Go on from what is in the folder."""
        resumed = memtile.resume_training(folder, self.model, self.optimizer, self.scheduler)
        self.done = resumed.step
        return resumed


def a_run(
    home: str = NONE,
    optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW,
    mode: str = "classic",
    dtype: torch.dtype = torch.float32,
    grid: dict[str, int] | None = None,
    plain: bool = False,
    seed: int = 7,
    **options: Any,
) -> Run:
    """A run that begins; every random state and weight follows from the seed."""
    torch.manual_seed(seed)
    random.seed(seed)
    model = Uncertain().to(dtype)
    model.norm.float()
    if home != NONE:
        model = in_home(model, home, grid or {"out_splits": 2, "in_splits": 2})
    options.setdefault("lr", 0.01)
    if plain:
        optimizer = optimizer_class(model.parameters(), **options)
    else:
        optimizer = TileOptimizer(model, optimizer_class, mode=mode, **options)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
    return Run(model, optimizer, scheduler)


def all_of(run: Run) -> dict[str, Any]:
    """Every value of a run: weights and buffers, the optimizer's state and groups, generators."""
    found = {f"weight {name}": t.clone() for name, t in memtile.dense_state_dict(run.model)}
    for dense in dense_parameters(run.model):
        for number, part in enumerate(dense.parts):
            for key, entry in run.optimizer.state.get(part.parameter, {}).items():
                kept = entry.clone() if isinstance(entry, Tensor) else entry
                found[f"{key} {number} of {dense.name}"] = kept
    for number, group in enumerate(run.optimizer.param_groups):
        found |= {f"group {number} {k}": v for k, v in group.items() if k != "params"}
    if run.scheduler is not None:
        found |= {f"scheduler {key}": v for key, v in run.scheduler.state_dict().items()}
    return found | {"python": random.getstate(), "torch": torch.get_rng_state()}


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """What is not the same, to the last bit, dtypes included."""
    return list(_differing(ours, theirs))


def _differing(ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[str]:
    for key in ours.keys() | theirs.keys():
        one, other = ours.get(key, "nothing"), theirs.get(key, "nothing")
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            if one.dtype != other.dtype or not torch.equal(one, other):
                yield key
        elif type(one) is not type(other) or one != other:
            yield key
