"""Values from a checkpoint into a model, and memory first for parameters on the meta device."""

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor, nn

from memtile.checkpoints import Checkpoint, CheckpointHome, Paths, StoredFile
from memtile.convert.finding import Findings, Match, checked, find
from memtile.convert.kinds import integrations
from memtile.convert.moving import bring_in
from memtile.convert.resting import Resting, rest_in_files
from memtile.convert.untiling import untile
from memtile.convert.wanted import wanted_by
from memtile.errors import ArgumentError, CheckpointError
from memtile.homes import Home, register
from memtile.layers import ParkedModule
from memtile.optim import DenseParameter

Twins = dict[int, nn.Parameter]  # by the id of the parameter on the meta device
_NOWHERE: Final[Resting] = MappingProxyType({})


def fill(model: nn.Module, matches: Iterable[Match], resting: Resting = _NOWHERE) -> None:
    """Write what was found into the model; what was on the meta device gets memory, at its home.

    Those parameters become new ones, all of them at the end: an error leaves them on meta. So does
    having no match, as adapters beside the checkpoint of their base have none.

    Args:
        model: some of it, or all, on the meta device.
        matches: which of its tensors are where in the files.
        resting: tiles that lie in the files, where they are left.

    Raises:
        CheckpointError: a file could not be read.
        HomeFullError: a home has no room.
        HomeIOError: a home could not be written to.
    """
    matches = list(matches)
    matched = {id(part.parameter) for match in matches for part in match.dense.parts}
    twins: Twins = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            key = id(parameter)
            if parameter is not None and parameter.is_meta and key in matched and key not in twins:
                twins[key] = _twin(module, name, parameter, resting)
    files: set[StoredFile] = set()
    for match in matches:
        bring_in(_of_twins(match.dense, twins, resting), match.source)
        files.update(stored.file for stored in match.stored())
    for file in files:
        file.check_unchanged()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                module._parameters[name] = twins.get(id(parameter), parameter)
    for integration in integrations():
        integration.filled(model)


@dataclass(frozen=True)
class Stored:
    """A checkpoint that fits a model without values.

    Args:
        checkpoint: its tensors.
        findings: what it has for the model, by dense names.
        made: names of parameters without values that the model is to make by its own rule.
    """

    checkpoint: Checkpoint
    findings: Findings
    made: list[str]


def checked_for_empty(model: nn.Module, paths: Paths, *, strict: bool) -> Stored:
    """The checkpoint for a model without values, once everything about it is known to be right.

    Raises:
        ArgumentError: the model has values.
        CheckpointError: it cannot be loaded, or something would stay on the meta device.
    """
    checkpoint = Checkpoint.of(paths)
    findings = checked(model, checkpoint, strict=strict, complete=True)
    for match in findings.matches:
        _check_has_none(match)
    return Stored(checkpoint, findings, to_make(model, findings))


def _check_has_none(match: Match) -> None:
    """Adapters around a model have values, and nothing in its checkpoint."""
    held: Tensor = match.dense.parts[0].parameter  # or a buffer
    if isinstance(held, nn.Parameter) and not held.is_meta:
        raise ArgumentError(
            f"{match.name} has values already, and checkpoint=… gives values to a model that has "
            "none (memtile.empty_model(lambda: …)); tile this one without, then call "
            "memtile.load_checkpoint(model, folder)"
        )


def to_make(model: nn.Module, findings: Findings) -> list[str]:
    """Names of what a checkpoint may lack, and is on the meta device."""
    names = {*findings.made, *findings.optional}
    wanted = wanted_by(model) if names else []
    lacking = (each.dense for each in wanted if each.dense.name in names)
    return [dense.name for dense in lacking if dense.parts[0].parameter.is_meta]


def make_values(model: nn.Module, names: Collection[str]) -> Callable[[], None]:
    """Give parameters on the meta device values by the model's own rule; ties stay ties.

    Args:
        model: those parameters are not in tiles.
        names: of the parameters.

    Returns:
        What puts them back on the meta device, once the model is dense.

    Raises:
        CheckpointError: the model has no rule for one, or it is in tiles.
    """
    old = {name: _parameter(model, name) for name in names}
    twins = {id(found): _without_values(found) for found in old.values()}
    places = [
        (path, own, parameter)
        for path, module in model.named_modules()
        for own, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in twins
    ]

    def put_back() -> None:
        for path, own, parameter in places:
            model.get_submodule(path)._parameters[own] = parameter

    for path, own, parameter in places:
        model.get_submodule(path)._parameters[own] = twins[id(parameter)]
    try:
        for integration in integrations():
            integration.initialise(model, names)
        for name, parameter in old.items():
            _check_made(name, twins[id(parameter)])
    except BaseException:
        put_back()
        raise
    return put_back


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    path, _, own = name.rpartition(".")
    found = model.get_submodule(path)._parameters.get(own)
    if found is None:
        raise CheckpointError(
            f"{name} is in tiles without values, and the checkpoint has nothing for it: make it "
            "while it is cut, with memtile.tile(memtile.empty_model(lambda: …), …, checkpoint=…)"
        )
    return found


def _without_values(parameter: nn.Parameter) -> nn.Parameter:
    values = torch.full(parameter.shape, math.nan, dtype=parameter.dtype)
    twin = nn.Parameter(values, parameter.requires_grad)
    twin.__dict__.update(parameter.__dict__)
    return twin


def _check_made(name: str, made: nn.Parameter) -> None:
    if made.isnan().any():
        raise CheckpointError(
            f"the checkpoint has no {name}, and the model's own initialisation gives it no "
            "values: give a checkpoint that has it"
        )


def fill_or_untile(
    model: nn.Module, checkpoint: Checkpoint, home: Home | None, put_back: Callable[[], None]
) -> None:
    """Fill a model that was just cut on the meta device; on an error it is dense again.

    Args:
        model: some of it has values that were made.
        checkpoint: for the others.
        home: of the tiles.
        put_back: makes those values go, from the dense model.

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
        put_back()
        raise
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    for own in integrations():
        own.read_from(model, folder)


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
