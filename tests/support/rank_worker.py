"""What each process of the cluster plan's tests does: train with shards, and count their bytes."""

import json
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp._fully_shard._fsdp_collectives as collectives
import torch.distributed.fsdp._fully_shard._fsdp_param as sharded_param
import torch.distributed.fsdp._fully_shard._fsdp_param_group as param_group
from engine_cases import Mlp, adapt
from processes import start_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.utils.checkpoint import checkpoint

import memtile
from memtile.costmodel import Moment, RankPlan
from memtile.engines import exchange_order
from memtile.engines.torch_fsdp2 import shard
from memtile.planner import plan_ranks

Wrap = Callable[[Any], Any]  # around a function of torch's, which is private and untyped
TOKENS = 12
_WHOLE = (
    "untiled, gathered",
    "unit in use",
    "unit that waits",
    "units on their way",
    "buffer of the all-gather",
)
_LEAVING = (
    "gradients of the untiled",
    "gradient of a unit, whole",
    "buffer of the reduce-scatter",
)
WARMED = 2  # steps before the one that is measured: what is prefetched is learnt in the first


class Net(nn.Module):
    """An embedding, tied with its head or not, linears between them, and a norm."""

    def __init__(self, case: "Case") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.recomputes = case.recomputes
        self.embedding = nn.Embedding(61, 20)
        self.up, self.down = nn.Linear(20, 97, bias=case.bias), nn.Linear(97, 20, bias=case.bias)
        self.mlp = Mlp(case.mlp, 20, 125) if case.mlp else None
        if case.adapted:
            adapt(self.mlp)
        self.norm, self.head = nn.LayerNorm(20), nn.Linear(20, 61, bias=False)
        if case.tied:
            self.head.weight = self.embedding.weight
        self.up.requires_grad_(not case.frozen)
        self.to(getattr(torch, case.dtype))
        self.writes = case.writes
        if case.writes:
            memtile.defer_logits(self.head)

    def gradient_checkpointing_enable(self, *_: object) -> None:
        self.recomputes = True

    def gradient_checkpointing_disable(self) -> None:
        self.recomputes = False

    def forward(self, ids: Tensor) -> Tensor:
        """The mean square of the logits, or the loss of the next token."""
        x = self.embedding(ids)
        again = self.recomputes and torch.is_grad_enabled()
        x = x + (checkpoint(self._between, x, use_reentrant=False) if again else self._between(x))
        logits: Tensor = self.head(self.norm(x))
        if self.writes:
            return nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten())
        return logits.square().mean()

    def _between(self, x: Tensor) -> Tensor:
        x = self.down(torch.tanh(self.up(x)))
        return x if self.mlp is None else x + self.mlp(x)


@dataclass(frozen=True)
class Case:
    """One way to train."""

    max_tile_bytes: int | None = 2000
    bias: bool = True
    tied: bool = False
    frozen: bool = False
    recomputes: bool = False
    offload: bool = False
    unit_bytes: int = 0
    prefetch: int = 1
    dtype: str = "float32"
    mlp: str = ""
    adapted: bool = False
    writes: bool = False


CASES = {
    "rows": Case(),
    "whole layers": Case(max_tile_bytes=None),
    "without bias": Case(bias=False),
    "tied": Case(tied=True),
    "frozen": Case(frozen=True),
    "recomputed": Case(recomputes=True),
    "offloaded": Case(offload=True),
    "neighbours together": Case(unit_bytes=4000),
    "nothing ahead": Case(prefetch=0),
    "two ahead": Case(prefetch=2),
    "columns, 16 bits": Case(max_tile_bytes=100, dtype="bfloat16"),
    "a loss without logits": Case(writes=True),
    "a loss without logits, tied": Case(writes=True, tied=True),
    "MLP": Case(mlp="gated", bias=False),
    "MLP, recomputed": Case(mlp="plain", recomputes=True),
    "MLP, gate and up in one": Case(mlp="fused", prefetch=2),
    "MLP, adapters": Case(mlp="gated", bias=False, adapted=True, unit_bytes=2000),
    "MLP, plain, adapters, recomputed": Case(
        mlp="plain", adapted=True, recomputes=True, unit_bytes=2000
    ),
}


