"""A small model that has everything tiles meet in training, in any home, and a loop for it."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memtile import DiskHome, TileOptimizer, dense_state_dict, tile
from memtile.homes import Home

MODES = ("classic", "in_backward")
HOMES = ("device", "host", "mapped", "disk")
GRID = {"out_splits": 2, "in_splits": 2}
ROWS, WIDTH, INNER = 23, 9, 13  # ragged in every grid but that of one tile


class Lion(torch.optim.Optimizer):
    """A user's optimizer: lazily made state, an entry replaced at each step."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99)):
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, (first, second) = self.state[p], group["betas"]
                average = state.setdefault("average", torch.zeros_like(p))
                p.add_(average.lerp(p.grad, 1 - first).sign(), alpha=-group["lr"])
                state["average"] = average.lerp(p.grad, 1 - second)


class Small(nn.Module):
    """An embedding tied to a head, biases, a LayerNorm, and a layer that is called twice.

    Args:
        reentrant: recompute the middle in backward, by this kind of checkpointing.
    """

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.embed = nn.Embedding(ROWS, WIDTH)
        self.up = nn.Linear(WIDTH, INNER)
        self.norm = nn.LayerNorm(INNER)
        self.twice = nn.Linear(INNER, INNER)
        self.down = nn.Linear(INNER, WIDTH)
        self.head = nn.Linear(WIDTH, ROWS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.reentrant is None:
            return self.head(x + self.middle(x))
        return self.head(x + checkpoint(self.middle, x, use_reentrant=self.reentrant))

    def middle(self, x: Tensor) -> Tensor:
        x = self.norm(self.up(x))
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        return self.down(x)


def small(dtype: torch.dtype = torch.float32, reentrant: bool | None = None) -> Small:
    """The dense model with seeded weights."""
    torch.manual_seed(7)
    return Small(reentrant).to(dtype)


def in_home(model: nn.Module, home: Home | str, grid: dict[str, int] = GRID) -> nn.Module:
    """A copy of the dense model, tiled and parked: in one of `HOMES`, or a home."""
    if home == "mapped":
        home = mapped_home()
    return tile(copy.deepcopy(model), **grid, home=DiskHome() if home == "disk" else home)


def mapped_home() -> DiskHome:
    """A disk home whose tiles are worked on in the page cache, also where small ones are not."""
    home = DiskHome()
    home._is_overwritten, home.path = True, "page cache"
    return home


def batches(count: int, seed: int = 3) -> list[Tensor]:
    """Seeded ids, of which the last are the targets of the others."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, ROWS, (3, 6), generator=generator) for _ in range(count)]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """The loss of one batch."""
    logits = model(ids[:, :-1])
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Sequence[Tensor],
    between: Callable[[], object] = lambda: None,
) -> list[float]:
    """The losses of as many steps as there are batches."""
    losses = []
    for ids in steps:
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        between()
    return losses


def values(model: nn.Module) -> dict[str, Tensor]:
    """All parameters under their dense names, copied."""
    return {name: value.clone() for name, value in dense_state_dict(model)}


def homes_of(model: nn.Module) -> Iterator[Home]:
    """The home of each parked tile."""
    return (module.home for module in model.modules() if hasattr(module, "home"))


def disk_of(model: nn.Module) -> DiskHome:
    """The one home of the model's tiles."""
    (home,) = {home for home in homes_of(model) if isinstance(home, DiskHome)}
    return home


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Whether all values are the same, bit for bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def optimizer_for(
    model: nn.Module,
    optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW,
    **options: Any,
) -> TileOptimizer:
    """A `TileOptimizer`, of AdamW with a visible lr where nothing else is said."""
    if optimizer_class is torch.optim.AdamW:
        options.setdefault("lr", 0.01)
    return TileOptimizer(model, optimizer_class, **options)
