"""Reads and writes the values of parameters that DeepSpeed's ZeRO-3 has partitioned.

Such a parameter is empty; its shape, its size and what gathers it are attributes `ds_…`. DeepSpeed
is not imported before one is met.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from memtile.errors import CheckpointError, EngineError
from memtile.layers import register_gatherer

_OPEN = "_ds_z3_gathered_param_context_depth"  # DeepSpeed's count of contexts around a parameter


def register_zero3_gatherer() -> None:
    """Let memtile's layers read and write partitioned tiles."""
    register_gatherer(_gather, _whole_shape, library="deepspeed")


def is_partitioned(tensor: Tensor) -> bool:
    """Whether ZeRO-3 has the tensor, gathered at the moment or not."""
    return "ds_id" in getattr(tensor, "__dict__", ())


def whole_numel(tensor: Tensor) -> int:
    """Elements of a parameter, also while it is partitioned."""
    return int(getattr(tensor, "ds_numel", tensor.numel()))


class FlatSpan(NamedTuple):
    """Where this rank's part of a parameter lies in the flat tensors that DeepSpeed steps."""

    group: int
    start: int
    numel: int

    def of(self, flat: Tensor) -> Tensor:
        """The part, sharing memory with the group's flat tensor."""
        return flat.detach()[self.start : self.start + self.numel]


def flat_span(optimizer: Any, parameter: Any) -> FlatSpan:  # DeepSpeed's, without types
    """The span of a parameter that ZeRO-3's optimizer steps."""
    return FlatSpan(*optimizer.grad_position[optimizer.get_param_id(parameter)])


def master_of(parameter: Any) -> Tensor | None:  # an nn.Parameter, with DeepSpeed's attributes
    """This rank's part of the master that the optimizer steps; None where none is in memory."""
    optimizer = getattr(parameter, "_z3_optimizer", None)
    if optimizer is None or not parameter.requires_grad:
        return None
    span = flat_span(optimizer, parameter)
    flat: Tensor = optimizer.fp32_partitioned_groups_flat[span.group]
    return span.of(flat) if flat.numel() else None


def flat_part(partitioned: Any) -> Tensor:  # with DeepSpeed's attributes
    """This rank's part of a partitioned tensor with its padding; of the master if there is one."""
    part: Any = partitioned.ds_tensor
    if part.numel() < part.ds_numel:
        raise CheckpointError(
            f"a {tuple(partitioned.ds_shape)} parameter is on NVMe: use DeepSpeed's own "
            "engine.save_checkpoint and engine.load_checkpoint"
        )
    master = master_of(partitioned)
    found: Tensor = part.detach() if master is None else master
    return found


def partition_like(parameter: Any, part: Tensor) -> Tensor:  # with DeepSpeed's attributes
    """A tensor that is partitioned like a parameter, and of which this rank holds this part."""
    found: Any = torch.empty(0, dtype=part.dtype)
    for name in ("ds_id", "ds_shape", "ds_numel", "ds_process_group"):
        setattr(found, name, getattr(parameter, name))
    found.ds_tensor = part
    found.ds_tensor.ds_numel = part.numel()
    whole: Tensor = found
    return whole


def write_masters(model: nn.Module) -> None:
    """Copy the optimizer's masters into partitions, or these into masters that are not in memory.

    What is gathered is freed.
    """
    for parameter in model.parameters():
        found: Any = parameter  # with DeepSpeed's attributes
        if is_partitioned(found) and hasattr(found, "_z3_optimizer"):
            from deepspeed.utils import safe_set_local_fp32_param

            master = master_of(found)
            if master is None:
                safe_set_local_fp32_param(found, found.ds_tensor.detach().float())
            else:
                found.ds_tensor.detach().copy_(master)
        if is_partitioned(found) and found.ds_status.name == "AVAILABLE":
            found.partition()


def _whole_shape(tensor: Tensor) -> tuple[int, ...] | None:
    return tuple(tensor.ds_shape) if is_partitioned(tensor) else None  # type: ignore[attr-defined]


@contextmanager
def _gather(parameters: Sequence[nn.Parameter], write: bool) -> Iterator[bool]:
    """Gather parameters; what rank 0 writes reaches all ranks, and the optimizer's masters."""
    mine = [parameter for parameter in parameters if is_partitioned(parameter)]
    held = [parameter for parameter in mine if getattr(parameter, _OPEN, 0)]
    if write and held:
        raise EngineError(
            "tiles are written inside deepspeed.zero.GatheredParameters of the same tiles, which "
            "would undo it: leave that context out, memtile gathers one tile after the other"
        )
    closed: list[Any] = [parameter for parameter in mine if parameter not in set(held)]
    if not closed:
        yield True
        return
    from deepspeed import zero

    if any(parameter.ds_status.name == "INFLIGHT" for parameter in closed):
        closed[0]._z3_optimizer.empty_partition_cache()  # after a forward that had no backward
    group = closed[0].ds_process_group
    with zero.GatheredParameters(closed, modifier_rank=0 if write else None):
        if not write:
            yield True
            return
        with _raising_on_all(group):
            yield dist.get_rank(group) == 0
    for parameter in closed:
        _write_master(parameter)


@contextmanager
def _raising_on_all(group: Any) -> Iterator[None]:  # DeepSpeed's groups are torch's, or its own
    """Raise on every rank when one fails: the others would wait for it at the next tile."""
    failed = torch.zeros(1, dtype=torch.int32)  # named: inside zero.Init the default is 16 bits
    try:
        yield
    except BaseException:
        failed.fill_(1)
        raise
    finally:
        from deepspeed.accelerator import get_accelerator

        failed = failed.to(get_accelerator().current_device_name())
        others = failed.clone()
        dist.all_reduce(others, group=group)
    if others.item():
        raise EngineError(
            "another rank could not write a tile, and its own error says why: each rank takes part "
            "with layers of the same shapes, and rank 0's must have values"
        )


def _write_master(parameter: Any) -> None:  # an nn.Parameter, with DeepSpeed's attributes
    """Write this rank's part into the optimizer's master, which the next step starts from.

    DeepSpeed's own setter of a whole one fails where the size cannot be divided by the ranks.
    """
    if not hasattr(parameter, "_z3_optimizer") or not parameter.requires_grad:
        return
    from deepspeed import zero
    from deepspeed.utils import safe_set_local_fp32_param

    with zero.GatheredParameters([parameter]):
        part = torch.zeros(parameter.ds_tensor.ds_numel, device=parameter.device)
        start = part.numel() * dist.get_rank(parameter.ds_process_group)
        mine = parameter.detach().flatten()[start : start + part.numel()]
        part[: mine.numel()].copy_(mine)
        safe_set_local_fp32_param(parameter, part)
