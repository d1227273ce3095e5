"""Distributed checkpoints with dense names: saved under one world size and grid, loaded by another.

Source: `torch.distributed.checkpoint` (DCP) writes and reads. Done here: the names of the untiled
model (`dense_views`), an optimizer's state (`optimizer_views`; `zero3_state` under ZeRO-3), and
that a checkpoint is whole or not there. The format has pickles in it, as DCP's always has: load
only what you trust.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.optim import Optimizer

from memtile.checkpoints.exact_json import from_json, to_json
from memtile.checkpoints.steps import SavedStep, new_step, saved_steps
from memtile.convert.training import Resumed, check_numbers
from memtile.engines.dcp_files import read_alone, read_shards, write_shards
from memtile.engines.dense_views import DenseView, dense_view, unwrapped
from memtile.engines.optimizer_state import (
    KEY,
    OptimizerState,
    OptimizerStateLoader,
    outgoing_state,
)
from memtile.engines.ranks import Ranks
from memtile.engines.zero3_optimizer import PartitionedState, is_of_zero3
from memtile.engines.zero3_values import is_partitioned, write_masters
from memtile.errors import ArgumentError, CheckpointError, EngineError

__all__ = ["dense_view", "load", "save"]

METADATA: Final = ".metadata"
"""The file by which DCP knows a checkpoint; it is written last."""

_MODEL, _RECORD = "model", "memtile"

Json = dict[str, Any]  # of the record: whatever JSON it has


def save(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Any = None,  # torch's, or DeepSpeed's, which has no types
    *,
    step: int,
    position: object = None,
    extra: object = None,
    keep: int = 1,
    process_group: dist.ProcessGroup | None = None,
) -> Path:
    """Save a model and its optimizer's state as a folder of its own in `folder`; all ranks call it.

    Each rank writes the pieces that it holds, and what several hold is written once. The
    checkpoints before stay whole until the new one is on the disk: whichever rank is killed at any
    moment, the folder holds a whole one.

    Args:
        folder: of all checkpoints of the run, the same on each rank, on a filesystem that all of
            them see; made where it is missing.
        model: tiled or not, over ranks or not: as FSDP2 and ZeRO-3 shard it. Of ZeRO-3's masters
            the float32 values are saved, where the model itself has 16 bits.
        optimizer: torch's, over the model or some of it; under ZeRO-3 `engine.optimizer`.
        step: how many steps are done. A step that is there is replaced; a newer one is refused.
        position: where in the data the run is: numbers, texts, lists, dictionaries.
        extra: anything else of this kind, `scheduler.state_dict()` say.
        keep: how many of the newest checkpoints stay.
        process_group: None: all ranks.

    Returns:
        The checkpoint's folder. torch's own `dcp.load` reads it: the model under "model", with the
        names of the untiled one, and the optimizer under "optimizer".

    Raises:
        ArgumentError: `step` or `keep` is no such number, or the optimizer none.
        OptimizerError: there is no dense form of what the optimizer keeps.
        CannotTileError: there is none of a weight.
        CheckpointError: something is neither a tensor nor such a value.
        CheckpointWriteError: it could not be written; what was there is as it was.
        EngineError: a rank is gone, or does not see the folder.

        Each of them on every rank.
    """
    ranks, model = Ranks(process_group), unwrapped(model)
    ranks.check_same("the folder and step", f"{folder}, {step}")
    given = {"step": step, "position": position, "extra": extra}
    state = ranks.each(lambda: _outgoing(model, optimizer, given, keep))
    with _whole(ranks, Path(folder), step, keep) as (partial, target):
        write_shards(ranks, state, partial)
    return target


@torch.no_grad()
def load(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Any = None,  # torch's, or DeepSpeed's, which has no types
    *,
    process_group: dist.ProcessGroup | None = None,
) -> Resumed:
    """Take over the newest checkpoint that `save` wrote, in place; all ranks call it.

    World size, grid and engine may be others than those that it was saved under. Each rank reads
    the pieces that it holds. Names and shapes are checked before anything is changed. The saved
    options of the optimizer's groups (`lr` too) replace its own, and gradients are dropped.

    Args:
        folder: given to `save`.
        model: tiled or not, over ranks or not.
        optimizer: of the same class, with the same groups; None: its state is left out. Frozen
            parameters may be in its groups or not.
        process_group: None: all ranks.

    Raises:
        CheckpointError: there is none, it is damaged, or it is of another model or optimizer.
        OptimizerError: the optimizer is not of this model, or ZeRO-3 cannot keep the state.
        EngineError: a rank is gone.

        Each of them on every rank.
    """
    ranks, model = Ranks(process_group), unwrapped(model)
    ranks.check_same("the folder", folder)
    saved = ranks.first(lambda: _newest(Path(folder)))
    metadata, record = ranks.each(lambda: _opened(saved.path))
    wanted = ranks.each(lambda: _wanted(model, metadata, saved.path))
    state: dict[str, Any] = {_MODEL: wanted}  # what DCP takes: tensors, dictionaries, anything
    incoming = None
    if optimizer is not None:
        found = ranks.each(lambda: _incoming(record, metadata, model, optimizer, saved.path))
        incoming, state[KEY] = found, found.state
    read_shards(ranks, state, saved.path)
    ranks.each(lambda: write_masters(model))
    if incoming is not None:
        incoming.take()
    return Resumed(
        record["step"], from_json(record["position"]), from_json(record["extra"]), saved.path
    )


def _outgoing(
    model: nn.Module, optimizer: object, given: Mapping[str, Any], keep: int
) -> dict[str, Any]:  # what DCP takes
    check_numbers(given["step"], keep)
    state: dict[str, Any] = {_MODEL: dense_view(model)}
    record: Json = {name: to_json(value, name) for name, value in given.items()}
    if optimizer is not None:
        state[KEY], record[KEY] = outgoing_state(_state_of(model, optimizer))
    return {**state, _RECORD: json.dumps(record, allow_nan=False)}


@contextmanager
def _whole(ranks: Ranks, folder: Path, step: int, keep: int) -> Iterator[tuple[Path, Path]]:
    """A folder to write into, and what it is called once every rank has written."""
    with ExitStack() as stack:
        partial, target = ranks.first(
            lambda: stack.enter_context(new_step(folder, step, keep, METADATA))
        )
        ranks.each(lambda: _check_seen(partial))
        yield partial, target
        ranks.first(stack.close)


def _check_seen(partial: Path) -> None:
    if not partial.is_dir():
        raise EngineError(
            f"{partial.parent} is not the same folder on each rank: give one on a filesystem that "
            "all of them see"
        )


def _newest(folder: Path) -> SavedStep:
    found = saved_steps(folder)
    if not found:
        raise CheckpointError(
            f"{folder} holds no checkpoint; give the folder that save was given, or start anew"
        )
    return found[-1]


def _opened(place: Path) -> tuple[Metadata, Json]:
    """What a checkpoint says of itself."""
    alone: dict[str, Any] = {_RECORD: ""}
    try:
        metadata = FileSystemReader(place).read_metadata()
        read_alone(alone, place)
        record: Json = json.loads(alone[_RECORD])
    except (Exception, CheckpointException) as error:
        raise CheckpointError(
            f"{place} is no distributed checkpoint that memtile's save wrote, or not all of it was "
            f"copied ({type(error).__name__}); take another copy, or memtile.resume_training for "
            "what memtile.save_training wrote"
        ) from error
    return metadata, record


def _wanted(model: nn.Module, metadata: Metadata, place: Path) -> dict[str, Tensor]:
    """The model's tensors, once the checkpoint is found to have the same."""
    wanted = dense_view(model)
    for view in wanted.values():
        if isinstance(view, DenseView):
            view.takes = True  # masters are written afterwards
    stored = {
        path[1]: metadata.state_dict_metadata[flat]
        for flat, path in (metadata.planner_data or {}).items()
        if path[0] == _MODEL
    }
    for name in sorted(stored.keys() ^ wanted.keys()):
        whose = "the checkpoint" if name in stored else f"this {type(model).__name__}"
        raise CheckpointError(
            f"only {whose} has {name!r}: {place} is of another model; make the model as it was "
            "made for the run that was saved"
        )
    for name, tensor in wanted.items():
        entry = stored[name]
        if not isinstance(entry, TensorStorageMetadata) or entry.size != tensor.shape:
            shape = tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else "no tensor"
            raise CheckpointError(
                f"{name} is {shape} in {place}, and {tuple(tensor.shape)} in this "
                f"{type(model).__name__}: make the model as it was made for the run that was saved"
            )
    return wanted


