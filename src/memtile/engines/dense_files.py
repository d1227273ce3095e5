"""Dense safetensors into shards and out of them: no rank ever holds a dense layer.

In: each rank reads the rows that it holds. Out: the shards go through a distributed checkpoint, and
the first rank reads it back a few MiB at a time, in the order in which safetensors want elements.
"""

import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from memtile.checkpoints import SHARD_BYTES, Checkpoint, Outgoing, Paths, write_checkpoint
from memtile.checkpoints.publishing import cannot_write
from memtile.convert.kinds import configs_beside
from memtile.convert.loading_checkpoints import IncompatibleKeys
from memtile.convert.model_tensors import tensors_of
from memtile.convert.name_matching import Findings, Match, checked, find, left_out, some
from memtile.convert.streaming import TensorSource, bring_in
from memtile.engines.dcp_files import read_alone, write_shards
from memtile.engines.dense_views import (
    DenseView,
    ShardPiece,
    dense_view,
    local_pieces,
    reshard_and_flush,
    unwrapped,
)
from memtile.engines.ranks import Ranks
from memtile.engines.zero3_values import is_partitioned, write_masters
from memtile.errors import CheckpointError, CheckpointWarning
from memtile.geometry import Rect, Span
from memtile.layers import whole_shape
from memtile.optim import DenseParameter, Part

BAND_BYTES: Final = 32 << 20
"""Rows that are read back at once: each read opens the checkpoint anew, in milliseconds."""


