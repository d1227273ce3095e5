"""Which functions save and load a model that an engine has sharded over ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import nn

from memtile.checkpoints.steps import saved_steps
from memtile.errors import ArgumentError
from memtile.layers import is_shard

METADATA: Final = ".metadata"
"""The file by which torch's distributed checkpoints are known; it is written last."""


@dataclass(frozen=True)
class ShardedCheckpoints:
    """`memtile`'s functions of these names, for a sharded model; all ranks call them."""

    save_checkpoint: Callable[..., Any]  # of `memtile.engines.dense_files`
    load_checkpoint: Callable[..., Any]
    save_training: Callable[..., Any]  # of `memtile.engines.distributed_checkpoints`
    resume_training: Callable[..., Any]


_engines: list[Callable[[], ShardedCheckpoints]] = []


def register_sharded(functions: Callable[[], ShardedCheckpoints]) -> None:
    """Set what gives the functions for sharded models; it is called when a model is sharded."""
    _engines[:] = [functions]


def for_sharded(model: object, **only_sharded: object) -> ShardedCheckpoints | None:
    """The functions for a model that is sharded; None where this process has all of it."""
    if isinstance(model, nn.Module) and any(map(is_shard, model.parameters())):
        return _engines[0]()
    for name, value in only_sharded.items():
        if value is not None:
            raise ArgumentError(
                f"{name}=… is for a model that FSDP2 or ZeRO-3 has sharded over ranks; this "
                f"{type(model).__name__} is whole in each process: leave {name} out"
            )
    return None


def for_distributed(folder: Path) -> ShardedCheckpoints | None:
    """The functions for a folder whose newest checkpoint is torch's distributed one; or None."""
    found = saved_steps(folder)
    return _engines[0]() if found and (found[-1].path / METADATA).is_file() else None
