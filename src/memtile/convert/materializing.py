"""Values from a checkpoint into a model; parameters on the meta device get memory first."""

import logging
import math
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor, nn

from memtile.checkpoints import (
    Checkpoint,
    CheckpointHome,
    Paths,
    StoredFile,
    StoredPiece,
    StoredTensor,
)
from memtile.convert.derived import Computed, pieces_of
from memtile.convert.kinds import integrations
from memtile.convert.model_tensors import tensors_of
from memtile.convert.name_matching import Findings, Match, checked, find, left_out, some
from memtile.convert.streaming import TiledSource, bring_in, first_element
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


def fill(model: nn.Module, findings: Findings, file_backed: FileBacked = _NOWHERE) -> None:
    """Write what was found into the model; what was on the meta device gets memory, at its home.

    Those parameters become new ones at the end: an error leaves them on meta. Without a match (as
    adapters beside the checkpoint of their base) they stay there.
    """
    matches = findings.matches
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
    findings.loaded()
    for integration in integrations():
        integration.filled(model)


def checked_for_empty(model: nn.Module, paths: Paths, *, strict: bool) -> Findings:
    """The checkpoint for a model without values, all of it checked."""
    findings = checked(model, Checkpoint.of(paths), strict=strict, complete=True)
    for match in findings.matches:
        held: Tensor = match.dense.parts[0].parameter  # or a buffer
        if isinstance(held, nn.Parameter) and not held.is_meta:  # adapters around it may have some
            raise ArgumentError(
                f"{match.name} has values already, and checkpoint=… gives values to a model that "
                "has none (memtile.empty_model(lambda: …)); tile this one without, then call "
                "memtile.load_checkpoint(model, folder)"
            )
    return findings


def to_make(model: nn.Module, findings: Findings) -> list[str]:
    """Names of parameters on the meta device that a checkpoint lacks and may lack."""
    names = {*findings.made, *findings.optional}
    needed = tensors_of(model) if names else []
    lacking = (each.dense for each in needed if each.dense.name in names)
    return [dense.name for dense in lacking if dense.parts[0].parameter.is_meta]