@torch.no_grad()
def load_checkpoint(
    model: nn.Module,
    path: Paths,
    *,
    device: torch.device | str | None = None,
    strict: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> IncompatibleKeys:
    """`memtile.load_checkpoint` of a sharded model, or of any that all ranks load together.

    Without strict, the first rank warns of what the checkpoint holds besides.
    """
    ranks, model = Ranks(process_group), unwrapped(model)
    findings = ranks.each(lambda: found_for(model, path, ranks.number == 0, strict))
    if any(parameter.is_meta for parameter in model.parameters()):
        _give_memory(model, device)
        findings = find(model, Checkpoint.of(path))
    reshard_and_flush(model)
    ranks.each(lambda: read_into_shards(findings.matches))
    ranks.each(lambda: write_masters(model))
    return IncompatibleKeys((), tuple(findings.unexpected))


def save_checkpoint(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    max_shard_bytes: int = SHARD_BYTES,
    dtype: torch.dtype | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """`memtile.save_checkpoint` of a sharded model, or of any that all ranks save together."""
    ranks, model = Ranks(process_group), unwrapped(model)
    ranks.check_same("the folder", folder)
    view = ranks.each(lambda: dense_view(model))
    with _between(ranks, Path(folder)) as between:
        write_shards(ranks, view, between)
        ranks.first(
            lambda: write_checkpoint(
                folder,
                [_outgoing(name, view[name], between, dtype) for name in _names(model)],
                max_shard_bytes=max_shard_bytes,
                beside=configs_beside(model, dtype),
            )
        )


def _names(model: nn.Module) -> list[str]:
    return [wanted.names[0] for wanted in tensors_of(model)]


def found_for(model: nn.Module, path: Paths, is_first: bool, strict: bool) -> Findings:
    """What a checkpoint has for a model, all of it; the first rank verifies checksums and warns."""
    checkpoint = Checkpoint.of(path)
    if is_first:
        findings = checked(model, checkpoint, strict=strict, complete=True)
    else:
        findings = find(model, checkpoint)
        findings.check(strict=strict, complete=True)
    parameters = dict(model.named_parameters())
    known = {*findings.optional, *findings.apart} & parameters.keys()
    lacking = [*findings.made, *(name for name in known if parameters[name].is_meta)]
    if lacking:  # each rank would draw its own
        raise CheckpointError(
            f"{checkpoint.where} has no {some(sorted(lacking))}, and values are not made over "
            "ranks: load the model with from_pretrained once, and give the folder that "
            "save_pretrained writes"
        )
    if findings.unexpected and is_first:
        warnings.warn(
            left_out(checkpoint.where, findings.unexpected), CheckpointWarning, stacklevel=2
        )
    return findings


def _give_memory(model: nn.Module, device: torch.device | str | None) -> None:
    def real(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        own = tensor.device_mesh.device_type if isinstance(tensor, DTensor) else "cpu"
        return torch.empty_like(tensor, device=device or own)

    model._apply(real)


def read_into_shards(matches: Iterable[Match]) -> None:
    """Each rank reads what it holds of each tensor."""
    for match in matches:
        source = match.source if len(match.dense.shape) <= 2 else _Matrix(match.source)
        bring_in(_local(match.dense), source)


def _local(dense: DenseParameter) -> DenseParameter:
    """What this rank holds of a dense tensor, as parts of it; of more dimensions, as a matrix."""
    if not any(map(_is_sharded, (part.parameter for part in dense.parts))):
        return dense
    shape = dense.shape
    if len(shape) > 2:
        shape = torch.Size([shape[0], math.prod(shape[1:])])
    parts = tuple(own for part in dense.parts for own in _own(dense, part))
    return replace(dense, shape=shape, parts=parts)


def _own(dense: DenseParameter, part: Part) -> Iterator[Part]:
    if not _is_sharded(part.parameter):
        yield part
        return
    rect = part.rect or _whole(dense.shape)
    inner = whole_shape(part.parameter)[1:]
    for offset, values in local_pieces(part.parameter):
        if values.numel():
            column = sum(at * math.prod(inner[n + 1 :]) for n, at in enumerate(offset[1:]))
            rows = Span(rect.out.start + offset[0], rect.out.start + offset[0] + values.shape[0])
            start = rect.into.start + column
            columns = Span(start, start + math.prod(values.shape[1:]))
            matrix: Any = values if values.dim() < 2 else values.view(values.shape[0], -1)
            yield Part(matrix, Rect(rows, columns), part.transposed)


class _Matrix:
    """A source of more dimensions as (first, all others)."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self.shape = torch.Size([source.shape[0], math.prod(source.shape[1:])])
        self.dtype = source.dtype
        self.elements = source.elements

    def rows(self, start: int, stop: int) -> Tensor:
        """Whole rows."""
        return self._source.rows(start, stop).view(stop - start, -1)


def _is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor) or is_partitioned(tensor)


def _whole(shape: Sequence[int]) -> Rect:
    return Rect(Span(0, shape[0]), Span(0, math.prod(shape[1:])))


@contextmanager
def _between(ranks: Ranks, folder: Path) -> Iterator[Path]:
    """A folder beside what is to be written, gone afterwards."""

    def make() -> Path:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix=".shards-", dir=folder))
        except OSError as error:
            raise cannot_write(folder, error) from error

    between = ranks.first(make)
    try:
        yield between
    finally:
        if ranks.number == 0:
            shutil.rmtree(between, ignore_errors=True)


def _outgoing(name: str, like: Tensor, between: Path, dtype: torch.dtype | None) -> Outgoing:
    shape, kept = like.shape, like.dtype
    written = dtype if dtype is not None and kept.is_floating_point else kept

    def flow() -> Iterator[Tensor]:
        if not shape:
            yield _read(between, name, torch.empty((), dtype=kept)).to(written)
            return
        height = max(1, BAND_BYTES // max(1, shape[1:].numel() * kept.itemsize))
        for start in range(0, shape[0], height):
            band = torch.empty(min(height, shape[0] - start), *shape[1:], dtype=kept)
            place = (start, *(0 for _ in shape[1:]))
            _read(between, name, DenseView(shape, [ShardPiece(place, band)], band))
            yield band.to(written)

    return Outgoing(name, written, shape, flow)


def _read(between: Path, name: str, into: Tensor) -> Tensor:
    read_alone({name: into}, between)
    return into
