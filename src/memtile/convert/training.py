"""`save_training` and `resume_training`: a resumed run is the uninterrupted one, bit for bit."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from memtile.checkpoints import Checkpoint, Outgoing, write_checkpoint
from memtile.checkpoints.exact_json import from_json
from memtile.checkpoints.opening import as_path
from memtile.checkpoints.record import RandomState, read_record, write_record
from memtile.checkpoints.steps import SavedStep, leftovers, new_step, saved_steps
from memtile.convert.kinds import configs_beside
from memtile.convert.model_tensors import tensors_of
from memtile.convert.optimizer_file import IncomingState, optimizer_record
from memtile.convert.run_record import (
    Json,
    Resumed,
    Scheduler,
    check_numbers,
    check_scheduler,
    run_record,
)
from memtile.convert.saving import check_saveable, wait_for_writes
from memtile.convert.sharded import for_distributed, for_sharded
from memtile.convert.streaming import bring_in, finite, outgoing
from memtile.errors import ArgumentError, CheckpointError
from memtile.homes import trim_heap
from memtile.optim import DenseParameter

_WHOLE, _TRAINABLE = "model", "trainable"  # what the files of weights are called
_OPTIMIZER, _RANDOM = "optimizer", "random"


def save_training(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: Scheduler | None = None,
    *,
    step: int,
    position: object = None,
    extra: object = None,
    keep: int = 1,
    trainable_only: bool = False,
    check_finite: bool = True,
    process_group: dist.ProcessGroup | None = None,
) -> Path:
    """Save all that a run needs to go on bit for bit, as a folder of its own in `folder`.

    Saved are weights, persistent buffers, the optimizer's state, the scheduler, and the random
    state of Python, numpy and torch, a few MiB at a time. Older checkpoints are removed once the
    new one is complete: a process killed at any moment leaves a complete one.

    Not saved are gradients (so save between `step()` and the next backward), non-persistent
    buffers, and the state of what is not given, such as a GradScaler: put it into `extra`.

    A model that FSDP2 or ZeRO-3 has sharded is saved by all ranks: each calls this and writes its
    shards in the format of `torch.distributed.checkpoint`, without random states. ZeRO-3's masters
    are saved in float32 where the model has 16 bits.

    Args:
        folder: of all checkpoints of the run; made where it is missing. All ranks give the same,
            on a filesystem that they share.
        model: tiled or not, wherever its tiles live, sharded or not.
        optimizer: a `TileOptimizer` or any torch optimizer, over the model or some of it. Under
            ZeRO-3 `engine.optimizer`.
        scheduler: anything with a `state_dict` of numbers, texts, lists and dictionaries.
        step: how many steps are done. A checkpoint of this step is replaced; a newer one refused.
        position: where in the data the run is: any such value.
        extra: anything else to be given back: any such value.
        keep: how many of the newest checkpoints stay.
        trainable_only: leave out frozen weights, such as the base of an adapter.
        check_finite: refuse trained weights, moments and masters with a NaN or an infinity.
        process_group: of a sharded model; None: all ranks.

    Returns:
        The checkpoint's folder, `step-00000010` say.

    Raises:
        ArgumentError: `folder` is no path, `step` or `keep` is no such number; `trainable_only` is
            given for a sharded model, or a process group for another.
        OptimizerError: a step is under way, or the optimizer is not of this model.
        CannotTileError: there is no dense form of a weight.
        NotFiniteError: with `check_finite`, a value is not finite.
        CheckpointError: something is neither a tensor nor such a value.
        CheckpointWriteError: it could not be written, another run writes there, or a newer step is
            there. After any error older checkpoints are unchanged.
        EngineError: a rank is gone. Of a sharded model, whatever is raised is raised on every rank.

    Examples:
        >>> folder = memtile.save_training("run", model, optimizer, step=100, position=100)
    """
    check_numbers(step, keep)
    place = as_path("folder", folder)
    given = {"step": step, "position": position, "extra": extra}
    sharded = for_sharded(model, process_group=process_group)
    if sharded is not None:
        _refuse_trainable_only(trainable_only)
        options = {"keep": keep, "check_finite": check_finite, "process_group": process_group}
        saved: Path = sharded.save_training(place, model, optimizer, scheduler, **given, **options)
        return saved
    state, tensors = optimizer_record(model, optimizer)
    tensors = [finite(tensor) for tensor in tensors] if check_finite else tensors
    random = RandomState.now()
    record = {
        "memtile": str(vars(sys.modules["memtile"])["__version__"]),  # which imports this file
        **run_record(given, scheduler),
        "trainable_only": trainable_only,
        "optimizer": state,
        "random": random.to_json(),
    }
    if not trainable_only:
        check_saveable(model)
    weights = _weights(model, trainable_only, check_finite)
    wait_for_writes(model)
    with new_step(place, step, keep) as (partial, target):
        stem, configs = (_TRAINABLE, {}) if trainable_only else (_WHOLE, configs_beside(model))
        write_checkpoint(partial, weights, stem=stem, beside=configs)
        trim_heap()
        write_checkpoint(partial, tensors, max_shard_bytes=sys.maxsize, stem=_OPTIMIZER)
        write_checkpoint(partial, random.outgoing(), stem=_RANDOM)
        write_record(partial, record)
    return target


def has_training(folder: str | os.PathLike[str]) -> bool:
    """Whether there is a checkpoint that `resume_training` would take; it is not opened."""
    return bool(saved_steps(as_path("folder", folder)))


@torch.no_grad()
def resume_training(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: Scheduler | None = None,
    *,
    process_group: dist.ProcessGroup | None = None,
) -> Resumed:
    """Take over the newest checkpoint that `save_training` wrote: everything in place.

    All of it is verified before anything is changed. Grid and homes may differ from those saved,
    and a `TileOptimizer` takes over from the plain optimizer of its class, and the reverse. The
    saved options of the groups (`lr` too) replace the optimizer's own. Gradients are dropped. Go
    on in the data at `position`.

    What was saved of a model that FSDP2 or ZeRO-3 had sharded may be loaded over another number of
    ranks, under the other engine, or into a model that is not sharded; all ranks call this. That
    format has pickles in it: load only what you trust.

    Args:
        folder: given to `save_training`.
        model: made as it was for the run that was saved.
        optimizer: of the same class, with the same groups. Under ZeRO-3 `engine.optimizer`.
        scheduler: of the same class; None where none was saved.
        process_group: of a sharded model; None: all ranks.

    Returns:
        The step, and what was saved with it.

    Raises:
        ArgumentError: `folder` is no path, `model` no module, or `optimizer` no optimizer.
        CheckpointError: there is none, it is damaged, or it is of another model, optimizer or
            scheduler. Nothing was changed, unless the second reading failed.
        HomeFullError: a home has no room for the optimizer's state; nothing was changed.
        HomeIOError: a home could not be written to: resume again.
        EngineError: a rank is gone. Of a sharded model, whatever is raised is raised on every rank.

    Examples:
        >>> folder = memtile.save_training("run", model, optimizer, step=100, position=100)
        >>> memtile.resume_training("run", model, optimizer).step
        100
    """
    place = as_path("folder", folder)
    sharded = for_sharded(model, process_group=process_group) or for_distributed(place)
    if sharded is not None:
        found: Resumed = sharded.resume_training(
            place, model, optimizer, scheduler, process_group=process_group
        )
        return found
    _check_made(model, optimizer)
    saved = newest_step(place)
    record, weights, tensors, random = _opened(saved)
    held = _held_tensors(model, record["trainable_only"])
    _check_weights(weights, held, model)
    check_scheduler(record["scheduler"], scheduler, saved.path)
    state = IncomingState(record["optimizer"], tensors, model, optimizer)
    wait_for_writes(model)
    state.take()
    for name, dense in held.items():
        bring_in(dense, weights[name])
        trim_heap()
    if scheduler is not None:
        scheduler.load_state_dict(from_json(record["scheduler"]["state"]))
    resumed = Resumed(
        saved.step, from_json(record["position"]), from_json(record["extra"]), saved.path
    )
    random.restore()
    return resumed


def _check_made(model: object, optimizer: object) -> None:
    if not (isinstance(model, nn.Module) and isinstance(optimizer, Optimizer)):
        raise ArgumentError(
            f"resume_training(folder, model, optimizer) got a {type(model).__name__} and a "
            f"{type(optimizer).__name__}; give the model, and an optimizer that was made for it"
        )


def _refuse_trainable_only(trainable_only: bool) -> None:
    if trainable_only:
        raise ArgumentError(
            "trainable_only=True with a model that is sharded over ranks, of which each saves all "
            "that it holds: leave it out"
        )


def _weights(model: nn.Module, trainable_only: bool, check_finite: bool) -> list[Outgoing]:
    """The tensors to save; with `check_finite`, trained ones must be finite."""
    tensors = []
    for name, dense in _held_tensors(model, trainable_only).items():
        tensor = outgoing(dense, name)
        tensors.append(finite(tensor) if check_finite and is_trained(dense) else tensor)
    return tensors


def _held_tensors(model: nn.Module, trainable_only: bool) -> dict[str, DenseParameter]:
    """What a checkpoint has of a model, by name: dense parameters, and persistent buffers."""
    held = {}
    for needed in tensors_of(model):
        first: Tensor = needed.dense.parts[0].parameter  # or a buffer
        frozen = isinstance(first, nn.Parameter) and not is_trained(needed.dense)
        if not (trainable_only and frozen):
            held[needed.names[0]] = needed.dense
    return held


def is_trained(dense: DenseParameter) -> bool:
    """Whether any part of a dense tensor is trained."""
    return any(part.parameter.requires_grad for part in dense.parts)


def newest_step(folder: Path) -> SavedStep:
    """The newest checkpoint of a folder."""
    found = saved_steps(folder)
    if found:
        return found[-1]
    partial = leftovers(folder)
    if partial:
        raise CheckpointError(
            f"{folder} holds {partial[0].name}, half-written, and no checkpoint: the run was "
            "killed while it saved its first one; start it anew"
        )
    raise CheckpointError(
        f"{folder} holds no training checkpoint; give the folder that save_training was given, or "
        "start anew (memtile.convert.has_training(folder) tells which)"
    )


def _opened(saved: SavedStep) -> tuple[Json, Checkpoint, Checkpoint, RandomState]:
    """Everything of a checkpoint, verified."""
    try:
        record = read_record(saved.path)
        stem = _TRAINABLE if record["trainable_only"] else _WHOLE
        weights = Checkpoint.open(saved.path, stem)
        tensors = Checkpoint.open(saved.path, _OPTIMIZER)
        random = Checkpoint.open(saved.path, _RANDOM)
        for each in (weights, tensors, random):
            each.check_sums()
        return record, weights, tensors, RandomState.read(record["random"], random)
    except CheckpointError as error:
        older = saved_steps(saved.path.parent)[:-1]
        if not older:
            raise
        raise CheckpointError(
            f"{error}; to resume from {older[-1].path.name}, which is older, remove {saved.path}"
        ) from error


def _check_weights(
    weights: Checkpoint, held: Mapping[str, DenseParameter], model: nn.Module
) -> None:
    for name in sorted(weights.keys() ^ held.keys()):
        whose = "the checkpoint" if name in weights else f"this {type(model).__name__}"
        raise CheckpointError(
            f"only {whose} has {name!r}: {weights.path} is of another model, or other weights were "
            "frozen when it was saved; make the model as it was made for that run"
        )
    for name, dense in held.items():
        ours = dense.shape, dense.parts[0].parameter.dtype
        if ours != (weights[name].shape, weights[name].dtype):
            raise CheckpointError(
                f"{name} is {tuple(weights[name].shape)} {weights[name].dtype} in {weights.path}, "
                f"and {tuple(ours[0])} {ours[1]} in this {type(model).__name__}: make the model as "
                "it was made for the run that was saved"
            )
