"""Models and ways to train them that every engine's tests share, and their dense run."""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import start_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import memtile
from memtile.layers import DeferredLogits, deferring_head
from memtile.transfer.iterations import set_parking

STEPS = 4
BATCH = 4


class Mlp(nn.Module):
    """A plain MLP, a gated one, or one whose gate and up are one linear ("fused")."""

    computed = 0  # how often its own forward has computed values

    def __init__(self, kind: str, width: int = 12, inner: int = 32) -> None:
        super().__init__()
        self.kind, biased = kind, kind != "gated"
        first = 2 * inner if kind == "fused" else inner
        self.gate = nn.Linear(width, inner, bias=biased) if kind == "gated" else None
        self.up, self.down = nn.Linear(width, first, biased), nn.Linear(inner, width, biased)
        self.act = nn.SiLU()  # a module, which an engine hooks

    def forward(self, x: Tensor) -> Tensor:
        """(…, width) of (…, width)."""
        Mlp.computed += not x.is_meta
        h = self.up(x)
        if self.kind == "fused":
            gate, h = h.chunk(2, -1)
            h = self.act(gate) * h
        else:
            h = self.act(h) if self.gate is None else self.act(self.gate(x)) * h
        result: Tensor = self.down(h)
        return result


class Net(nn.Module):
    """An embedding, tied with its head or not, and linears between them."""

    def __init__(self, case: "Case", dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.again = case.again
        self.embedding = nn.Embedding(23, 12)
        self.up, self.down = nn.Linear(12, 31, bias=case.bias), nn.Linear(31, 12, bias=case.bias)
        self.mlp = Mlp(case.mlp) if case.mlp else None
        if case.adapted:
            adapt(self.mlp)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 23, bias=False)
        if case.backwards:
            self._modules = dict(reversed(self._modules.items()))
        if case.tied:
            self.head.weight = self.embedding.weight
        self.up.requires_grad_(not case.frozen)
        for name in case.frozen_too:
            self.get_submodule(name).requires_grad_(False)
        self.skips, self.stumbles, self.calls = case.skips, case.stumbles, 0
        self.writes, self.twice = case.writes, case.twice
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """The mean square of the logits, or the loss of the next token."""
        x = self.embedding(ids)
        self.calls += 1
        if self.again:
            x = x + checkpoint(self._between, x, use_reentrant=False)
        elif not (self.skips and self.calls % 2):
            x = x + self._between(x)
        logits: Tensor = self.head(self.norm(x))
        if self.writes:
            return nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten())
        return logits.square().mean()

    def _between(self, x: Tensor) -> Tensor:
        if self.mlp is not None:
            x = x + self.mlp(x)
            x = x + self.mlp(x) if self.twice else x
        x = self.up(x)
        if self.stumbles and self.calls == 3:
            raise ZeroDivisionError
        result: Tensor = self.down(torch.tanh(x))
        return result


@dataclass(frozen=True)
class Case:
    """One way to train, compared with the dense model in one process."""

    grid: tuple[int, int] = (4, 1)
    bias: bool = True
    tied: bool = True
    frozen: bool = False
    offload: bool = False
    unit_bytes: int = 0
    clip: float | None = None
    parts: int = 1
    evaluates: bool = False
    again: bool = False
    hybrid: bool = False
    whole: tuple[str, ...] = ()
    backwards: bool = False
    frozen_too: tuple[str, ...] = ()
    skips: bool = False
    stumbles: bool = False
    writes: bool = False
    mlp: str = ""
    parks: bool = False
    adapted: bool = False
    twice: bool = False


CASES = {
    "one tile": Case(grid=(1, 1)),
    "columns": Case(grid=(1, 4)),
    "rows": Case(grid=(4, 1)),
    "ragged": Case(grid=(3, 5)),
    "without bias, not tied": Case(grid=(3, 5), bias=False, tied=False),
    "not tied": Case(tied=False),
    "frozen tiles": Case(grid=(3, 5), frozen=True),
    "clipped": Case(clip=0.05),
    "offloaded": Case(offload=True),
    "accumulated": Case(parts=2),
    "after evaluation": Case(evaluates=True),
    "recomputed": Case(again=True),
    "recomputed, frozen tiles": Case(again=True, frozen=True),
    "recomputed after evaluation": Case(again=True, evaluates=True),
    "a loss without logits": Case(writes=True),
    "a loss without logits, not tied": Case(writes=True, tied=False, evaluates=True),
    "a loss without logits, head whole": Case(writes=True, tied=False, whole=("head",)),
    "a loss without logits, columns": Case(writes=True, grid=(3, 5), tied=False),
    "MLP": Case(mlp="gated"),
    "MLP of one tile": Case(mlp="gated", grid=(1, 1), tied=False, parts=2),
    "MLP, plain, recomputed": Case(mlp="plain", again=True),
    "MLP, gate and up in one": Case(mlp="fused", tied=False, evaluates=True),
    "MLP, plain, frozen": Case(mlp="plain", frozen_too=("embedding", "mlp.up"), tied=False),
    "MLP, plain, twice, recomputed": Case(mlp="plain", again=True, twice=True),
    "MLP, adapters": Case(mlp="gated", adapted=True, parts=2),
    "MLP, plain, adapters, recomputed": Case(mlp="plain", adapted=True, again=True, grid=(3, 1)),
    "activations parked": Case(parks=True, grid=(3, 5)),
    "MLP, recomputed, activations parked": Case(parks=True, mlp="gated", again=True, writes=True),
}


