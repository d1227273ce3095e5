"""Distributed checkpoints with dense names: saved under one world size and grid, loaded by another.

Source: `torch.distributed.checkpoint` (DCP) writes and reads. Added here: the names of the untiled
model (`dense_views`), an optimizer's state (`optimizer_state`; `zero3_optimizer` under ZeRO-3), and
that a checkpoint appears whole or not at all. As in all of DCP's, there are pickles in it: load
only what you trust.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.optim import Optimizer

from memtile.checkpoints.exact_json import from_json
from memtile.checkpoints.steps import RECORD, new_step
from memtile.convert.model_tensors import tensors_of
from memtile.convert.run_record import (
    Json,
    Resumed,
    Scheduler,
    check_numbers,
    check_scheduler,
    run_record,
)
from memtile.convert.sharded import METADATA
from memtile.convert.streaming import check_finite as finite_or_refused
from memtile.convert.training import is_trained, newest_step
from memtile.engines.dcp_files import DcpState, read_alone, read_shards, write_shards
from memtile.engines.dense_views import DenseView, dense_view, local_pieces, unwrapped
from memtile.engines.optimizer_state import (
    KEY,
    OptimizerState,
    OptimizerStateLoader,
    outgoing_state,
)
from memtile.engines.ranks import Ranks
from memtile.engines.zero3_optimizer import PartitionedState
from memtile.engines.zero3_values import is_partitioned, write_masters
from memtile.errors import ArgumentError, CheckpointError, EngineError

_MODEL, _RECORD = "model", "memtile"


def save(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Any = None,  # torch's, or DeepSpeed's, which has no types
    scheduler: Scheduler | None = None,
    *,
    step: int,
    position: object = None,
    extra: object = None,
    keep: int = 1,
    check_finite: bool = True,
    process_group: dist.ProcessGroup | None = None,
) -> Path:
    """`memtile.save_training` of any model in this format; all ranks call it.

    Each rank writes the pieces that it holds; what several hold is written once. The optimizer may
    be left out. Call it directly for a model that is not sharded, but will be when it resumes.
    """
    ranks, model = Ranks(process_group), unwrapped(model)
    ranks.check_same("the folder and step", f"{folder}, {step}")
    given = {"step": step, "position": position, "extra": extra}

    def outgoing() -> DcpState:
        check_numbers(step, keep)
        state = _outgoing(model, optimizer, scheduler, given)
        if check_finite:
            _check_finite(model, state)
        return state

    state = ranks.each(outgoing)
    with _whole(ranks, Path(folder), step, keep) as (partial, target):
        write_shards(ranks, state, partial)
    return target


@torch.no_grad()
def load(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Any = None,  # torch's, or DeepSpeed's, which has no types
    scheduler: Scheduler | None = None,
    *,
    process_group: dist.ProcessGroup | None = None,
) -> Resumed:
    """`memtile.resume_training` for a checkpoint of this format; all ranks call it.

    Each rank reads the pieces that it holds, after names and shapes were checked. Without an
    optimizer its state is left out. Frozen parameters may be in its groups or not.
    """
    ranks, model = Ranks(process_group), unwrapped(model)
    ranks.check_same("the folder", folder)
    saved = ranks.first(lambda: newest_step(Path(folder)))
    metadata, record = ranks.each(lambda: _opened(saved.path))
    scheduled = ranks.each(lambda: _scheduled(record, scheduler, saved.path))
    wanted = ranks.each(lambda: _wanted(model, metadata, saved.path))
    state: DcpState = {_MODEL: wanted}
    incoming = None
    if optimizer is not None:
        found = ranks.each(lambda: _incoming(record, metadata, model, optimizer, saved.path))
        incoming, state[KEY] = found, found.state
    read_shards(ranks, state, saved.path)
    ranks.each(lambda: write_masters(model))
    if incoming is not None:
        incoming.take()
    if scheduler is not None:
        scheduler.load_state_dict(scheduled)
    return Resumed(
        record["step"], from_json(record["position"]), from_json(record["extra"]), saved.path
    )


def _outgoing(
    model: nn.Module, optimizer: object, scheduler: Scheduler | None, given: Mapping[str, Any]
) -> DcpState:
    state: DcpState = {_MODEL: dense_view(model)}
    record = run_record(given, scheduler)
    if optimizer is not None:
        state[KEY], record[KEY] = outgoing_state(_state_of(model, optimizer))
    return {**state, _RECORD: json.dumps(record, allow_nan=False)}


def _check_finite(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Refuse trained weights and moments with a NaN or an infinity among what this rank holds."""
    tensors: dict[str, Any] = {
        wanted.names[0]: state[_MODEL][wanted.names[0]]
        for wanted in tensors_of(model)
        if is_trained(wanted.dense)
    }
    for name, kept in state.get(KEY, {"state": {}})["state"].items():
        tensors |= {f"{key}/{name}": value for key, value in kept.items()}
    for name, value in tensors.items():
        if isinstance(value, DenseView):
            held = list(value._pieces.values())
        else:
            held = [piece.values for piece in local_pieces(value)] if torch.is_tensor(value) else []
        for values in held:
            finite_or_refused(name, values)


@contextmanager
def _whole(ranks: Ranks, folder: Path, step: int, keep: int) -> Iterator[tuple[Path, Path]]:
    """A folder to write into, and what it is called once every rank has written."""
    with ExitStack() as stack:
        partial, target = ranks.first(
            lambda: stack.enter_context(new_step(folder, step, keep, METADATA))
        )

        def check_seen() -> None:
            if not partial.is_dir():
                raise EngineError(
                    f"{partial.parent} is not the same folder on each rank: give one on a "
                    "filesystem that all of them see"
                )

        ranks.each(check_seen)
        yield partial, target
        ranks.first(stack.close)


def _opened(place: Path) -> tuple[Metadata, Json]:
    """What a checkpoint says of itself."""
    alone: DcpState = {_RECORD: ""}
    try:
        metadata = FileSystemReader(place).read_metadata()
        read_alone(alone, place)
        record: Json = json.loads(alone[_RECORD])
    except (Exception, CheckpointException) as error:
        if (place / RECORD).is_file():
            raise CheckpointError(
                f"{place} was saved of a model that was not sharded, and this one is: resume there "
                "with an unsharded model, or take the weights alone with "
                f"memtile.load_checkpoint(model, {str(place)!r})"
            ) from error
        raise CheckpointError(
            f"{place} is no distributed checkpoint that memtile.save_training wrote, or not all of "
            f"it was copied ({type(error).__name__}); take another copy"
        ) from error
    return metadata, record


def _scheduled(record: Json, scheduler: Scheduler | None, place: Path) -> Json:
    """The state that was saved of the scheduler; CheckpointError where none was, of this class.

    Records had no field for it at first: runs of `memtile finetune` saved it as `extra`.
    """
    saved = record.get("scheduler")
    if scheduler is not None and "scheduler" not in record:
        extra: Json | None = from_json(record["extra"])
        if isinstance(extra, dict) and extra.keys() == scheduler.state_dict().keys():
            return extra
    check_scheduler(saved, scheduler, place)
    state: Json = from_json(saved["state"]) if saved else {}
    return state


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
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # DeepSpeed's, under ZeRO-3
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
    incoming = OptimizerStateLoader(record[KEY], metadata, model, kept_by, place)
    if isinstance(kept_by, PartitionedState):
        numbers = incoming.numbers()
        read_alone({KEY: {"state": numbers}}, place)
        kept_by.check_numbers(numbers)
    return incoming