@contextmanager
def values_made(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Give parameters on the meta device values by the model's own rule; ties stay ties.

    After an error inside they are the old ones again.
    """
    old = {name: _parameter(model, name) for name in names}
    copies = {id(found): _without_values(found) for found in old.values()}
    places = [
        (path, own, parameter)
        for path, module in model.named_modules()
        for own, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in copies
    ]
    try:
        for path, own, parameter in places:
            model.get_submodule(path)._parameters[own] = copies[id(parameter)]
        for integration in integrations():
            integration.initialise(model, names)
        for name, parameter in old.items():
            if copies[id(parameter)].isnan().any():
                raise CheckpointError(
                    f"the checkpoint has no {name}, and the model's own initialisation gives it no "
                    "values: give a checkpoint that has it"
                )
        yield
    except BaseException:
        for path, own, parameter in places:
            model.get_submodule(path)._parameters[own] = parameter
        raise


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
    return _like(parameter, values)


def _like(parameter: nn.Parameter, values: Tensor) -> nn.Parameter:
    """A parameter of these values, with the other's attributes."""
    copy = nn.Parameter(values, parameter.requires_grad)
    copy.__dict__.update(parameter.__dict__)
    return copy


@contextmanager
def filled_from(model: nn.Module, findings: Findings, home: Home | None) -> Iterator[None]:
    """Inside, a model on the meta device is cut; then it is filled. After an error it is dense."""
    with values_made(model, to_make(model, findings)):
        try:
            yield
            found = find(model, findings.checkpoint)
            if isinstance(home, CheckpointHome):
                fill(model, found, rest_in_files(model, found.matches, home))
            else:
                fill(model, found)
        except BaseException:
            untile(model)
            raise
    path = findings.checkpoint.path
    for own in integrations():
        own.read_from(model, path if path.is_dir() else path.parent)


def warn_of_differences(model: nn.Module, found: Findings, stacklevel: int) -> None:
    """Warn of what the model and the checkpoint do not have in common."""
    where = found.checkpoint.where
    waiting = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    made = (
        f"{where} lacks {some(found.made)}: initialised anew by the model's own rule, to be "
        "trained before use"
    )
    no_values = (
        f"{some(waiting)} have no values yet: give their folder to "
        "memtile.load_checkpoint(model, folder)"
    )
    for names, sentence, kind in (
        (found.unexpected, left_out(where, found.unexpected), CheckpointWarning),
        (found.made, made, NewWeightsWarning),
        (waiting, no_values, CheckpointWarning),
    ):
        if names:
            warnings.warn(sentence, kind, stacklevel=stacklevel + 1)


def _materialized(
    module: nn.Module, name: str, parameter: nn.Parameter, file_backed: FileBacked
) -> nn.Parameter:
    """A parameter like one on the meta device, with memory: in its tile's home if it has one."""
    if not isinstance(module, ParkedModule) or name != "weight":
        return _like(parameter, torch.empty(parameter.shape, dtype=parameter.dtype))
    allocation = file_backed.get(id(parameter))
    allocation = allocation or module.home.allocate(parameter.shape, parameter.dtype)
    copy = _like(parameter, allocation.tensor())
    register(copy, allocation)
    return copy


def _of_copies(dense: DenseParameter, copies: Copies, file_backed: FileBacked) -> DenseParameter:
    parts = (
        replace(part, parameter=copies.get(id(part.parameter), part.parameter))
        for part in dense.parts
        if id(part.parameter) not in file_backed
    )
    return replace(dense, parts=tuple(parts))


def rest_in_files(model: nn.Module, matches: Iterable[Match], home: CheckpointHome) -> FileBacked:
    """Where tiles lie in the files; the others get a new disk home.

    Only rows of tensors of the model's own dtype lie in their files as a tile does. Columns,
    transposed linears, and what must be converted or computed are copied to the disk home, in the
    first usable folder for temporary files.
    """
    parked = [m for m in model.modules() if isinstance(m, ParkedModule) and m.home is home]
    ids = {id(module._parameters["weight"]) for module in parked}
    file_backed: dict[int, Allocation] = {}
    copied: dict[str, list[tuple[str, int]]] = defaultdict(list)  # name and bytes, by the reason
    for match in matches:
        for part in match.dense.parts:
            if id(part.parameter) in ids:
                found = _place(match, part, home)
                if isinstance(found, str):
                    copied[found].append((match.name, part.parameter.nbytes))
                else:
                    file_backed[id(part.parameter)] = found
    for reason, tiles in copied.items():
        names = some(dict.fromkeys(name for name, _ in tiles))
        nbytes = sum(size for _, size in tiles)
        text = "%d tiles of %s are copied to a home on disk, %d bytes: %s"
        _log.warning(text, len(tiles), names, nbytes, reason)
    if copied:
        others = [m for m in parked if id(m._parameters["weight"]) not in file_backed]
        weights = {id(w): w for m in others if (w := m._parameters["weight"]) is not None}
        disk = DiskHome()
        disk.hold([whole_pages(weight.nbytes) for weight in weights.values()])
        for module in others:
            module.home = disk
    return file_backed


def _place(match: Match, part: Part, home: CheckpointHome) -> Allocation | str:
    """Where a tile lies in the files, or why it lies in none."""
    if isinstance(match.source, TiledSource):
        return "the checkpoint holds them in tiles of its own"
    start = first_element(match.dense, part)
    if start is None:
        return "they are no whole rows of what the checkpoint holds"
    if isinstance(match.source, Computed):
        return "their values are computed from what the checkpoint holds"
    pieces = list[StoredPiece]()
    for piece in pieces_of(match.source, start, start + part.parameter.numel()):
        if not isinstance(piece.source, StoredTensor):
            return "the checkpoint holds them in tiles of its own"
        if piece.source.dtype != part.parameter.dtype:
            return f"the checkpoint's are {piece.source.dtype}, the model's {part.parameter.dtype}"
        pieces.append((piece.source, piece.first, piece.count))
    return home.elements_of(pieces, part.parameter.shape)
