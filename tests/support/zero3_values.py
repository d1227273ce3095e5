"""Values of partitioned tiles, made, copied, loaded and read: in every process of the tests."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from engine_cases import Case, Net, tiled
from torch import Tensor, nn

import memtile
from memtile import TiledEmbedding, TiledLinear, TiledLinearReturnBias
from memtile.engines.deepspeed_zero3 import attach, config
from memtile.errors import MemtileError

GIVEN = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
Started = Callable[..., Any]  # zero3_worker.started, which gives DeepSpeed's untyped engine


class Returning(nn.Linear):
    """A linear that returns its bias in place of adding it."""

    def forward(self, input: Tensor) -> Any:  # two tensors, where nn.Linear gives one
        """(output, bias)."""
        return nn.functional.linear(input, self.weight), self.bias


def dense_linear(seed: int = 5) -> nn.Linear:
    """13 → 11, the same on every rank."""
    torch.manual_seed(seed)
    return nn.Linear(13, 11)


def same(layer: nn.Module, dense: nn.Module, dtype: torch.dtype = torch.float32) -> bool:
    """Whether a partitioned layer has the values of a dense one, on this rank."""
    found = dict(memtile.dense_state_dict(layer))
    return all(torch.equal(found[k], v.to(dtype)) for k, v in dense.state_dict().items())


def inside_init(rank: int) -> dict[str, bool]:
    """Layers that are made where every module is partitioned while it is being made."""
    import deepspeed

    dense = dense_linear()
    source = dense if rank == 0 else nn.Linear(13, 11, device="meta")
    embedding = nn.Embedding(11, 5)
    with deepspeed.zero.Init(config_dict_or_path=GIVEN):
        partitioned = nn.Linear(13, 11)
        copied = TiledLinear(13, 11, in_splits=3, out_splits=2, init_linear=source)
        drawn = TiledLinear(256, 64, in_splits=8, out_splits=3)
        returning = TiledLinearReturnBias(
            13, 11, in_splits=2, out_splits=3, linear_cls=Returning, init_linear=source
        )
        rows = TiledEmbedding(11, 5, padding_idx=3, out_splits=4)
        again = TiledLinear(13, 11, in_splits=2, out_splits=4, init_linear=copied)
    found = {"a linear of rank 0": same(copied, dense), "tiles of another grid": same(again, dense)}
    found["returned biases"] = same(returning, dense)
    weight = dict(memtile.dense_state_dict(drawn))["weight"]
    found["starting values"] = 0.9 < weight.std().item() * (3 * 256) ** 0.5 < 1.1
    found["rows"] = not dict(memtile.dense_state_dict(rows))["weight"][3].any()
    rows.load_state_dict(embedding.state_dict())
    found["rows are loaded"] = same(rows, embedding) or dist.get_rank() > 0
    copied.copy_params_from(partitioned)
    with deepspeed.zero.GatheredParameters(list(partitioned.parameters())):
        whole = {name: p.detach().clone() for name, p in partitioned.named_parameters()}
    read = dict(memtile.dense_state_dict(copied))
    found["a partitioned linear"] = all(torch.equal(read[k], v) for k, v in whole.items())
    return found


def one_at_a_time() -> int:
    """The most tiles that are gathered while one layer is copied into another one."""
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=GIVEN):
        source = TiledLinear(13, 11, in_splits=3, out_splits=4, bias=False)
        target = TiledLinear(13, 11, in_splits=3, out_splits=4, bias=False)
    with most_gathered(target) as of_target, most_gathered(source) as of_source:
        target.copy_params_from(source)
        target.load_state_dict(dict(memtile.dense_state_dict(source)))
        dict(memtile.dense_state_dict(target))
    return max(of_target[0], of_source[0])


@contextmanager
def most_gathered(layer: nn.Module) -> Iterator[list[int]]:
    """How many parameters of a layer were gathered at once."""
    import deepspeed

    contexts: Any = deepspeed.zero.GatheredParameters
    enter, most = contexts.__enter__, [0]

    def look(self: Any) -> None:
        enter(self)
        live = [p for p in layer.parameters() if p.ds_status.name == "AVAILABLE"]  # type: ignore[attr-defined]
        most[0] = max(most[0], len(live))

    contexts.__enter__ = look
    try:
        yield most
    finally:
        contexts.__enter__ = enter


def into_masters(start: Started, dtype: torch.dtype, offload: str | None) -> bool:
    """Whether a copy after `deepspeed.initialize` stays through steps that change nothing."""
    tiled = TiledLinear(13, 11, in_splits=3, out_splits=2).to(dtype)
    given = config(tiled, offload_param=offload, offload_optimizer=offload)
    engine = attach(start(tiled, given, lr=0.0, weight_decay=0.0))
    dense = dense_linear(seed=7)
    tiled.copy_params_from(dense if dist.get_rank() == 0 else nn.Linear(13, 11, device="meta"))
    before = same(tiled, dense, dtype)
    for _ in range(2):
        engine.backward(engine(torch.ones(2, 13, dtype=dtype)).float().square().mean())
        engine.step()
    after = same(tiled, dense, dtype)
    engine.destroy()
    return before and after


def refusals(start: Started, rank: int, world: int) -> dict[str, str]:
    """What every rank is told."""
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=GIVEN):
        layer = TiledLinear(13, 11, in_splits=3, out_splits=2)
    found = {
        "no values": told(lambda: layer.copy_params_from(nn.Linear(13, 11, device="meta"))),
        "another shape": told(lambda: layer.copy_params_from(nn.Linear(13, 12 - (rank == 1)))),
    }
    with deepspeed.zero.GatheredParameters(list(layer.parameters())):
        found["gathered"] = told(lambda: layer.copy_params_from(dense_linear()))
    if world > 1:
        other = memtile.tile(Net(Case(), torch.float32), out_splits=2 + rank)
        found["grids"] = told(lambda: config(other))
    model = tiled(Case(), torch.float32)
    found["no engine"] = told(lambda: attach(model))
    engine = attach(start(model, config(model)))
    found["twice"] = told(lambda: attach(engine))
    engine.destroy()
    return found


def warned(start: Started) -> list[str]:
    """What `attach` says about DeepSpeed's defaults."""
    model = tiled(Case(), torch.float32)
    engine = start(model, GIVEN)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attach(engine)
    engine.destroy()
    return [str(each.message) for each in caught]


def told(act: Callable[[], object]) -> str:
    """The message of the error."""
    try:
        act()
    except MemtileError as error:
        return str(error)
    return ""


def all_values(start: Started, rank: int, world: int) -> dict[str, Any]:
    """Everything above."""
    return {
        "inside": inside_init(rank),
        "most": one_at_a_time(),
        "masters": {
            "float32": into_masters(start, torch.float32, None),
            "16 bits": into_masters(start, torch.bfloat16, None),
            "offloaded": into_masters(start, torch.float32, "cpu"),
            "16 bits, offloaded": into_masters(start, torch.bfloat16, "cpu"),
        },
        "refusals": refusals(start, rank, world),
        "warned": warned(start),
    }
