"""Train a tiled model over ranks with DeepSpeed ZeRO-3, made without values and read from a file.

    torchrun --nproc-per-node 2 examples/zero3/train.py

DeepSpeed's launcher does as well: deepspeed --no_local_rank examples/zero3/train.py
"""

import tempfile

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

import memtile
from memtile.engines.deepspeed_zero3 import attach, config, from_checkpoint


def dense() -> nn.Module:
    """A small model in place of one that does not fit."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 3000), nn.GELU(), nn.Linear(3000, 10))


def main() -> None:
    """Train between the start and the end of the process group, which nothing holds by then."""
    deepspeed.init_distributed("gloo")
    train()
    dist.destroy_process_group()


def train() -> None:
    """Write a file, read it into partitions of a model without values, and train."""
    names = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    if dist.get_rank() == 0:
        memtile.save_checkpoint(dense(), names[0])
    dist.barrier()

    model = memtile.tile(memtile.empty_model(dense), max_tile_bytes=256 << 10)
    settings = config(model, micro_batch=32, clip=1.0)
    from_checkpoint(model, names[0], settings)  # each rank reads its own parts
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    attach(engine)

    generator = torch.Generator().manual_seed(dist.get_rank())
    for step in range(8):
        x = torch.randn(32, 64, generator=generator)
        loss = nn.functional.cross_entropy(engine(x), x[:, :10].argmax(1))
        engine.backward(loss)
        engine.step()
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    engine.destroy()


if __name__ == "__main__":
    main()
