"""Which tensors of a checkpoint are which of a model; everything is checked before any is read.

A checkpoint may have dense names, or tile names of any grid; any name of a tied tensor; and names
with or without the prefix of a transformers model's base.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from memtile.checkpoints import Checkpoint, OnePath, StoredTensor
from memtile.convert.dense import check_stored
from memtile.convert.derived import Computed
from memtile.convert.kinds import integrations, naming_of, tiled_classes
from memtile.convert.model_tensors import ModelTensor, computed_buffers, tensors_of
from memtile.convert.streaming import Index, TensorSource, TiledSource, spans, stored_tensors
from memtile.errors import CheckpointError, HomeError, MemtileError
from memtile.homes import allocation_of
from memtile.layers import TiledModule
from memtile.optim import DenseParameter

_SHOWN = 4  # names in a message

WAY_OUT = (
    "give the folder of the unquantized model, or dequantize it once with from_pretrained and "
    "model.dequantize(), and write it with save_pretrained"
)
"""What to do with quantized weights."""


@dataclass(frozen=True)
class Match:
    """One tensor of the model, in the direction of the source, and where its values are."""

    dense: DenseParameter
    source: TensorSource
    name: str  # of the dense tensor

    def stored(self) -> Iterator[StoredTensor]:
        """The tensors of the files that will be read."""
        return stored_tensors(self.source)


@dataclass
class Findings:
    """What a checkpoint has for a model.

    Attributes:
        checkpoint: where it was looked for.
        matches: tensors that are in both.
        missing: names of the model that the checkpoint should have and has not.
        made: names that it has not, and that the model initialises by its own rule.
        optional: names that the model's library lets a checkpoint lack.
        apart: names that lie in a checkpoint of their own, which this one is not.
        unexpected: names of the checkpoint that mean nothing to the model.
        problems: what keeps it from being loaded, a sentence each.
        loaded: to be called when the model has the values.
    """

    checkpoint: Checkpoint
    matches: list[Match] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    optional: list[str] = field(default_factory=list)
    apart: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    loaded: Callable[[], None] = lambda: None

    def check(self, *, strict: bool, complete: bool) -> None:
        """Refuse what cannot be loaded.

        Strict: anything missing or unexpected. Complete: anything missing but what the model makes.
        """
        problems = list(self.problems)
        missing = self.missing + (self.made if strict else [])
        if missing and (strict or complete):
            problems.append(f"it has no {some(missing)}, neither dense nor in tiles")
        if self.unexpected and (strict or problems):
            problems.append(f"it has {some(self.unexpected)}, which the model has not")
        if problems:
            raise CheckpointError(
                f"{self.checkpoint.where} is not a checkpoint of this model: "
                f"{'; '.join(problems)}. Nothing was changed; give the checkpoint of this model, "
                f"or build it with the checkpoint's configuration{self._ways_out(complete)}"
            )

    def _ways_out(self, complete: bool) -> str:
        if self.problems:
            return ""
        refused = complete and self.missing
        return "" if refused else "; without strict (strict=False) what fits is loaded"


def some(names: Collection[str]) -> str:
    """The first of some names, and how many there are besides."""
    shown = ", ".join(list(names)[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def left_out(where: object, names: Collection[str]) -> str:
    """The warning of names that only the checkpoint has."""
    return f"{where} holds {some(names)}, which the model has not: left out"


def find(model: nn.Module, checkpoint: Checkpoint) -> Findings:
    """What a checkpoint has for a model; only headers are read, unless ties must be compared."""
    for integration in integrations(imported_only=False):
        for path in checkpoint.paths:
            integration.check_files(path)
    findings = _Search(model, checkpoint).run()
    for match in findings.matches:
        ours = match.dense.parts[0].parameter.dtype
        for theirs in {stored.dtype for stored in match.stored()} - {ours}:
            if theirs.is_floating_point and theirs.itemsize == 1:
                raise CheckpointError(  # its scales stand in other tensors
                    f"{checkpoint.where} holds {match.name} as {theirs}, quantized, and memtile "
                    f"applies no scales: {WAY_OUT}"
                )
    return findings


def converting_bytes(model: nn.Module, folder: OnePath) -> int:
    """The most memory that computing a tensor from a checkpoint takes; 0 without a checkpoint."""
    try:
        matches = find(model, Checkpoint.of(folder)).matches
    except CheckpointError:  # what is wrong is said where it is loaded
        return 0
    computed = [match.source for match in matches if isinstance(match.source, Computed)]
    return max((source.call_bytes for source in computed), default=0)


def checked(model: nn.Module, checkpoint: Checkpoint, *, strict: bool, complete: bool) -> Findings:
    """`find`, with everything checked; `strict` and `complete` are those of `Findings.check`."""
    for name, layer in model.named_modules():
        if isinstance(layer, TiledModule):
            check_stored(name, layer)
    for name, parameter in model.named_parameters():
        allocation = allocation_of(parameter)
        if allocation is not None and allocation.home.is_read_only:
            raise HomeError(
                f"{name} lies in a checkpoint's own files and cannot be written to; make the model "
                "anew with memtile.tile(memtile.empty_model(lambda: …), …, checkpoint=folder)"
            )
    findings = find(model, checkpoint)
    findings.check(strict=strict, complete=complete)
    _check_meta(model, findings)
    for stored in {stored for match in findings.matches for stored in match.stored()}:
        stored.check_sum()
    return findings


def _check_meta(model: nn.Module, findings: Findings) -> None:
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise CheckpointError(
                f"the buffer {name} is on the meta device, and no checkpoint says how it is "
                "computed; build the model with memtile.empty_model(lambda: …), which keeps "
                "buffers real"
            )
    found = {match.name for match in findings.matches}
    found.update(findings.made, findings.optional, findings.apart)
    for needed in tensors_of(model):
        if needed.dense.name not in found and needed.dense.parts[0].parameter.is_meta:
            raise CheckpointError(
                f"{needed.dense.name} is on the meta device and the checkpoint has nothing for it; "
                "give a checkpoint that holds it, or build the model with its values"
            )


def meta_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The dense tensors of a model, on the meta device, under each name that they have in files."""
    stored = naming_of(model).stored
    return {
        stored(name): torch.empty(one.dense.shape, dtype=one.dtype, device="meta")
        for one in tensors_of(model)
        for name in one.names
    }


