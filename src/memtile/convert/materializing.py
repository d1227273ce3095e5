"""Gives parameters on the meta device memory, and fills a model from a checkpoint."""

import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor, nn

from memtile.checkpoints import Checkpoint, CheckpointHome, Paths, StoredFile, StoredTensor
from memtile.convert.kinds import integrations
from memtile.convert.model_tensors import tensors_of
from memtile.convert.name_matching import Findings, Match, checked, find, left_out, some
from memtile.convert.streaming import bring_in, first_element
from memtile.convert.untiling import untile
from memtile.errors import (
    ArgumentError,
    CheckpointError,
    CheckpointWarning,
    NewWeightsWarning,
)
from memtile.homes import Allocation, DiskHome, Home, register, whole_pages
from memtile.layers import ParkedModule
from memtile.optim import DenseParameter, Part

_log = logging.getLogger("memtile.checkpoints")

Copies = dict[int, nn.Parameter]  # by the id of the parameter on the meta device
FileBacked = Mapping[int, Allocation]  # by the id of the parameter on the meta device
_NOWHERE: Final[FileBacked] = MappingProxyType({})


def fill(model: nn.Module, matches: Iterable[Match], file_backed: FileBacked = _NOWHERE) -> None:
    """Write what was found into the model; what was on the meta device gets memory, at its home.

    Those parameters become new ones, all of them at the end: an error leaves them on meta. So does
    having no match, as adapters beside the checkpoint of their base have none.
    """
    matches = list(matches)
    matched = {id(part.parameter) for match in matches for part in match.dense.parts}
    copies: Copies = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            key = id(parameter)
            if parameter is not None and parameter.is_meta and key in matched and key not in copies:
                copies[key] = _materialized(module, name, parameter, file_backed)
    files: set[StoredFile] = set()
    for match in matches:
        bring_in(_of_copies(match.dense, copies, file_backed), match.source)
        files.update(stored.file for stored in match.stored())
    for file in files:
        file.check_unchanged()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                module._parameters[name] = copies.get(id(parameter), parameter)
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
    """The checkpoint for a model without values, once everything about it is known to be right."""
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
    needed = tensors_of(model) if names else []
    lacking = (each.dense for each in needed if each.dense.name in names)
    return [dense.name for dense in lacking if dense.parts[0].parameter.is_meta]


def make_values(model: nn.Module, names: Collection[str]) -> Callable[[], None]:
    """Give parameters on the meta device values by the model's own rule; ties stay ties."""
    old = {name: _parameter(model, name) for name in names}
    copies = {id(found): _without_values(found) for found in old.values()}
    places = [
        (path, own, parameter)
        for path, module in model.named_modules()
        for own, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in copies
    ]

    def put_back() -> None:
        for path, own, parameter in places:
            model.get_submodule(path)._parameters[own] = parameter

    for path, own, parameter in places:
        model.get_submodule(path)._parameters[own] = copies[id(parameter)]
    try:
        for integration in integrations():
            integration.initialise(model, names)
        for name, parameter in old.items():
            _check_made(name, copies[id(parameter)])
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
    meta_copy = nn.Parameter(values, parameter.requires_grad)
    meta_copy.__dict__.update(parameter.__dict__)
    return meta_copy


def _check_made(name: str, made: nn.Parameter) -> None:
    if made.isnan().any():
        raise CheckpointError(
            f"the checkpoint has no {name}, and the model's own initialisation gives it no "
            "values: give a checkpoint that has it"
        )


def fill_or_untile(
    model: nn.Module, stored: Stored, home: Home | None, put_back: Callable[[], None]
) -> None:
    """Fill a model that was just cut on the meta device; on an error it is dense again."""
    try:
        matches = find(model, stored.checkpoint).matches
        if isinstance(home, CheckpointHome):
            fill(model, matches, rest_in_files(model, matches, home))
        else:
            fill(model, matches)
    except BaseException:
        untile(model)
        put_back()
        raise
    path = stored.checkpoint.path
    for own in integrations():
        own.read_from(model, path if path.is_dir() else path.parent)
    _warn(model, stored)


