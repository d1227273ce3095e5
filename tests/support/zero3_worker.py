"""What each process of the ZeRO-3 tests does: every case in one group of processes."""

import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine_cases import (
    CASES,
    Case,
    Mlp,
    Outcome,
    ParallelNet,
    batches,
    computed_logits,
    outcome_of,
    parallel_losses,
    share_of,
    tiled,
)
from small_experts import ExpertsLoss
from torch import Tensor, nn
from zero3_group import join
from zero3_values import all_values

import memtile
from memtile.engines.deepspeed_zero3 import attach, config
from memtile.engines.zero3_values import whole_numel
from memtile.errors import DeferredLogitsError

EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3": {"num_experts": 8, "num_hidden_layers": 1},
    "gpt-oss": {"num_hidden_layers": 1},
}


def run_case(case: Case, rank: int, world: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Train under ZeRO-3; gives losses and the most live tiles, and the dense parameters."""
    model = tiled(case, torch.float32)
    offload = "cpu" if case.offload else None
    given = config(
        model,
        accumulation=case.parts,
        clip=case.clip,
        offload_param=offload,
        offload_optimizer=offload,
    )
    engine = attach(started(model, given))
    with watched(model) as seen:
        losses = train(engine, case, rank, world)
    state = {name: tensor.clone() for name, tensor in memtile.dense_state_dict(model)}
    engine.destroy()
    return {"losses": losses, **seen}, state


def run_experts(name: str, rank: int, world: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The same of a mixture of experts, an expert a tile, of which ranks use different ones."""
    model = memtile.tile(ExpertsLoss(name, torch.float32, **EXPERTS[name]), out_splits=8)
    engine = attach(started(model, config(model)))
    with watched(model) as seen:
        losses = train(engine, Case(), rank, world)
    state = {key: tensor.clone() for key, tensor in memtile.dense_state_dict(model)}
    engine.destroy()
    return {"losses": losses, **seen}, state


def started(model: nn.Module, given: dict[str, Any], **options: float) -> Any:
    """The engine with torch's AdamW."""
    import deepspeed

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.pop("lr", 1e-2), **options)
    return deepspeed.initialize(model=model, config=given, optimizer=optimizer)[0]


def train(engine: Any, case: Case, rank: int, world: int) -> list[float]:
    """Steps on this rank's part of each batch; gives each piece's loss."""
    losses = []
    for batch in batches():
        for part in batch.chunk(case.parts):
            loss = engine(share_of(part, rank, world))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        if case.evaluates:
            with torch.no_grad():
                engine(batch)
    return losses


@contextmanager
def watched(model: nn.Module) -> Iterator[dict[str, int]]:
    """The most tiles, elements of tiles, and elements still in memory that had been gathered."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    coordinator: Any = PartitionedParameterCoordinator  # private: only the test looks inside
    fetch = coordinator.fetch_sub_module
    weights: Sequence[Any] = tile_weights(model)
    seen = {"tiles": 0, "elements": 0, "held": 0, "largest": max(map(whole_numel, weights))}
    storages = dict[Any, int]()  # of gathered tiles, by weak references

    def look(self: Any, *arguments: Any, **options: Any) -> None:
        fetch(self, *arguments, **options)
        live = [weight.ds_numel for weight in weights if weight.ds_status.name != "NOT_AVAILABLE"]
        seen["tiles"] = max(seen["tiles"], len(live))
        seen["elements"] = max(seen["elements"], sum(live))
        here = (weight for weight in weights if weight.ds_status.name == "AVAILABLE")
        storages.update((weakref.ref(each.untyped_storage()), each.ds_numel) for each in here)
        seen["held"] = max(seen["held"], sum(size for ref, size in storages.items() if ref()))

    coordinator.fetch_sub_module = look
    try:
        yield seen
    finally:
        coordinator.fetch_sub_module = fetch


def tile_weights(model: nn.Module) -> list[nn.Parameter]:
    """Each tile's weight once."""
    layers = [module for module in model.modules() if hasattr(module, "tiles")]
    tiles = (tile for layer in layers for _, tile in layer.tiles())  # type: ignore[operator]
    return list(dict.fromkeys(tile.weight for tile in tiles))


