"""What processes under ZeRO-3 do with parts of tiles in files on a disk."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from processes import start_ranks
from torch import Tensor, nn
from zero3_group import join
from zero3_worker import started, tile_weights, watched

import memtile
from memtile.engines.deepspeed_zero3 import attach, check, config
from memtile.errors import EngineError

STEPS = 6
PLACES: dict[str, tuple[str | None, str | None]] = {
    "parameters": ("disk", None),
    "the optimizer": (None, "disk"),
    "both": ("disk", "disk"),
    "parameters, and the optimizer on the CPU": ("disk", "cpu"),
}


def splits_for(world: int) -> int:
    """Rows of tiles, so that each rank's part of one has a mebibyte."""
    return 8 // world


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two linears, of which each rank's part of a tile has a mebibyte or a little more."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1024, 2049), nn.Tanh(), nn.Linear(2049, 1024)).to(dtype)


def batches() -> Tensor:
    """Of shape (steps, batch, 1024)."""
    return torch.randn(STEPS, 4, 1024, generator=torch.Generator().manual_seed(1))


def dense(dtype: torch.dtype) -> dict[str, Tensor]:
    """The parameters of the model in one process, without tiles."""
    model = net(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for x in batches().to(dtype):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return dict(model.state_dict())


def trained(
    rank: int, folder: Path, places: tuple[str | None, str | None]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What was live and on the disk meanwhile, and the dense parameters."""
    import deepspeed

    world = dist.get_world_size()
    model = memtile.tile(net(), out_splits=splits_for(world))
    param, optimizer = (folder if place == "disk" else place for place in places)
    given = config(model, offload_param=param, offload_optimizer=optimizer)
    seen: dict[str, Any] = {"findings": [str(each) for each in check(given, model)]}
    deepspeed.zero.Init(module=model, config_dict_or_path=given)
    engine = attach(started(model, given, lr=1e-3))
    with watched(model) as live:
        for x in batches():
            engine.backward(engine(x.chunk(world)[rank]).square().mean())
            engine.step()
    seen |= {**live, "files": _files(folder), "in memory": _in_memory(model)}
    state = {name: tensor.clone() for name, tensor in memtile.dense_state_dict(model)}
    seen["copied"] = _stays(model, engine)
    engine.destroy()
    return seen, state


def _stays(model: Any, engine: Any) -> bool:  # both with attributes that have no types
    """Whether what is copied into a layer reaches the disk, and its masters."""
    source = net()[0]
    for group in engine.optimizer.param_groups:
        group |= {"lr": 0.0, "weight_decay": 0.0}
    model[0].copy_params_from(source if dist.get_rank() == 0 else net()[0].to("meta"))
    engine.backward(engine(batches()[0]).square().mean())
    engine.step()
    found = dict(memtile.dense_state_dict(model[0]))
    return all(torch.equal(found[key], value) for key, value in source.state_dict().items())


def _rounded(folder: Path) -> str:
    """What `attach` says of parts that are on the disk in another dtype, or nothing."""
    model = memtile.tile(net(), out_splits=splits_for(dist.get_world_size()))
    engine = started(model, config(model, offload_param=folder / "rounded"))
    files = next(model.parameters()).nvme_swapper  # type: ignore[attr-defined]
    try:
        attach(engine)
    except EngineError as error:
        return str(error)
    finally:
        engine.destroy()
    return "" if files.dtype == torch.float32 else "nothing was said"


def _files(folder: Path) -> dict[str, int]:
    dist.barrier()
    found = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file()
    }
    dist.barrier()
    return found


def _in_memory(model: nn.Module) -> int:
    """Tiles of which this rank's part is in memory."""
    weights: list[Any] = tile_weights(model)
    return sum(weight.ds_tensor.status.name == "AVAILABLE" for weight in weights)


def run(rank: int, world: int, folder: str) -> None:
    """Every place, one after the other."""
    join(rank, world, folder)
    report: dict[str, Any] = {"rounded": _rounded(Path(folder))}
    for name, places in PLACES.items():
        disk = Path(folder) / name
        disk.mkdir(exist_ok=True)
        report[name], state = trained(rank, disk, places)
        if rank == 0:
            torch.save(state, Path(folder) / f"{name}.pt")
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


def spawn(folder: Path, world: int) -> tuple[list[dict[str, Any]], dict[str, dict[str, Tensor]]]:
    """What each rank saw, and the parameters that each place left."""
    start_ranks(run, world, world, str(folder))
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]
    return ranks, {name: torch.load(folder / f"{name}.pt") for name in PLACES}