def _warn(model: nn.Module, stored: Stored) -> None:
    """Warn of what the model and the checkpoint do not have in common."""
    where, found = stored.checkpoint.where, stored.findings
    waiting = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    said = {
        left_out(where, found.unexpected): found.unexpected,
        f"{where} lacks {some(found.made)}: initialised anew by the model's own rule, to be "
        "trained before use": found.made,
        f"{some(waiting)} have no values yet: give their folder to "
        "memtile.load_checkpoint(model, folder)": waiting,
    }
    for sentence, names in said.items():
        if names:
            kind = NewWeightsWarning if names is found.made else CheckpointWarning
            warnings.warn(sentence, kind, stacklevel=6)


def _materialized(
    module: nn.Module, name: str, parameter: nn.Parameter, file_backed: FileBacked
) -> nn.Parameter:
    """A parameter like one on the meta device, with memory: at home where its tile has one."""
    if isinstance(module, ParkedModule) and name == "weight":
        allocation = file_backed.get(id(parameter))
        allocation = allocation or module.home.allocate(parameter.shape, parameter.dtype)
        meta_copy = nn.Parameter(allocation.tensor(), parameter.requires_grad)
        register(meta_copy, allocation)
    else:
        values = torch.empty(parameter.shape, dtype=parameter.dtype)
        meta_copy = nn.Parameter(values, parameter.requires_grad)
    meta_copy.__dict__.update(parameter.__dict__)
    return meta_copy


def _of_copies(dense: DenseParameter, copies: Copies, file_backed: FileBacked) -> DenseParameter:
    parts = (
        replace(part, parameter=copies.get(id(part.parameter), part.parameter))
        for part in dense.parts
        if id(part.parameter) not in file_backed
    )
    return replace(dense, parts=tuple(parts))


def rest_in_files(model: nn.Module, matches: Iterable[Match], home: CheckpointHome) -> FileBacked:
    """The stretches of the files that tiles lie in; a new disk home is made for the others.

    Only rows of a tensor of the model's own dtype are a stretch of its file. Columns, transposed
    linears and tensors that must be converted are streamed to the disk home, in the first usable
    folder for temporary files.
    """
    parked = {
        id(module._parameters["weight"]): module
        for module in model.modules()
        if isinstance(module, ParkedModule) and module.home is home
    }
    file_backed: dict[int, Allocation] = {}
    reasons: Counter[str] = Counter()
    for match in matches:
        for part in match.dense.parts:
            if id(part.parameter) in parked:
                found = _place(match, part, home)
                if isinstance(found, str):
                    reasons[found] += 1
                else:
                    file_backed[id(part.parameter)] = found
    for reason, count in reasons.items():
        _log.info("%d tiles are copied to a home on disk: %s", count, reason)
    if reasons:
        _move_others(model, home, file_backed)
    return file_backed


def _place(match: Match, part: Part, home: CheckpointHome) -> Allocation | str:
    """Where a tile lies in the files, or the reason why it does not."""
    if not isinstance(match.source, StoredTensor):
        return "the checkpoint holds them in tiles of its own"
    start = first_element(match.dense, part)
    if start is None:
        return "they are no whole rows of what the checkpoint holds"
    if match.source.dtype != part.parameter.dtype:
        return f"the checkpoint's are {match.source.dtype}, the model's {part.parameter.dtype}"
    return home.rows_of(match.source, start, part.parameter.shape)


def _move_others(model: nn.Module, home: CheckpointHome, file_backed: FileBacked) -> None:
    """Give the tiles that lie in no file another home, with room for all of them."""
    others = [
        module
        for module in model.modules()
        if isinstance(module, ParkedModule)
        and module.home is home
        and id(module._parameters["weight"]) not in file_backed
    ]
    weights = {id(m._parameters["weight"]): m._parameters["weight"] for m in others}
    disk = DiskHome()
    disk.hold([whole_pages(w.nbytes) for w in weights.values() if w is not None])
    for module in others:
        module.home = disk