class _Search:
    def __init__(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        self.needed, self.checkpoint = tensors_of(model), checkpoint
        self.naming = naming_of(model)
        self.computed = {self.naming.stored(name): b for name, b in computed_buffers(model).items()}
        self.wanted = meta_tensors(model)
        self.used: set[str] = set()  # names of the checkpoint
        self.broken: set[str] = set()  # names whose tiles make no tensor
        self.lacking: list[str] = []  # names of the model
        self.findings = Findings(checkpoint)

    def run(self) -> Findings:
        found = self.findings
        stored, tiles = self._joined()
        self.renamed = self.naming.renamed(stored, self.computed | self.wanted)
        found.problems += self.renamed.problems
        found.loaded = self.renamed.loaded
        for needed in self.needed:
            try:
                self._match(needed)
            except MemtileError as error:
                found.problems.append(f"{needed.dense.name}: {error}")
        self._check_biases()
        besides = {
            name
            for name, keys in self.renamed.keys.items()
            if name not in self.computed and not self.used.issuperset(keys)
        }
        lacking = {self.naming.stored(name) for name in self.lacking}
        missing, unexpected = self.naming.relevant(lacking, besides)
        keys = {key for name in unexpected for key in self.renamed.keys[name]}
        theirs = {own for key in keys for own in tiles.get(key, [key])}
        found.unexpected = [name for name in self.checkpoint if name in theirs]
        made = self.naming.made(missing)
        matched_apart = {self.naming.apart(match.name) for match in found.matches}
        for name in self.lacking:
            stored_name = self.naming.stored(name)
            if matched_apart == {not self.naming.apart(name)}:
                found.apart.append(name)
            elif stored_name in made:
                found.made.append(name)
            else:
                (found.missing if stored_name in missing else found.optional).append(name)
        return found

    def _joined(self) -> tuple[dict[str, TensorSource], dict[str, list[str]]]:
        """The dense tensors of the checkpoint by name, and the names of the tiles of each."""
        stored: dict[str, TensorSource] = dict(self.checkpoint)
        tiles: dict[str, list[str]] = {}
        for (path, own), keyed in tiles_by_layer(self.checkpoint).items():
            if not self.wanted.keys().isdisjoint(keyed.values()):
                continue  # the model has such names itself
            name, keys = ".".join(filter(None, (path, own))), list(keyed.values())
            for key in keys:
                stored.pop(key, None)
            tiles[name] = keys
            try:
                if name in self.checkpoint:
                    found = f"{name}, {keys[0]}"
                    raise CheckpointError(f"the checkpoint holds it twice, as {found}; keep one")
                stored[name] = TiledSource({i: self.checkpoint[k] for i, k in keyed.items()})
            except MemtileError as error:
                self.broken.add(name)
                self.findings.problems.append(f"{name}: {error}")
        return stored, tiles

    def _match(self, needed: ModelTensor) -> None:
        sources = {name: source for name in needed.names if (source := self._source(name))}
        if not sources and not self.broken.isdisjoint(map(self.naming.stored, needed.names)):
            return
        if not sources:
            self.lacking.append(needed.dense.name)
            return
        (_, source), *others = sources.items()
        dense = needed.matrix if isinstance(source, TiledSource) else needed.dense
        _check_fits(dense, needed.dtype, source)
        for other, tied in others:
            if not _same_values(source, tied):
                raise CheckpointError(
                    f"the model ties it to {other}, and the checkpoint holds other values under "
                    "that name; untie the model, or remove one of the two"
                )
        self.findings.matches.append(Match(dense, source, needed.dense.name))

    def _source(self, name: str) -> TensorSource | None:
        """Where the checkpoint has a name of the model."""
        stored = self.naming.stored(name)
        source = self.renamed.sources.get(stored)
        if source is not None:
            self.used.update(self.renamed.keys[stored])
        return source

    def _check_biases(self) -> None:
        """Tiles of a weight and of a bias that were not cut together are of two layers."""
        grids = {
            match.name: match.source.grid.out_parts
            for match in self.findings.matches
            if isinstance(match.source, TiledSource)
        }
        for name, parts in grids.items():
            path, _, own = name.rpartition(".")
            weight = grids.get(f"{path}.weight" if path else "weight", parts)
            if own == "bias" and weight != parts:
                self.findings.problems.append(
                    f"{name}: its tiles are cut at rows {parts}, those of its weight at {weight}: "
                    "they are tiles of two layers"
                )


def tiles_by_layer(checkpoint: Iterable[str]) -> Mapping[tuple[str, str], dict[Index, str]]:
    """Names of tiles by the dense tensor's (path, own name) and place."""
    names = {cls.tile_pattern.pattern: cls.dense_name for cls in tiled_classes()}
    compiled = [(re.compile(rf"(?:(?P<layer>.+)\.)?{p}"), names[p]) for p in sorted(names)]
    found: dict[tuple[str, str], dict[Index, str]] = defaultdict(dict)
    for key in checkpoint:
        for pattern, dense_name in compiled:
            match = pattern.fullmatch(key)
            if match is None:
                continue
            row, column = int(match["row"]), int(match.groupdict().get("column") or 0)
            place = (row, column if match["name"] == "weight" else 0)
            path, _, own = dense_name(match["layer"] or "", match["name"]).rpartition(".")
            found[path, own][place] = key
    return found


def _check_fits(dense: DenseParameter, dtype: torch.dtype, source: TensorSource) -> None:
    if source.shape != dense.shape:
        raise CheckpointError(
            f"the checkpoint's is {tuple(source.shape)}, the model's {tuple(dense.shape)}"
        )
    theirs, ours = ((each.is_complex, each.is_floating_point) for each in (source.dtype, dtype))
    if theirs != ours:
        raise CheckpointError(f"the checkpoint's is {source.dtype}, the model's {dtype}")


def _same_values(one: TensorSource, other: TensorSource) -> bool:
    if one.shape != other.shape:
        return False
    pieces = spans(one.shape.numel(), one.dtype.itemsize)
    return all(torch.equal(one.elements(*piece), other.elements(*piece)) for piece in pieces)
