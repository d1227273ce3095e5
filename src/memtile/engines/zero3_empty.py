"""A model without values into ZeRO-3's partitions: no rank ever holds more than one parameter."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from memtile.engines.agreement import check_process_group
from memtile.engines.dense_files import found_for, read_into_shards
from memtile.engines.ranks import Ranks
from memtile.engines.zero3_config import check_installed
from memtile.errors import ArgumentError

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def from_checkpoint(
    model: Model,
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    *,
    strict: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> Model:
    """Partition a model that is on the meta device, each rank reading its own parts from files.

    Call it on each rank before `deepspeed.initialize`, which is to get the same config.

    Args:
        model: tiled, its parameters on the meta device (`memtile.empty_model`).
        path: of a dense checkpoint, as `memtile.load_checkpoint` takes it, seen by all ranks.
        config: as `memtile.engines.deepspeed_zero3.config` gives it.
        strict: refuse a checkpoint that holds more than the model has; False: warn of it.
        process_group: None: all ranks.

    Returns:
        The model, with other parameters in it.

    Raises:
        ArgumentError: it has values already.
        CheckpointError: there is no checkpoint, it is damaged, or not of this model.
        EngineError: DeepSpeed is missing, there is no process group, or a rank is gone.

        Each of them on every rank.
    """
    check_installed()
    check_process_group()
    ranks = Ranks(process_group)
    findings = ranks.each(lambda: found_for(_checked(model), path, ranks.number == 0, strict))
    partitions = _partitioned(model, config)
    matches = []
    for match in findings.matches:
        parts = [
            replace(part, parameter=partitions.get(id(part.parameter), part.parameter))
            for part in match.dense.parts
        ]
        matches.append(replace(match, dense=replace(match.dense, parts=tuple(parts))))
    ranks.each(lambda: read_into_shards(matches))
    return model


def _checked(model: Model) -> Model:
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            raise ArgumentError(
                f"{name} has values already, and from_checkpoint gives them: make the model with "
                "memtile.empty_model(lambda: …)"
            )
    return model


def _partitioned(model: nn.Module, config: Mapping[str, Any]) -> dict[int, nn.Parameter]:
    """Put a partitioned parameter in each one's place; gives them by the ids of the old ones."""
    from deepspeed import zero

    partitions: dict[int, nn.Parameter] = {}
    kept = list(model.parameters())  # alive, so that an id stays one parameter's
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in partitions:
                alone = _Alone(parameter)
                zero.Init(module=alone, config_dict_or_path=dict(config))
                partitions[id(parameter)] = alone.parameter
            module._parameters[name] = partitions[id(parameter)]
    del kept
    return partitions


class _Alone(nn.Module):
    """A module with one parameter, like another that has no values."""

    def __init__(self, like: nn.Parameter) -> None:
        super().__init__()
        values = torch.zeros(like.shape, dtype=like.dtype)
        self.parameter = nn.Parameter(values, like.requires_grad)
        self.parameter.__dict__.update(like.__dict__)
