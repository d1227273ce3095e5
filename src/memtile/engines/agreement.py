"""Whether all ranks are about to do the same, asked before one waits for the others."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from memtile.errors import EngineError
from memtile.layers import whole_shape


def check_process_group() -> None:
    """Refuse to go on in a process that has no others to talk to.

    Raises:
        EngineError: there is no process group.
    """
    if not dist.is_initialized():
        raise EngineError(
            "there is no process group: start the script with torchrun, and call "
            "torch.distributed.init_process_group() first"
        )


def check_agreement(
    model: nn.Module, options: object, groups: Sequence[ProcessGroup | None] = (None,)
) -> None:
    """Compare models and options over ranks: those that differ would wait for each other forever.

    Args:
        model: its parameters' names, shapes, dtypes and requires_grad are compared.
        options: whatever else must be the same, by its `repr`.
        groups: which together reach every rank; None: all ranks.

    Raises:
        EngineError: on every rank.
    """
    known = {dist.get_rank(): _digest(model, options)}
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


def _digest(model: nn.Module, options: object) -> str:
    parameters = [
        (name, whole_shape(parameter), str(parameter.dtype), parameter.requires_grad)
        for name, parameter in model.named_parameters()
    ]
    return hashlib.sha256(repr((parameters, options)).encode()).hexdigest()