@dataclass
class Measured:
    """Bytes of one rank.

    Attributes:
        parameters: of shards.
        gradients: of their gradients.
        state: of the optimizer's tensors that are as large as a shard.
        gathered: the most that whole units and the buffers they arrive in held at once.
        reduced: the most that whole gradients and the buffers they leave in held at once.
        sent: over links in one step, by the operation.
    """

    parameters: int = 0
    gradients: int = 0
    state: int = 0
    gathered: int = 0
    reduced: int = 0
    sent: dict[str, int] = field(default_factory=dict)


class Probe:
    """Watches what FSDP2 gathers and reduces, and what the process group is given to send."""

    def __init__(self, model: nn.Module) -> None:
        self.measured = Measured()
        self._parameters = list(dict.fromkeys(p for m in model.modules() for p in _sharded_by(m)))
        self._gathering: list[weakref.ref[Any]] = []
        self._reducing: list[weakref.ref[Any]] = []
        self._leaving: list[Tensor] = []  # the list of FSDP2, which it clears

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, everything is counted."""
        with ExitStack() as stack:
            for owner, name, wrap in (
                (dist.ProcessGroup, "all_gather_single", self._sending("all-gather")),
                (dist.ProcessGroup, "reduce_scatter_single", self._sending("reduce-scatter")),
                (collectives.DefaultAllGather, "allocate", self._allocating(self._gathering)),
                (collectives.DefaultReduceScatter, "allocate", self._allocating(self._reducing)),
                (exchange_order._Gather, "allocate", self._allocating(self._gathering)),
                (exchange_order._Reduce, "allocate", self._allocating(self._reducing)),
                (sharded_param.FSDPParam, "init_unsharded_param", self._filling),
                (param_group.FSDPParamGroup, "post_backward", self._ending),
                (param_group, "foreach_reduce", self._leaving_with),
            ):
                stack.callback(setattr, owner, name, attribute(owner, name))
                setattr(owner, name, wrap(getattr(owner, name)))
            yield

    def _sending(self, kind: str) -> Wrap:
        def wrap(old: Any) -> Any:
            def send(group: Any, output: Tensor, given: Tensor, *rest: Any) -> Any:
                piece = min(output.nbytes, given.nbytes)  # what each other rank is sent
                sent = self.measured.sent
                sent[kind] = sent.get(kind, 0) + piece * (group.size() - 1)
                return old(group, output, given, *rest)

            return send

        return wrap

    def _allocating(self, buffers: list[weakref.ref[Any]]) -> Wrap:
        def wrap(old: Any) -> Any:
            def allocate(*args: Any, **kwargs: Any) -> Tensor:
                made: Tensor = old(*args, **kwargs)
                if buffers is self._gathering or self._leaving:  # not the shards' gradients
                    buffers.append(weakref.ref(made.untyped_storage()))
                self.see()
                return made

            return allocate

        return wrap

    def _filling(self, old: Any) -> Any:
        def fill(*args: Any) -> None:
            old(*args)
            self.see()

        return fill

    def _ending(self, old: Any) -> Any:
        def end(*args: Any) -> None:
            self.see()
            old(*args)

        return end

    def _leaving_with(self, old: Any) -> Any:
        def leave(parameters: Any, gradients: list[Tensor], *rest: Any, **named: Any) -> Any:
            self._leaving = gradients
            return old(parameters, gradients, *rest, **named)

        return leave

    def see(self) -> None:
        """Count what is alive now."""
        found = self.measured
        found.gathered = allocated(self._gathered, found.gathered)
        found.reduced = allocated(self._reduced, found.reduced)

    def _gathered(self) -> int:
        outputs = (output for each in self._parameters for output in each.all_gather_outputs)
        return sum(o.untyped_storage().nbytes() for o in outputs) + _alive(self._gathering)

    def _reduced(self) -> int:
        unsharded = (getattr(each, "_unsharded_param", None) for each in self._parameters)
        grads = [each.grad for each in unsharded if each is not None and each.grad is not None]
        return sum(each.nbytes for each in (*grads, *self._leaving)) + _alive(self._reducing)


def allocated(count: Callable[[], int], known: int) -> int:
    """The larger of two counts, the new one once gloo's threads let go of what they sent.

    They do so a moment after their work is said to be done.
    """
    for _ in range(20):
        if count() <= known:
            return known
        time.sleep(0.002)
    return count()


def attribute(owner: Any, name: str) -> Any:
    """What a class or a module holds itself: `getattr` of a class in C gives what that wraps."""
    held = [vars(each) for each in getattr(owner, "__mro__", (owner,)) if name in vars(each)]
    return held[0][name]


def _alive(buffers: list[weakref.ref[Any]]) -> int:
    return sum(storage.nbytes() for each in buffers if (storage := each()) is not None)


def _sharded_by(module: nn.Module) -> list[Any]:
    """FSDP2's own records of a module's parameters; private, only the test looks inside."""
    if not isinstance(module, FSDPModule):
        return []
    state: Any = module._get_fsdp_state()
    return [each for group in state._fsdp_param_groups for each in group.fsdp_params]


@cache
def planned(case: Case, world: int) -> RankPlan:
    """What is predicted of a case."""
    return plan_ranks(
        Net(case),
        world_size=world,
        engine="fsdp2",
        tokens=TOKENS,
        max_tile_bytes=case.max_tile_bytes,
        offload="cpu" if case.offload else "none",
        prefetch=case.prefetch,
        unit_bytes=case.unit_bytes,
        checkpointing=case.recomputes,
        tile_mlps=bool(case.mlp),
        work=forward,
    )


def gathered_at_most(plan: RankPlan) -> int:
    """The most that is predicted to be whole at once, with the buffers it comes in."""
    moments = {"forward", "backward", "the recomputation"}
    return max(_sum(m, _WHOLE) for m in plan.moments if m.name in moments)


def reduced_at_most(plan: RankPlan) -> int:
    """The same of gradients, with the buffers they leave in."""
    moments = {"backward", "the end of backward"}
    return max(_sum(m, _LEAVING) for m in plan.moments if m.name in moments)


def _sum(moment: Moment, names: tuple[str, ...]) -> int:
    return sum(term.nbytes for term in moment.terms if term.name in names)


def forward(model: nn.Module) -> Tensor:
    """One rank's forward."""
    loss: Tensor = model(torch.arange(TOKENS)[None])
    return loss


