"""A small model of experts in tiles, the dense model that it stands for, and a loop for both."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from small_training import mapped_home
from torch import Tensor, nn

from memtile import TiledLinear, TileOptimizer, dense_state_dict
from memtile.homes import Home
from memtile.layers import ParkedLinear

EXPERTS, OUT, WIDTH = 5, 3, 7
NONE = "none"  # tiles in no home
ROUTED_HOMES = (NONE, "device", "host", "mapped", "disk")
WAVE = (lambda step: 0.2 + (step % 7) / 5, lambda step: 1.0 if step < 20 else 0.3)
Step = tuple[Tensor, list[int]]  # the input (N, K), and the experts that it is routed to


class TiledExperts(TiledLinear):
    """(E · O, K) in a tile for each expert; a call uses some of them."""

    is_routed = True

    def forward(self, x: Tensor, experts: Iterable[int]) -> Tensor:
        """The sum (N, O) of what these experts give."""
        return sum((self.tile(expert, 0)(x) for expert in experts), x.new_zeros(len(x), OUT))


class DenseExperts(nn.Linear):
    """The same with one weight."""

    def forward(self, x: Tensor, experts: Iterable[int]) -> Tensor:
        """The sum (N, O) of what these experts give."""
        shares = self.weight.view(EXPERTS, OUT, WIDTH)
        return sum((x @ shares[expert].t() for expert in experts), x.new_zeros(len(x), OUT))


class Routed(nn.Module):
    """A linear that every step trains, and experts."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.inner, self.experts = nn.Linear(WIDTH, WIDTH), experts

    def forward(self, x: Tensor, experts: Iterable[int]) -> Tensor:
        """(N, O)."""
        return self.experts(self.inner(x), experts)


def dense_routed(dtype: torch.dtype = torch.float32) -> Routed:
    """The dense model with seeded weights."""
    torch.manual_seed(11)
    return Routed(DenseExperts(WIDTH, EXPERTS * OUT, bias=False)).to(dtype)


def routed(home: Home | str, dtype: torch.dtype = torch.float32) -> Routed:
    """The same with tiles: in no home, or parked in one of `ROUTED_HOMES`, or a home."""
    home = mapped_home() if home == "mapped" else home
    cls = nn.Linear if home == NONE else partial(ParkedLinear, home=home)
    shape = (WIDTH, EXPERTS * OUT)
    tiles = TiledExperts(*shape, bias=False, out_splits=EXPERTS, linear_cls=cls, dtype=dtype)
    model = Routed(tiles).to(dtype)
    model.load_state_dict(dense_routed(dtype).state_dict())
    return model


def tiles_of(model: Routed) -> list[nn.Parameter]:
    """The experts' tiles."""
    return list(model.experts.tile_parameters("weight").values())


def steps_of(count: int, seed: int = 5) -> Iterator[Step]:
    """Seeded inputs, each to one or two experts; the last expert is never hit, the first often."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        hit = torch.randperm(EXPERTS - 1, generator=generator)[: 1 + number % 2].tolist()
        yield torch.randn(4, WIDTH, generator=generator), hit


def backward(model: nn.Module, step: Step) -> None:
    """Forward and backward of one step."""
    x, experts = step
    dtype = next(model.parameters()).dtype
    model(x.to(dtype), experts).square().float().sum().backward()


def train_routed(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[Step],
    schedulers: Sequence[Any] = (),
) -> None:
    """As many steps as there are inputs."""
    for step in steps:
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()


def trained_routed(home: Home | str, *hits: Iterable[int]) -> tuple[Routed, TileOptimizer, Tensor]:
    """A model, its AdamW and an input, after a step of that input for each group of experts."""
    model, (x, _) = routed(home), next(steps_of(1))
    optimizer = TileOptimizer(model, torch.optim.AdamW, lr=0.1)
    train_routed(model, optimizer, [(x, list(hit)) for hit in hits])
    return model, optimizer, x


def routed_values(model: nn.Module) -> dict[str, Tensor]:
    """All parameters under their dense names, copied."""
    return {name: value.clone() for name, value in dense_state_dict(model)}


def scheduled_optimizer(
    model: Any,
    made: type[TileOptimizer] | None = TileOptimizer,
    optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW,
    **options: Any,
) -> tuple[Any, Any]:
    """An optimizer of two groups with options of their own, plain without `made`; a schedule."""
    options.setdefault("lr", 0.05)
    groups = [
        {"params": list(model.inner.parameters())},
        {"params": list(model.experts.parameters()), "lr": 2 * options["lr"]},
    ]
    optimizer: Any = (
        optimizer_class(groups, **options)
        if made is None
        else made(model, optimizer_class, params=groups, **options)
    )
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, list(WAVE))


@torch.no_grad()
def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of two tables' tensors, relative to the largest value of each."""
    assert ours.keys() == theirs.keys()
    largest = {name: float(value.abs().max()) or 1.0 for name, value in theirs.items()}
    differ = {name: float((ours[name] - theirs[name]).abs().max()) for name in theirs}
    return max((differ[name] / largest[name] for name in theirs), default=0.0)


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All entries of a dense state."""
    state = optimizer.state_dict()["state"]
    return {f"{n}.{key}": value for n, entry in state.items() for key, value in entry.items()}
