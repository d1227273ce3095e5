"""A model in tiles and shards, with its optimizer, for a run over ranks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy

import memtile
from memtile.cli.finetune.settings import Settings
from memtile.engines.dense_files import load_checkpoint
from memtile.engines.torch_fsdp2 import shard
from memtile.layers import TiledModule
from memtile.planning import format_byte_size


@dataclass(frozen=True)
class Sharded:
    """What a rank trains.

    Args:
        model: sharded, with values.
        optimizer: AdamW, in float32.
        scheduler: down to 0 along a cosine.
        device: that the rank works on.
        saved_dtype: that the model's checkpoint had.
        summary: what is in tiles.
    """

    model: Any  # transformers'
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    device: torch.device
    saved_dtype: torch.dtype
    summary: str


def sharded(model: Any, settings: Settings, tile_bytes: int, *, offload: bool) -> Sharded:
    """Tile, shard and load a model that has no values yet.

    Weights, gradients and moments are float32, whatever the checkpoint has; a checkpoint of 16 bits
    is worked on in 16 bits.

    Args:
        model: of transformers, its parameters on the meta device.
        settings: of the run.
        tile_bytes: the most that a tile has.
        offload: keep shards in host memory.
    """
    dtype = next(model.parameters()).dtype
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = memtile.tile(model.float(), max_tile_bytes=tile_bytes)
    mixed = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype)
    pinned = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    shard(model, mp_policy=mixed, offload_policy=pinned if offload else OffloadPolicy())
    load_checkpoint(model, Path(settings.model), device="cpu" if offload else device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    model.train()
    return Sharded(model, optimizer, scheduler, device, dtype, _summary(model, tile_bytes))


def _summary(model: torch.nn.Module, tile_bytes: int) -> str:
    layers = [each for each in model.modules() if isinstance(each, TiledModule)]
    tiles = sum(layer.grid.out_splits * layer.grid.in_splits for layer in layers)
    each = sum(parameter.nbytes for parameter in model.parameters()) // dist.get_world_size()
    return (
        f"{len(layers)} layers in {tiles} tiles of at most {format_byte_size(tile_bytes)}; "
        f"weights, gradients and moments {format_byte_size(4 * each)} a rank"
    )