def run_case(case: Case, plan: RankPlan) -> Measured:
    """Train some steps as planned, and count the last."""
    offload = CPUOffloadPolicy(pin_memory=False) if case.offload else None
    model = shard(
        memtile.tile(Net(case), plan),
        unit_bytes=case.unit_bytes,
        prefetch=case.prefetch,
        offload_policy=offload,
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(WARMED):
        step(model, optimizer)
    probe = Probe(model)
    with probe.watching():
        step(model, optimizer)
    found = probe.measured
    found.parameters = sum(_shard_bytes(p) for p in model.parameters())
    found.gradients = sum(_shard_bytes(p.grad) for p in model.parameters() if p.grad is not None)
    found.state = sum(
        _shard_bytes(tensor)
        for kept in optimizer.state.values()
        for tensor in kept.values()
        if tensor.dim()
    )
    return found


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step of AdamW."""
    optimizer.zero_grad()
    forward(model).backward()
    optimizer.step()


def _shard_bytes(tensor: Any) -> int:  # a DTensor
    return int(tensor.to_local().nbytes)


def run(rank: int, world: int, folder: str, plans: dict[str, RankPlan]) -> None:
    """These cases, one after the other."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=300)
    )
    found = {name: asdict(run_case(CASES[name], plan)) for name, plan in plans.items()}
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def spawn(world: int, names: list[str]) -> list[dict[str, Measured]]:
    """What each rank measured of each of these cases, with so many processes."""
    plans = {name: planned(CASES[name], world) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        start_ranks(run, world, world, folder, plans)
        texts = [(Path(folder) / f"rank{rank}.json").read_text() for rank in range(world)]
    return [{n: Measured(**m) for n, m in json.loads(text).items()} for text in texts]