def _state_of(model: nn.Module, optimizer: object) -> OptimizerState:
    if is_of_zero3(optimizer):
        return PartitionedState(model, optimizer)
    if not isinstance(optimizer, Optimizer):
        raise ArgumentError(
            f"the optimizer is a {type(optimizer).__name__}; it must be a torch.optim.Optimizer, "
            "or engine.optimizer under DeepSpeed's ZeRO-3: under its other stages save the state "
            "with engine.save_checkpoint"
        )
    if any(map(is_partitioned, model.parameters())):
        raise ArgumentError(
            f"ZeRO-3 has the model's parameters, and the optimizer is a {type(optimizer).__name__} "
            "of which DeepSpeed has taken them: give engine.optimizer"
        )
    return OptimizerState(model, optimizer)


def _incoming(
    record: Json, metadata: Metadata, model: nn.Module, optimizer: object, place: Path
) -> OptimizerStateLoader:
    kept_by = _state_of(model, optimizer)
    if KEY not in record:
        raise CheckpointError(
            f"{place} was saved without an optimizer: load the model only, and start the optimizer "
            "anew"
        )
    incoming = OptimizerStateLoader(record[KEY], metadata, model, kept_by)
    if isinstance(kept_by, PartitionedState):
        numbers = incoming.numbers()
        read_alone({KEY: {"state": numbers}}, place)
        kept_by.check_numbers(numbers)
    return incoming
