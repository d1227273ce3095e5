"""What each process of ZeRO-3's cluster plan tests does: train partitioned, and count bytes."""

import json
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from processes import start_ranks
from rank_worker import CASES as EVERY_CASE
from rank_worker import TOKENS, WARMED, Case, Net, allocated, attribute, forward
from torch import Tensor, nn
from zero3_group import join

import memtile
from memtile.costmodel import RankPlan
from memtile.engines.deepspeed_zero3 import attach, config
from memtile.planner import plan_ranks

# in the second the last units of a recomputation are others than predicted: 1 % of what is sent
_FSDP2_ALONE = ("neighbours together", "MLP, plain, adapters, recomputed")
CASES = {name: case for name, case in EVERY_CASE.items() if name not in _FSDP2_ALONE} | {
    "16 bits, offloaded": Case(dtype="bfloat16", offload=True),
    "recomputed, nothing ahead": Case(recomputes=True, prefetch=0),
}
CONTROL = 64
"""Elements of what DeepSpeed agrees on in a step: an overflow, a norm; larger ones are values."""


KEPT = {
    "parameters": "shards of parameters",
    "gradients": "gradients of shards",
    "state": "optimizer's state of shards",
    "float32_gradients": "float32 gradients of shards",
    "persistent": "persistent parameters, whole",
    "bucket": "bucket of gradients",
}
"""What is measured between steps, and the plan's term for it."""


@dataclass
class Measured:
    """Bytes of one rank.

    Attributes:
        parameters: of partitions, padding included.
        gradients: of the buffer of their gradients.
        state: of float32 masters that are no view of the partitions, and of moments.
        float32_gradients: of those that stay for the optimizer between steps.
        persistent: whole on every rank.
        bucket: of the buffer that gradients leave through.
        gathered: the most that whole parameters held at once, persistent ones not counted.
        reduced: the most that whole gradients held at once, the bucket not counted.
        sent: over links in one step, by the operation.
        other: elements of the largest message of any other operation.
    """

    parameters: int = 0
    gradients: int = 0
    state: int = 0
    float32_gradients: int = 0
    persistent: int = 0
    bucket: int = 0
    gathered: int = 0
    reduced: int = 0
    sent: dict[str, int] = field(default_factory=dict)
    other: int = 0


