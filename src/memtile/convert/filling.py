"""Values from a checkpoint into a model, and memory first for parameters on the meta device."""

import os
from collections.abc import Iterable
from dataclasses import replace
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor, nn

from memtile.checkpoints import Checkpoint, CheckpointHome, StoredFile
from memtile.convert.finding import Match, checked, find
from memtile.convert.kinds import integrations
from memtile.convert.moving import bring_in
from memtile.convert.resting import Resting, rest_in_files
from memtile.convert.untiling import untile
from memtile.errors import ArgumentError
from memtile.homes import DiskHome, Home, register
from memtile.layers import ParkedModule
from memtile.optim import DenseParameter

Twins = dict[int, nn.Parameter]  # by the id of the parameter on the meta device
_NOWHERE: Final[Resting] = MappingProxyType({})


def fill(model: nn.Module, matches: Iterable[Match], resting: Resting = _NOWHERE) -> None:
    """Write what was found into the model; what was on the meta device gets memory, at its home.

    Those parameters become new ones, all of them at the end: an error leaves them on meta.

    Args:
        model: some of it, or all, on the meta device.
        matches: which of its tensors are where in the files.
        resting: tiles that lie in the files, where they are left.

    Raises:
        CheckpointError: a file could not be read.
        HomeFullError: a home has no room.
        HomeIOError: a home could not be written to.
    """
    twins: Twins = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta and id(parameter) not in twins:
                twins[id(parameter)] = _twin(module, name, parameter, resting)
    files: set[StoredFile] = set()
    for match in matches:
        bring_in(_of_twins(match.dense, twins, resting), match.source)
        files.update(stored.file for stored in match.stored())
    for file in files:
        file.check_unchanged()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                module._parameters[name] = twins[id(parameter)]


def checked_for_empty(
    model: nn.Module, path: str | os.PathLike[str], home: Home | str | None
) -> Checkpoint:
    """The checkpoint for a model without values, once everything about it is known to be right.

    Raises:
        ArgumentError: the model has values, or the home brings its own.
        CheckpointError: it cannot be loaded, or something would stay on the meta device.
    """
    if isinstance(home, DiskHome) and home.sealed is not None:
        raise ArgumentError(
            f"{home!r} was reopened with the tiles that it holds, and checkpoint=… would give "
            "others; give one of the two: a new DiskHome, or no checkpoint"
        )
    checkpoint = Checkpoint.open(path)
    for match in checked(model, checkpoint, strict=True).matches:
        _check_has_none(match)
    return checkpoint


def _check_has_none(match: Match) -> None:
    """Adapters around a model have values, and nothing in its checkpoint."""
    held: Tensor = match.dense.parts[0].parameter  # or a buffer
    if isinstance(held, nn.Parameter) and not held.is_meta:
        raise ArgumentError(
            f"{match.name} has values already, and checkpoint=… gives values to a model that has "
            "none (memtile.empty_model(lambda: …)); tile this one without, then call "
            "memtile.load_checkpoint(model, folder)"
        )


def fill_or_untile(model: nn.Module, checkpoint: Checkpoint, home: Home | None) -> None:
    """Fill a model that was just cut on the meta device; on an error it is dense again.

    Raises:
        CheckpointError, HomeFullError, HomeIOError: as `fill`.
    """
    try:
        matches = find(model, checkpoint).matches
        if isinstance(home, CheckpointHome):
            fill(model, matches, rest_in_files(model, matches, home))
        else:
            fill(model, matches)
    except BaseException:
        untile(model)
        raise
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    for own in integrations():
        own.filled(model, folder)


def _twin(module: nn.Module, name: str, parameter: nn.Parameter, resting: Resting) -> nn.Parameter:
    """A parameter like one on the meta device, with memory: at home where its tile has one."""
    if isinstance(module, ParkedModule) and name == "weight":
        berth = resting.get(id(parameter))
        berth = berth or module.home.berth(parameter.shape, parameter.dtype)
        twin = nn.Parameter(berth.tensor(), parameter.requires_grad)
        register(twin, berth)
    else:
        values = torch.empty(parameter.shape, dtype=parameter.dtype)
        twin = nn.Parameter(values, parameter.requires_grad)
    twin.__dict__.update(parameter.__dict__)
    return twin


def _of_twins(dense: DenseParameter, twins: Twins, resting: Resting) -> DenseParameter:
    parts = (
        replace(part, parameter=twins.get(id(part.parameter), part.parameter))
        for part in dense.parts
        if id(part.parameter) not in resting
    )
    return replace(dense, parts=tuple(parts))
