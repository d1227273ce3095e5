"""A process that becomes a rank of a group under DeepSpeed, on the CPU."""

import logging
import os
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def join(rank: int, world: int, folder: str, seconds: int = 60) -> None:
    """Make the group that DeepSpeed finds; `folder` is the same on each rank."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed's use of torch
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_WORLD_SIZE": str(world)}
    store = dist.FileStore(str(Path(folder) / f"store of {world}"), world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=seconds)
    )
    import deepspeed

    deepspeed.init_distributed("gloo")
