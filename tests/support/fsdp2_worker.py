"""What each process of the FSDP2 tests does: every case in one group of processes."""

import json
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp._fully_shard._fsdp_param_group as param_group
from engine_cases import CASES as COMMON
from engine_cases import (
    Case,
    Mlp,
    Net,
    Outcome,
    ParallelNet,
    batches,
    computed_logits,
    outcome_of,
    parallel_losses,
    plain_step,
    tiled,
    train,
)
from small_experts import ExpertsLoss
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

import memtile
from memtile.engines.fsdp2_units import SharedTile
from memtile.engines.torch_fsdp2 import shard
from memtile.errors import DeferredLogitsError, EngineError
from memtile.layers import mlp_in_tiles

CASES = {
    **COMMON,
    "neighbours together": Case(grid=(3, 5), unit_bytes=600),
    "hybrid": Case(hybrid=True),
    "half of it frozen": Case(frozen=True, frozen_too=("embedding",), tied=False),
    "another way in each step": Case(skips=True, tied=False),
    "another way, tied": Case(skips=True),
    "after a forward that raised": Case(stumbles=True, tied=False),
    "registered backwards": Case(backwards=True, tied=False),
    "MLP, adapters in the root": Case(mlp="gated", adapted=True, again=True, unit_bytes=1000),
    "some layers not tiled": Case(whole=("down", "head"), tied=False, unit_bytes=600),
}


@contextmanager
def watched() -> Iterator[list[int]]:
    """The most units of tiles that were gathered at once, and the most often that one was.

    The second of tiles that are not tied.
    """
    cls: Any = param_group.FSDPParamGroup  # private: only the test looks inside
    unshard, to_sharded = cls.unshard, cls._to_sharded
    live: set[int] = set()
    times: Counter[int] = Counter()
    most = [0, 0]

    def gather(group: Any, *arguments: Any, **options: Any) -> None:
        unshard(group, *arguments, **options)
        if not any(isinstance(module, Net) for module in group.modules):
            tied = any(isinstance(module, SharedTile) for module in group.modules)
            times[id(group)] += id(group) not in live and not tied
            most[1] = max(times.values())
            live.add(id(group))
            most[0] = max(most[0], len(live))

    def let_go(group: Any) -> None:
        to_sharded(group)
        live.discard(id(group))

    cls.unshard, cls._to_sharded = gather, let_go
    try:
        yield most
    finally:
        cls.unshard, cls._to_sharded = unshard, to_sharded