def under_defaults(rank: int, world: int) -> dict[str, int]:
    """What is live when DeepSpeed is told nothing about tiles."""
    model = tiled(Case(), torch.float32)
    engine = started(
        model, {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    )
    with watched(model) as seen:
        train(engine, Case(), rank, world)
    engine.destroy()
    return {**seen, "all": len(tile_weights(model))}


class Results(dict[str, Tensor]):
    """What a model gives, of a class of its own."""


class Head(nn.Module):
    """Logits of hidden states, and a loss where there are targets: by a function, or a module."""

    def __init__(self, by_module: bool = False, frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.norm, self.head = nn.LayerNorm(12).requires_grad_(not frozen), nn.Linear(12, 23)
        self.loss = nn.CrossEntropyLoss() if by_module else nn.functional.cross_entropy

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Results:
        """The logits (…, 23), and the loss if it is asked for."""
        logits = self.head(self.norm(x))
        found = Results(logits=logits)
        return found if targets is None else Results(logits=logits, loss=self.loss(logits, targets))


class Stack(nn.Module):
    """A model that leaves the loss to who calls it, and is inside of another one."""

    def __init__(self, **given: bool) -> None:
        super().__init__()
        self.model = Head(**given)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        return self.model(x)["logits"]


def deferring(model: nn.Module, deferred: bool = True, **given: Any) -> Any:
    """Its engine, with the head in tiles."""
    heads = [name for name, _ in model.named_modules() if name.endswith("head")]
    memtile.tile(model, out_splits=4, modules=heads)
    memtile.defer_logits(model.get_submodule(heads[0]), deferred)
    return attach(started(model, config(model, **given)))


def heads(rank: int, by_module: bool) -> dict[str, Any]:
    """What a deferring head gives in a model, before and after a step, against the dense one."""
    x, targets = torch.randn(40, 12) + rank, torch.arange(40) % 23
    dense, seen, model = Head()(x, targets), list[str](), Head(by_module)
    model.register_forward_hook(lambda _, __, result: seen.append(type(result["logits"]).__name__))
    engine = deferring(model)
    with computed_logits() as computed:
        given = engine(x, targets)
        engine.backward(given["loss"])
    values = given["logits"]
    found = {"seen": seen, "computed": len(computed), "loss": given["loss"] - dense["loss"]}
    found["logits"] = values.detach() - dense["logits"]
    memtile.defer_logits(model.head, False)
    found["off"] = type(engine(x, targets)["logits"]).__name__
    memtile.defer_logits(model.head)
    again = engine(x, targets)["logits"]
    engine.step()
    try:
        found["after"] = str(again.sum())
    except DeferredLogitsError as error:
        found["after"] = str(error)
    engine.destroy()
    return {key: e.abs().max().item() if isinstance(e, Tensor) else e for key, e in found.items()}


def outside_the_model(rank: int, world: int, **given: Any) -> dict[str, Any]:
    """Losses of steps, deferred and not, whose loss is computed of what the engine gives.

    Two backwards of torch's own make a step, of the loss and of a penalty of logits.
    """
    found: dict[str, Any] = {}
    for deferred in (True, False):
        engine, losses = deferring(Stack(**given), deferred, accumulation=2), list[float]()
        with computed_logits() as computed:
            for step in range(6):
                x = torch.randn(40, 12, generator=torch.Generator().manual_seed(step))
                logits = engine(x[rank::world])
                targets = torch.arange(40)[rank::world] % 23
                loss = nn.functional.cross_entropy(logits, targets)
                if step in (2, 3):
                    loss = loss + 0.1 * logits.square().mean()
                loss.backward()
                engine.step()
                losses.append(loss.item())
        found |= {f"losses, {deferred}": losses, f"computed, {deferred}": len(computed)}
        engine.destroy()
    return found


def parallel_step() -> Callable[[Tensor], float]:
    """A step of tensor-parallel linears that return their biases."""
    model = ParallelNet()
    engine = started(model, config(model))
    attach(engine)

    def step(x: Tensor) -> float:
        loss = engine(x)
        engine.backward(loss)
        engine.step()
        return loss.item()

    return step


def run(rank: int, world: int, folder: str, names: list[str]) -> None:
    """These cases, one after the other."""
    join(rank, world, folder)
    found, computed = {}, 0
    for name in names:
        is_experts = name in EXPERTS  # whose loss takes the values of logits
        with computed_logits() as logits:
            ran = (
                run_experts(name, rank, world) if is_experts else run_case(CASES[name], rank, world)
            )
        found[name], state = ran
        computed += 0 if is_experts else len(logits)
        if rank == 0:
            torch.save(state, Path(folder) / f"{name}.pt")
    report = {"cases": found, "computed": Mlp.computed, "logits": computed}
    report |= {"defaults": under_defaults(rank, world)}
    report["heads"] = [heads(rank, by_module) for by_module in (False, True)]
    report["outside"] = [outside_the_model(rank, world, frozen=each) for each in (False, True)]
    report["parallel"] = parallel_losses(parallel_step())
    report |= all_values(started, rank, world)
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


def spawn(world: int, names: list[str]) -> Outcome:
    """Run these cases with so many processes."""
    return outcome_of(run, world, names)
