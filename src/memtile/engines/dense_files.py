"""Loads dense safetensors into shards and saves them: no rank ever holds a dense layer.

To load, each rank reads the rows that it holds. To save, shards are written as a distributed
checkpoint first, and rank 0 reads it back a few MiB at a time, in the order that safetensors need.
"""

import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
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
from memtile.convert.model_tensors import ModelTensor, parameter_count
from memtile.convert.name_matching import Findings, Match, checked, find, left_out, some
from memtile.convert.saving import stored_sources
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
from memtile.engines.zero3_values import write_masters
from memtile.errors import CheckpointError, CheckpointWarning
from memtile.geometry import Rect, Span
from memtile.layers import is_shard, whole_shape
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

    Examples:
        >>> memtile.save_checkpoint(model, "out")
        >>> keys = memtile.load_checkpoint(model, "out")
    """
    ranks, model = Ranks(process_group), unwrapped(model)
    findings = ranks.each(lambda: found_for(model, path, ranks.number == 0, strict))
    if any(parameter.is_meta for parameter in model.parameters()):
        _give_memory(model, device)
        findings = find(model, Checkpoint.of(path))
    reshard_and_flush(model)
    ranks.each(lambda: read_into_shards(findings.matches))
    ranks.each(lambda: write_masters(model))
    findings.loaded()
    return IncompatibleKeys((), tuple(findings.unexpected))


def save_checkpoint(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    max_shard_bytes: int = SHARD_BYTES,
    dtype: torch.dtype | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """`memtile.save_checkpoint` of a sharded model, or of any that all ranks save together.

    Examples:
        >>> memtile.save_checkpoint(model, "out")
    """
    ranks, model = Ranks(process_group), unwrapped(model)
    ranks.check_same("the folder", folder)
    view = ranks.each(lambda: dense_view(model))
    with _between(ranks, Path(folder)) as between:
        write_shards(ranks, view, between)

        def source_of(wanted: ModelTensor) -> TensorSource:
            return _Written(wanted.names[0], view[wanted.names[0]], between)

        def write() -> None:
            stored = stored_sources(model, source_of)
            write_checkpoint(
                folder,
                [_outgoing(name, source, dtype) for name, source in stored.items()],
                max_shard_bytes=max_shard_bytes,
                beside=configs_beside(model, dtype),
                parameters=parameter_count(model),
            )

        ranks.first(write)


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
        local = _local(match.dense)
        source = match.source if match.dense.shape == local.shape else _Matrix(match.source, local)
        bring_in(local, source)


def _local(dense: DenseParameter) -> DenseParameter:
    """What this rank holds of a dense tensor, as parts of it; of more dimensions, as a matrix.

    That of a stack of experts in tiles is (E·R, C).
    """
    if not any(is_shard(part.parameter) for part in dense.parts):
        return dense
    shape = dense.shape
    if len(shape) > 2:
        width = shape[-1] if dense.parts[0].rect else shape[1:].numel()
        shape = torch.Size([shape.numel() // max(1, width), width])
    return replace(dense, shape=shape, parts=tuple(_own(dense)))


def _own(dense: DenseParameter) -> Iterator[Part]:
    for part in dense.parts:
        rect = part.rect or Rect(Span(0, dense.shape[0]), Span(0, dense.shape[1:].numel()))
        inner = whole_shape(part.parameter)[1:]
        for offset, values in local_pieces(part.parameter):
            if values.numel():
                column = sum(at * math.prod(inner[n + 1 :]) for n, at in enumerate(offset[1:]))
                row, column = rect.out.start + offset[0], rect.into.start + column
                columns = Span(column, column + math.prod(values.shape[1:]))
                matrix: Any = values if values.dim() < 2 else values.view(values.shape[0], -1)
                place = Rect(Span(row, row + values.shape[0]), columns)
                yield Part(matrix, place, part.transposed)


class _Matrix:
    """A source of more dimensions as the matrix that a dense tensor is taken as."""

    def __init__(self, source: TensorSource, dense: DenseParameter) -> None:
        self.shape, self.dtype = dense.shape, source.dtype
        self.elements = source.elements

    def rows(self, start: int, stop: int) -> Tensor:
        """Whole rows."""
        width = self.shape[1]
        return self.elements(start * width, stop * width).view(stop - start, width)


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


class _Written:
    """A dense tensor that all ranks have written between, read back in bands."""

    def __init__(self, name: str, like: Tensor, between: Path) -> None:
        self._name, self._between = name, between
        self.shape, self.dtype = torch.Size(like.shape), like.dtype

    def elements(self, start: int, stop: int) -> Tensor:
        """Elements of the flattened tensor, in new memory."""
        if not self.shape:
            scalar = torch.empty((), dtype=self.dtype)
            read_alone({self._name: scalar}, self._between)
            return scalar.view(1)[start:stop]
        width = self.shape[1:].numel()
        first = start // max(1, width)
        band = self.rows(first, -(-stop // max(1, width))).view(-1)
        return band[start - first * width : stop - first * width]

    def rows(self, start: int, stop: int) -> Tensor:
        """Whole rows, in new memory."""
        band = torch.empty(stop - start, *self.shape[1:], dtype=self.dtype)
        place = (start, *(0 for _ in self.shape[1:]))
        read_alone(
            {self._name: DenseView(self.shape, [ShardPiece(place, band)], band)}, self._between
        )
        return band


def _outgoing(name: str, source: TensorSource, dtype: torch.dtype | None) -> Outgoing:
    kept = source.dtype
    written = dtype if dtype is not None and kept.is_floating_point else kept

    def flow() -> Iterator[Tensor]:
        if not source.shape:
            yield source.elements(0, 1).to(written)
            return
        height = max(1, BAND_BYTES // max(1, source.shape[1:].numel() * kept.itemsize))
        for start in range(0, source.shape[0], height):
            yield source.rows(start, min(start + height, source.shape[0])).to(written).contiguous()

    return Outgoing(name, written, source.shape, flow, getattr(source, "block", None))