def adapt(model: Any) -> None:
    """Put low-rank adapters around the linears of an MLP, which they freeze; they do something."""
    import peft

    options = peft.LoraConfig(r=3, target_modules=["gate", "up", "down"])
    peft.inject_adapter_in_model(options, model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)


def batches() -> Tensor:
    """Ids of every step, of shape (steps, batch, 6)."""
    return torch.randint(23, (STEPS, BATCH, 6), generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, case: Case, rank: int = 0, world: int = 1) -> list[float]:
    """Steps of AdamW on this rank's part of each batch, in pieces; gives each one's loss."""
    losses = []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in batches():
        optimizer.zero_grad()
        for part in batch.chunk(case.parts):
            share = share_of(part, rank, world)
            try:
                loss = model(share) / case.parts
            except ZeroDivisionError:  # as who tries again after too little memory
                loss = model(share) / case.parts
            loss.backward()
            losses.append(loss.item() * case.parts)
        if case.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), case.clip)
        optimizer.step()
        if case.evaluates:
            with torch.no_grad():
                model(batch)
    return losses


def share_of(part: Tensor, rank: int, world: int) -> Tensor:
    """This rank's samples; all of them where there are fewer than ranks."""
    return part.chunk(world)[rank] if len(part) >= world else part


def tiled(case: Case, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The net in tiles, all of it or some."""
    chosen = [name for name in ("embedding", "up", "down", "head") if name not in case.whole]
    model = memtile.tile(
        Net(case, dtype),
        modules=chosen if case.whole else None,
        out_splits=case.grid[0],
        in_splits=case.grid[1],
        tile_mlps=bool(case.mlp),
    )
    if case.writes:
        deferring_head.LEAST_LOGITS = 0
        memtile.defer_logits(model.head)
    if case.parks:
        set_parking(model, memtile.park_activations("disk", smallest_bytes=0, model=model))
    return model


@contextmanager
def computed_logits() -> Iterator[list[DeferredLogits]]:
    """Inside, the deferred logits whose values are computed."""
    compute, found = DeferredLogits.computed, list[DeferredLogits]()

    def computed(self: DeferredLogits) -> Tensor:
        if self._logits is None:
            found.append(self)
        return compute(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeferredLogits, "computed", computed)
        yield found


def distance(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """The norm of all differences between two sets of tensors."""
    return float(sum((found[key] - truth[key]).norm().item() ** 2 for key in truth) ** 0.5)


class ColumnParallel(nn.Linear):
    """Megatron's `skip_bias_add` on one of two ranks: half of the outputs, the bias beside them."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features // 2, bias)

    def forward(self, input: Tensor) -> Any:  # two tensors, where nn.Linear gives one
        """(output, bias)."""
        return nn.functional.linear(input, self.weight), self.bias


class RowParallel(ColumnParallel):
    """The same for half of the inputs."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features // 2, 2 * out_features, bias)


class ParallelNet(nn.Module):
    """What one of two tensor-parallel ranks has of two linears, in tiles."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up = memtile.TiledLinearReturnBias(12, 32, out_splits=4, linear_cls=ColumnParallel)
        self.down = memtile.TiledLinearReturnBias(32, 13, out_splits=3, linear_cls=RowParallel)

    def forward(self, x: Tensor) -> Tensor:
        """The mean square of the outputs."""
        y, bias = self.up(x)
        y, last = self.down(torch.tanh(y + bias))
        loss: Tensor = (y + last).square().mean()
        return loss


def parallel_losses(step: Callable[[Tensor], float]) -> list[float]:
    """Losses of a few steps with the same data on each rank."""
    return [step(x) for x in torch.randn(4, 3, 12, generator=torch.Generator().manual_seed(2))]


def plain_step(model: nn.Module) -> Callable[[Tensor], float]:
    """A step of AdamW of a model that torch alone can step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(x: Tensor) -> float:
        loss = model(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


@dataclass(frozen=True)
class Outcome:
    """What all ranks of a group found: one report each, and the parameters of each case."""

    ranks: list[dict[str, Any]]
    states: dict[str, dict[str, Tensor]]


def outcome_of(
    run: Callable[[int, int, str, list[str]], None], world: int, names: list[str]
) -> Outcome:
    """Call `run` with (rank, world, folder, names) in processes, which leave files there."""
    with tempfile.TemporaryDirectory() as folder:
        start_ranks(run, world, world, folder, names)
        ranks = [json.loads((Path(folder) / f"rank{r}.json").read_text()) for r in range(world)]
        states = {name: torch.load(Path(folder) / f"{name}.pt") for name in names}
    return Outcome(ranks, states)
