"""What each process of the tests of dense files does: safetensors into shards and out again."""

import logging
import os
import tempfile
import warnings
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from processes import start_ranks
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import memtile
from memtile import load_checkpoint, save_checkpoint
from memtile.convert import streaming
from memtile.engines import dense_files
from memtile.engines.torch_fsdp2 import shard
from memtile.errors import CheckpointError, CheckpointWriteError, EngineError

PIECE = 70
"""Elements that are read at once here, in place of millions."""
TILE = 8 * 12
"""Elements of the largest tile, which ZeRO-3 wants whole for a moment, to partition it."""


class Net(nn.Module):
    """A tied embedding, linears, and what is never tiled: a convolution, a norm, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(23, 12), nn.Linear(12, 23, bias=False)
        self.up, self.down = nn.Linear(12, 31), nn.Linear(31, 12)
        self.conv, self.norm = nn.Conv1d(5, 3, 2), nn.LayerNorm(12)
        self.head.weight = self.embedding.weight
        self.register_buffer("counts", torch.arange(4.0))


def filled() -> Net:
    """One with values that tell every element from the others."""
    net = Net()
    with torch.no_grad():
        for number, parameter in enumerate(net.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) + number / 16)
    return net


def sharded(grid: tuple[int, int]) -> nn.Module:
    """One in tiles and shards, without values."""
    model = memtile.empty_model(Net)
    return shard(memtile.tile(model, out_splits=grid[0], in_splits=grid[1]), unit_bytes=0)


def partitioned(path: Path) -> nn.Module:
    """One in partitions of ZeRO-3, read from a file."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed's use of torch
    logging.disable(logging.WARNING)
    ranks = {"LOCAL_RANK": dist.get_rank(), "LOCAL_WORLD_SIZE": dist.get_world_size()}
    os.environ |= {"DS_ACCELERATOR": "cpu", **{name: str(value) for name, value in ranks.items()}}
    from memtile.engines.deepspeed_zero3 import config, from_checkpoint

    model = memtile.tile(memtile.empty_model(Net), out_splits=3, in_splits=2)
    return from_checkpoint(model, path, config(model))


class Largest(TorchDispatchMode):
    """The most elements that a tensor of any operation had in memory; messages are no tensors."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if type(result) is Tensor and not result.is_meta and result.is_floating_point():
            self.numel = max(self.numel, result.untyped_storage().nbytes() // result.itemsize)
        return result


def refused(folder: Path) -> str:
    """What is said of a checkpoint that lacks a layer."""
    try:
        load_checkpoint(sharded((2, 1)), folder / "other")
    except CheckpointError as error:
        return str(error)
    return ""


def other_folders(model: nn.Module, folder: Path) -> str:
    """What is said where each rank was given a folder of its own."""
    try:
        save_checkpoint(model, folder / f"out{dist.get_rank()}")
    except EngineError as error:
        return str(error)
    return ""


def run(rank: int, world: int, folder: str) -> None:
    """Load the dense file, look at the shards, write it again."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    here = Path(folder)
    store = dist.FileStore(str(here / "store"), world)
    limit = timedelta(seconds=300)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
    model = sharded((3, 2))
    dense_files.BAND_BYTES = streaming.PIECE_BYTES = 4 * PIECE
    with Largest() as largest:
        load_checkpoint(model, here / "in")
        save_checkpoint(model, here / "out")
        save_checkpoint(model, here / "half", dtype=torch.bfloat16)
        if find_spec("deepspeed") is not None:
            zero3 = partitioned(here / "in")
            save_checkpoint(zero3, here / "zero3")
            load_checkpoint(zero3, here / "other values")
            save_checkpoint(zero3, here / "zero3 loaded")
    said = other_folders(model, here)
    (here / "file").touch()
    try:
        save_checkpoint(model, here / "file" / "out")
        unwritable = ""
    except CheckpointWriteError as error:
        unwritable = error.strerror
    torch.save((largest.numel, refused(here), said, unwritable), here / f"rank{rank}.pt")
    dist.destroy_process_group()


def spawn(world: int, check: Any) -> list[tuple[int, str, str, str]]:
    """What each rank found; `check` is called with the folder."""
    with tempfile.TemporaryDirectory() as folder:
        memtile.save_checkpoint(filled(), Path(folder) / "in")
        memtile.save_checkpoint(nn.Linear(3, 2), Path(folder) / "other")
        memtile.save_checkpoint(Net(), Path(folder) / "other values")
        start_ranks(run, world, world, folder)
        check(Path(folder))
        return [torch.load(Path(folder) / f"rank{rank}.pt") for rank in range(world)]
