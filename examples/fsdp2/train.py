"""Train a tiled model over ranks with FSDP2, save it, and resume it in another grid.

torchrun --nproc-per-node 2 examples/fsdp2/train.py
"""

import os
import tempfile

import torch
import torch.distributed as dist
from torch import nn

import memtile
from memtile.engines.torch_fsdp2 import shard


def sharded(max_tile_bytes: int) -> nn.Module:
    """The same model on each rank, its tiles as shards."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 3000), nn.GELU(), nn.Linear(3000, 10))
    return shard(memtile.tile(model, max_tile_bytes=max_tile_bytes))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """An ordinary loop; each rank draws data of its own."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    for step in range(steps):
        x = torch.randn(32, 64, generator=generator)
        loss = nn.functional.cross_entropy(model(x), x[:, :10].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.3f}")


def main() -> None:
    """Two parts of one run."""
    dist.init_process_group("gloo")
    names = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    folder = os.path.join(names[0], "run")

    model = sharded(max_tile_bytes=256 << 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    train(model, optimizer, steps=5)
    memtile.save_training(folder, model, optimizer, step=5)

    model = sharded(max_tile_bytes=64 << 10)  # another grid, and any number of ranks
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    memtile.resume_training(folder, model, optimizer)
    train(model, optimizer, steps=5)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
