"""Tiles as shards of DeepSpeed's ZeRO-3: each is gathered for its use and freed after it.

Source: `deepspeed.initialize` with ZeRO stage 3 (arXiv 2104.07857), whose own tiled linear this one
replaces. `config` makes a config for tiles, `check` finds what is wrong with one of your own, and
`attach` does what no key of a config can.
"""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from memtile import ops
from memtile.engines.dense_files import found_for, read_into_shards
from memtile.engines.ranks import Ranks, check_process_group
from memtile.engines.release import release_in_backward
from memtile.engines.zero3_check import Finding, check
from memtile.engines.zero3_config import check_installed, config, tiles_of
from memtile.engines.zero3_logits import keep_deferred
from memtile.engines.zero3_values import is_partitioned
from memtile.errors import ArgumentError, EngineConfigWarning, EngineError
from memtile.transfer.iterations import in_backward

__all__ = ["Finding", "attach", "check", "config", "from_checkpoint"]

Engine = TypeVar("Engine")  # DeepSpeed's, which is untyped
_ATTACHED = "_memtile_attached"


def attach(engine: Engine, *, prefetch: int = 1) -> Engine:
    """Free tiles where DeepSpeed by itself would not; call it once, on each rank.

    In backward DeepSpeed frees a tile only where the layer's input requires grad; then it is freed
    after any input. Frozen tiles that a checkpoint recomputes are freed after their use, as those
    that train. What an evaluation leaves gathered is freed before the next forward.

    Args:
        engine: what `deepspeed.initialize` gave for a tiled model under ZeRO-3.
        prefetch: what `config` was made with.

    Returns:
        The engine.

    Raises:
        EngineError: it is no engine with ZeRO stage 3, is attached already, or DeepSpeed rounds its
            parts on a disk.
        ArgumentError: nothing of its model is tiled.

    Warns:
        EngineConfigWarning: what `check` finds in its config.
    """
    check_installed()
    model = getattr(engine, "module", engine)
    tiles = tiles_of(model) if isinstance(model, nn.Module) else []
    parameters = [parameter for tile in tiles for parameter in tile.parameters()]
    if not isinstance(model, nn.Module) or not all(map(is_partitioned, parameters)):
        raise EngineError(
            f"attach({type(engine).__name__}) takes the engine that deepspeed.initialize gives "
            "with ZeRO stage 3: "
            "engine, *_ = deepspeed.initialize(model=model, config=config(model), …)"
        )
    if hasattr(model, _ATTACHED):
        raise EngineError("the engine is attached already: call attach(engine) once")
    _read_once(model)
    setattr(model, _ATTACHED, True)
    for tile in tiles:
        if type(tile).forward is nn.Linear.forward and "forward" not in tile.__dict__:
            tile.forward = partial(_linear, tile)
        release_in_backward(tile)
    _free_recomputed(model, tiles)
    _free_leftovers(model, tiles)
    keep_deferred(model, getattr(getattr(engine, "optimizer", None), "optimizer", None))
    given = getattr(engine, "config", None)
    # DeepSpeed also takes none, and one in base64: these are not checked
    if isinstance(given, Mapping) or (isinstance(given, str) and Path(given).is_file()):
        for finding in check(given, model, prefetch=prefetch):
            warnings.warn(str(finding), EngineConfigWarning, stacklevel=2)
    return engine


def _read_once(model: nn.Module) -> None:
    """Read a tile from a disk once where it is the last of forward and the first of backward.

    DeepSpeed 0.19 reads ahead along both, and fails: "param … already assigned swap buffer". Parts
    that it rounds on the disk are refused: it takes bfloat16 on most CPUs.
    """
    found: dict[int, Any] = {}  # DeepSpeed's, without types
    for name, parameter in model.named_parameters():
        files = getattr(parameter, "nvme_swapper", None)
        if files is None:
            continue
        if files.dtype != parameter.dtype:
            raise EngineError(
                f"parts of {name}, of {parameter.dtype}, are on the disk as {files.dtype}: "
                "DeepSpeed takes that for the dtype of what is handed to deepspeed.initialize on "
                "this device; before it, partition the model by the same config: "
                "deepspeed.zero.Init(module=model, config_dict_or_path=config(model, …))"
            )
        found[id(files)] = files
    for files in found.values():
        files.swap_in = partial(_swap_in_each_once, files.swap_in)