def run_case(case: Case, rank: int, world: int) -> tuple[list[int], list[float], Any]:
    """Train a sharded model; gives what `watched` saw, its losses, and its parameters."""
    model = tiled(case)
    options: dict[str, Any] = {"unit_bytes": case.unit_bytes}
    if case.offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if case.hybrid and world == 4:
        options["mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    shard(model, **options)
    with watched() as most:
        if case.again and case.evaluates:
            with torch.no_grad():  # the order of use is known before the first backward
                model(batches()[0])
        losses = train(model, case, rank, world)
    return most, losses, whole_state(model)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The tiles' values, on every rank."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def loads_what_it_gives() -> bool:
    """Whether a sharded model takes the state of another one, and gives the same."""
    tiled = [memtile.tile(Net(Case()), out_splits=4) for _ in range(2)]
    with torch.no_grad():
        for number, parameter in enumerate(tiled[0].parameters()):
            parameter.add_(number)
    first, second = (shard(model) for model in tiled)
    given = whole_state(first)
    set_model_state_dict(second, dict(given), options=StateDictOptions(full_state_dict=True))
    found = whole_state(second)
    return all(torch.equal(found[name], value) for name, value in given.items())


def evaluated_unevenly(rank: int) -> float:
    """How far an evaluation is from the dense one, where only rank 0 has many tokens."""
    case, fewest = Case(mlp="gated", tied=False), mlp_in_tiles.FEWEST_BYTES
    dense, model = Net(case), shard(tiled(case), unit_bytes=0)
    ids = torch.arange(6 if rank else 60)[None] % 23
    mlp_in_tiles.FEWEST_BYTES = 4096
    with torch.no_grad():
        found = (model(ids) - dense(ids)).abs().item()
    mlp_in_tiles.FEWEST_BYTES = fewest
    return found


def after_own_forwards() -> float:
    """How far MLPs in tiles are from the dense ones after forwards without their adapters.

    In those their own forwards run, which use their layers one after another, in another order.
    """
    case = Case(mlp="gated", adapted=True)
    model, dense = shard(tiled(case)), Net(case)
    adapted = [module for module in model.modules() if hasattr(module, "enable_adapters")]
    for _ in range(3):
        for on in (False, True):
            for module in adapted:
                module.enable_adapters(on)
            found: Tensor = model(batches()[0])
    return (found - dense(batches()[0])).abs().item()


def asked_for_a_weight() -> str:
    """What someone is told who reads the weight of a sharded layer."""
    model = shard(memtile.tile(Net(Case()), out_splits=4))
    try:
        model.up.weight.sum()
    except EngineError as error:
        return str(error)
    return ""


def experts(rank: int, world: int) -> float:
    """How far experts in tiles that are trained sharded are from the dense ones, at most."""
    dense, model = (ExpertsLoss("gpt-oss") for _ in range(2))
    shard(memtile.tile(model, out_splits=3))  # two whole experts in a tile, and one
    train(dense, Case())
    train(model, Case(), rank, world)
    same = memtile.tile(ExpertsLoss("gpt-oss"), out_splits=3)
    same.load_state_dict(whole_state(model))
    found, truth = dict(memtile.dense_state_dict(same)), dense.state_dict()
    return max(float((found[key] - truth[key]).norm() / truth[key].norm()) for key in truth)


class ReturnsBias(nn.Linear):
    """Megatron's `skip_bias_add`: the bias comes beside the output."""

    def forward(self, input: Tensor) -> Any:
        """The product, and the bias."""
        return nn.functional.linear(input, self.weight), self.bias


def returned_bias() -> float:
    """How far the gradients of a layer that returns its bias are from the dense ones, at most."""
    torch.manual_seed(0)
    dense, x = nn.Linear(12, 31).double(), torch.randn(4, 12, dtype=torch.float64)
    layer = memtile.TiledLinearReturnBias(12, 31, out_splits=4, linear_cls=ReturnsBias).double()
    layer.copy_params_from(dense)
    for model in (dense, shard(nn.Sequential(layer))):
        result = model(x)
        output, bias = result if isinstance(result, tuple) else (result, 0)
        (output + bias).square().sum().backward()
    tiles = [tile for _, tile in layer.tiles()]
    found = torch.cat([tile.bias.grad.full_tensor() for tile in tiles])
    weights = torch.cat([tile.weight.grad.full_tensor() for tile in tiles])
    differences = found - dense.bias.grad, weights - dense.weight.grad
    return max(difference.abs().max().item() for difference in differences)


def loss_in_float32_of_narrow_results() -> float:
    """How far a loss is from the float64 one where FSDP2 casts all results to bfloat16."""
    case = Case(writes=True, tied=False, bias=False)
    dense, policy = Net(case), MixedPrecisionPolicy(output_dtype=torch.bfloat16)
    model = nn.Sequential(tiled(case, torch.float32).head)
    shard(model, mp_policy=policy, unit_bytes=0)
    x, target = torch.randn(40, 12, dtype=torch.float64), torch.arange(40) % 23
    model(x.float())  # FSDP2 finds its root
    loss = memtile.linear_cross_entropy(x.float(), model[0], target)
    truth = nn.functional.cross_entropy(dense.head(x), target)
    return abs(loss.item() / truth.item() - 1)


def logits_after_a_step() -> str:
    """What someone is told who reads deferred logits when the head has been stepped."""
    model = shard(nn.Sequential(tiled(Case(writes=True, tied=False)).head), unit_bytes=0)
    optimizer = torch.optim.AdamW(model.parameters())
    logits = model(torch.ones(40, 12, dtype=torch.float64))
    nn.functional.cross_entropy(logits, torch.arange(40) % 23).backward()
    optimizer.step()
    try:
        return str(logits.sum())
    except DeferredLogitsError as error:
        return str(error)


def other_grids(rank: int) -> str:
    """What a rank is told when the ranks have other grids."""
    model = memtile.tile(Net(Case()), out_splits=2 + rank)
    try:
        shard(model)
    except EngineError as error:
        return str(error)
    return ""


class Experts(nn.Module):
    """Linears of the same size, of which each call uses those that it is told."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

    def forward(self, x: Tensor, used: list[int]) -> Tensor:
        """The mean square of what they give."""
        for number in used:
            x = self.experts[number](x)
        return x.square().mean()


def told_of_other_ways(rank: int, late: int, ways: list[list[int]]) -> str:
    """What a rank is told that uses other modules, or more of them, after so many steps alike."""
    mesh = DeviceMesh.from_group(dist.new_group(), "cpu")  # which has exchanged nothing yet
    model = shard(memtile.tile(Experts(), out_splits=1), mesh, unit_bytes=0)
    try:
        for step in range(late + 20):
            model(torch.ones(2, 12), ways[0] if step < late else ways[rank]).backward()
    except EngineError as error:
        return str(error)
    return ""


def run(rank: int, world: int, folder: str, names: list[str]) -> None:
    """These cases, one after the other."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=300)
    )
    live, losses = {}, {}
    with computed_logits() as logits:
        for name in names:
            live[name], losses[name], state = run_case(CASES[name], rank, world)
            if rank == 0:
                torch.save(state, Path(folder) / f"{name}.pt")
    computed = Mlp.computed
    others = {
        "refused": other_grids(rank) if world > 1 else "",
        "other ways": [
            told_of_other_ways(rank, late, [[0], way] + [[0]] * (world - 2)) if world > 1 else ""
            for late, way in ((0, [1]), (1, [0, 1]), (40, [2]))
        ],
        "loads": loads_what_it_gives(),
        "uneven": evaluated_unevenly(rank),
        "own forwards": after_own_forwards(),
        "weight": asked_for_a_weight(),
        "returned_bias": returned_bias(),
        "experts": experts(rank, world),
        "parallel": parallel_losses(plain_step(shard(ParallelNet(), unit_bytes=0))),
        "live": live,
        "computed": computed,
        "logits": len(logits),
        "narrow": loss_in_float32_of_narrow_results(),
        "after a step": logits_after_a_step(),
        "losses": losses,
    }
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(others))
    dist.destroy_process_group()


def spawn(world: int, names: list[str]) -> Outcome:
    """Run these cases with so many processes."""
    return outcome_of(run, world, names)
