"""Ranks that are about to hold different models: told to all of them, before one waits."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from memtile.errors import EngineError
from memtile.layers import whole_shape


def check_agreement(
    model: nn.Module, options: object, groups: Sequence[ProcessGroup | None] = (None,)
) -> None:
    """Compare what is about to be sharded: ranks that differ would wait for each other forever.

    Args:
        model: its parameters' names, shapes and dtypes are compared.
        options: whatever else must be the same, by its `repr`.
        groups: which together reach every rank; None: all ranks.

    Raises:
        EngineError: on every rank.
    """
    shapes = [(name, whole_shape(p), str(p.dtype)) for name, p in model.named_parameters()]
    mine = hashlib.sha256(repr((shapes, options)).encode()).hexdigest()
    known = {dist.get_rank(): mine}
    for group in groups:
        heard: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(heard, known, group=group)
        known = {rank: digest for each in heard for rank, digest in each.items()}
    odd = sorted(rank for rank, digest in known.items() if digest != known[min(known)])
    if odd:
        raise EngineError(
            f"ranks {odd} have another model, other tiles or other arguments than rank "
            f"{min(known)}: make the same model with the same grids on each rank"
        )