def _swap_in_each_once(
    read: Callable[..., None],
    params: Sequence[nn.Parameter],
    *arguments: Any,  # DeepSpeed's own
    **options: Any,
) -> None:
    read(list(dict.fromkeys(params)), *arguments, **options)


def _linear(tile: Any, input: Tensor) -> Tensor:  # an nn.Linear, with a bias or None
    """(…, out) of (…, in), for whose backward no weight is saved.

    A checkpoint would keep what it recomputes: the gathered weights of all tiles in it.
    """
    cast = ops.autocast_dtype(input)
    if ops.transformed() or (cast is None and input.dtype != tile.weight.dtype):
        return nn.functional.linear(input, tile.weight, tile.bias)
    x = input if cast is None else input.to(cast)
    return ops.gathered_linear(x, tile.weight, None if tile.bias is None else tile.bias.to(x.dtype))


def _free_recomputed(model: nn.Module, tiles: list[nn.Module]) -> None:
    """Free frozen tiles after their recomputation: they are gathered again for their backward.

    DeepSpeed 0.19 keeps all of a checkpoint until the module whose backward began it is done.
    """
    modules: dict[int, Any] = {getattr(each, "ds_id", -1): each for each in model.modules()}

    def let_go(tile: nn.Module, *_: object) -> None:
        parameters: Any = tile.parameters() if in_backward() else ()  # with DeepSpeed's attributes
        for parameter in parameters:
            for number in list(parameter.ds_active_sub_modules):
                kept: Any = getattr(modules.get(number), "ds_recompute_parameters", ())
                if parameter in kept:
                    kept.discard(parameter)
                    parameter.ds_active_sub_modules.discard(number)

    for tile in tiles:
        tile.register_forward_pre_hook(let_go)  # after DeepSpeed's


def _free_leftovers(model: Any, tiles: list[nn.Module]) -> None:  # with DeepSpeed's attributes
    """Free tiles that an evaluation, which has no backward, leaves gathered or being gathered.

    DeepSpeed counts live elements from zero in each forward, so they would be extra: 3 tiles in
    place of 2. And it refuses to read what is being gathered.
    """
    parameters: list[Any] = [parameter for tile in tiles for parameter in tile.parameters()]
    in_flight = model.ds_inflight_param_registry

    @torch.no_grad()
    def free(*_: object) -> None:
        for parameter in parameters:
            if parameter in in_flight:
                in_flight.pop(parameter).wait()
            gathered = parameter.ds_status.name == "AVAILABLE"
            if gathered and not parameter.ds_persist and not parameter.ds_active_sub_modules:
                parameter.partition()

    def free_unless_trained(*_: object) -> None:
        if not torch.is_grad_enabled():
            free()

    model.register_forward_pre_hook(free, prepend=True)
    model.register_forward_hook(free_unless_trained)


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
    """Partition a model that is on the meta device; each rank reads its own parts from files.

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
    ranks.each(lambda: _check_empty(model))
    findings = ranks.each(lambda: found_for(model, path, ranks.number == 0, strict))
    partitions = _partitioned(model, config)
    matches = []
    for match in findings.matches:
        parts = [
            replace(part, parameter=partitions.get(part.parameter, part.parameter))
            for part in match.dense.parts
        ]
        matches.append(replace(match, dense=replace(match.dense, parts=tuple(parts))))
    ranks.each(lambda: read_into_shards(matches))
    findings.loaded()
    return model


def _check_empty(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            raise ArgumentError(
                f"{name} has values already, and from_checkpoint gives them: make the model with "
                "memtile.empty_model(lambda: …)"
            )


def _partitioned(model: nn.Module, config: Mapping[str, Any]) -> dict[Tensor, nn.Parameter]:
    """Replace each parameter by a partitioned one; gives the new ones by the old."""
    from deepspeed import zero

    partitions: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if parameter not in partitions:
                values = torch.zeros(parameter.shape, dtype=parameter.dtype)
                alone = nn.Module()
                alone.parameter = nn.Parameter(values, parameter.requires_grad)
                alone.parameter.__dict__.update(parameter.__dict__)
                zero.Init(module=alone, config_dict_or_path=dict(config))
                partitions[parameter] = alone.parameter
            module._parameters[name] = partitions[parameter]
    return partitions