class Probe:
    """Watches what DeepSpeed gathers and reduces, and what the process group is given to send."""

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.measured = Measured()
        self._parameters: list[Any] = list(model.parameters())  # with DeepSpeed's attributes
        self._own = {p.ds_tensor.untyped_storage().data_ptr() for p in self._parameters}
        self._buckets = [bucket.buffer for bucket in optimizer.ipg_buckets.values()]
        self._leaving: list[weakref.ref[Any]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, everything is counted."""
        from deepspeed.runtime.zero.partitioned_param_coordinator import (
            PartitionedParameterCoordinator,
        )

        group = dist.ProcessGroup
        with ExitStack() as stack:
            for owner, name, wrap in (
                (group, "all_gather_single", self._sending("all-gather")),
                (group, "reduce_scatter_single", self._sending("reduce-scatter")),
                (group, "allreduce", self._agreeing),
                (group, "broadcast", self._agreeing),
                (group, "allgather", self._agreeing),
                (PartitionedParameterCoordinator, "fetch_sub_module", self._fetching),
            ):
                stack.callback(setattr, owner, name, attribute(owner, name))
                setattr(owner, name, wrap(getattr(owner, name)))
            for parameter in self._parameters:
                if parameter.requires_grad:
                    hook = parameter.register_post_accumulate_grad_hook(self._see_gradient)
                    stack.callback(hook.remove)
            yield

    def _sending(self, kind: str) -> Callable[[Any], Any]:
        def wrap(old: Any) -> Any:
            def send(group: Any, output: Tensor, given: Tensor, *rest: Any) -> Any:
                piece = min(output.nbytes, given.nbytes)  # what each other rank is sent
                sent = self.measured.sent
                sent[kind] = sent.get(kind, 0) + piece * (group.size() - 1)
                if kind == "reduce-scatter":
                    self._leaving.append(weakref.ref(given.untyped_storage()))
                self.see()
                return old(group, output, given, *rest)

            return send

        return wrap

    def _agreeing(self, old: Any) -> Any:
        def agree(group: Any, tensors: Any, *rest: Any) -> Any:
            found = [tensors] if isinstance(tensors, Tensor) else tensors
            for each in found:
                largest = max(map(torch.numel, each)) if isinstance(each, list) else each.numel()
                self.measured.other = max(self.measured.other, largest)
            return old(group, tensors, *rest)

        return agree

    def _fetching(self, old: Any) -> Any:
        def fetch(*args: Any, **kwargs: Any) -> None:
            old(*args, **kwargs)
            self.see()

        return fetch

    def _see_gradient(self, _: Tensor) -> None:
        self.see()

    def see(self) -> None:
        """Count what is alive now."""
        found = self.measured
        found.gathered = max(found.gathered, self._gathered())
        found.reduced = allocated(self._reduced, found.reduced)

    def _gathered(self) -> int:
        """Storages of whole parameters; of one rank they may be the partitions themselves."""
        found = {}
        for each in self._parameters:
            storage = each.data.untyped_storage()
            if not each.ds_persist and storage.nbytes() and storage.data_ptr() not in self._own:
                found[storage.data_ptr()] = storage.nbytes()
        return sum(found.values())

    def _reduced(self) -> int:
        buckets = {bucket.untyped_storage().data_ptr() for bucket in self._buckets}
        storages = [p.grad.untyped_storage() for p in self._parameters if p.grad is not None]
        storages += [storage for each in self._leaving if (storage := each()) is not None]
        found = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return sum(nbytes for place, nbytes in found.items() if place not in buckets)


@cache
def planned(case: Case, world: int) -> RankPlan:
    """What is predicted of a case."""
    return plan_ranks(
        Net(case),
        world_size=world,
        engine="zero3",
        tokens=TOKENS,
        max_tile_bytes=case.max_tile_bytes,
        offload="cpu" if case.offload else "none",
        prefetch=case.prefetch,
        checkpointing=case.recomputes,
        work=forward,
    )


def gathered_at_most(plan: RankPlan) -> int:
    """The most that is predicted to be whole at once."""
    names = ("unit in use", "units on their way", "unit that waits")
    return max(
        sum(term.nbytes for term in moment.terms if term.name in names) for moment in plan.moments
    )


def reduced_at_most(plan: RankPlan) -> int:
    """The same of gradients outside the bucket."""
    names = ("gradient of a unit, whole", "padded copy of the bucket")
    (backward,) = (moment for moment in plan.moments if moment.name == "backward")
    return sum(term.nbytes for term in backward.terms if term.name in names)


def run_case(case: Case, plan: RankPlan) -> Measured:
    """Train some steps as planned, and count the last."""
    import deepspeed

    model = memtile.tile(Net(case), plan)
    place = "cpu" if case.offload else None
    given = config(model, prefetch=case.prefetch, offload_param=place, offload_optimizer=place)
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    made = deepspeed.initialize(model=model, config=given, optimizer=adam)[0]
    engine: Any = attach(made, prefetch=case.prefetch)
    for _ in range(WARMED):
        step(engine)
    probe = Probe(model, engine.optimizer)
    with probe.watching():
        step(engine)
    found = replace(probe.measured, **kept(model, engine.optimizer))
    engine.destroy()
    return found


def step(engine: Any) -> None:
    """One step of AdamW."""
    engine.backward(engine(torch.arange(TOKENS)[None]))
    engine.step()


def kept(model: nn.Module, optimizer: Any) -> dict[str, int]:
    """What a rank has between two steps, by the attribute of `Measured`."""
    parameters: list[Any] = list(model.parameters())
    own = {p.ds_tensor.untyped_storage().data_ptr() for p in parameters}
    masters = optimizer.fp32_partitioned_groups_flat
    copied = [each for each in masters if each.untyped_storage().data_ptr() not in own]
    moments = [t for each in optimizer.optimizer.state.values() for t in each.values() if t.dim()]
    return {
        "parameters": sum(p.ds_tensor.nbytes for p in parameters),
        "gradients": optimizer.grad_partitions_flat_buffer.nbytes,
        "state": sum(each.nbytes for each in (*copied, *moments)),
        "float32_gradients": sum(m.grad.nbytes for m in masters if m.grad is not None),
        "persistent": sum(p.nbytes for p in parameters if p.ds_persist),
        "bucket": sum(bucket.buffer.nbytes for bucket in optimizer.ipg_buckets.values()),
    }


def run(rank: int, world: int, folder: str, plans: dict[str, RankPlan]) -> None:
    """These cases, one after the other."""
    join(rank, world, folder, seconds=180)
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
