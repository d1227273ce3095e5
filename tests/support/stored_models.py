"""Models with their checkpoints: what they hold, densely, and files in every form."""

from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import memtile

State = dict[str, Tensor]


def dense_values(model: nn.Module) -> State:
    """Copies of what the dense model would hold, by every name."""
    return {name: tensor.clone() for name, tensor in memtile.dense_state_dict(model)}


def as_dtype(state: State, dtype: torch.dtype) -> State:
    """The same with every floating-point tensor converted."""
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}


def scrambled(model: Any) -> Any:
    """The same model with other values, none of which it was saved with."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.full_like(tensor, 3))
    return model


def write(state: State, path: Path) -> Path:
    """A safetensors file of the tensors, tied ones as copies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in state.items()}, path)
    return path


def net(seed: int = 0, *, tied: bool = True) -> nn.Sequential:
    """An embedding, a buffer, a bias, a tied head: each of them ragged."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Embedding(13, 6), nn.BatchNorm1d(6), nn.Linear(6, 9), nn.Linear(6, 13, bias=False)
    )
    with torch.no_grad():
        model[1].running_mean.normal_()
    if tied:
        model[3].weight = model[0].weight
    return model


def save_without_end(said: Connection, folder: Path, seed: int, scratch: Path) -> None:
    """Save one model after another into the folder, from tiles on disk; say each one's seed."""
    home = memtile.DiskHome(scratch)
    said.send(seed)
    while True:
        seed += 1
        model = memtile.tile(net(seed), out_splits=3, in_splits=2, home=home)
        memtile.save_checkpoint(model, folder, max_shard_bytes=(100, 300, 10**9)[seed % 3])
        said.send(seed)
