"""Dense safetensors into shards and out of them: no rank ever holds a dense layer.

In: each rank reads the rows that it holds. Out: the shards go through a distributed checkpoint, and
the first rank reads it back a few MiB at a time, in the order in which safetensors want elements.
"""

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.tensor import DTensor

from memtile.checkpoints import Checkpoint, Outgoing, write_checkpoint
from memtile.convert import integrations
from memtile.convert.finding import Findings, checked, find
from memtile.convert.moving import bring_in
from memtile.convert.wanted import wanted_by
from memtile.engines.dense_views import DenseView, dense_view, let_go
from memtile.engines.piece_reader import PieceReader
from memtile.engines.pieces import Piece, local_pieces
from memtile.engines.ranks import Ranks
from memtile.geometry import Rect, Span
from memtile.optim import DenseParameter, Part

BAND_BYTES: Final = 32 << 20
"""Rows that are read back at once: each read opens the checkpoint anew, in milliseconds."""


@torch.no_grad()
def load_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Read a dense checkpoint into a sharded model, each rank its own shards; all ranks call it.

    Every form that `memtile.load_checkpoint` reads is read, and all of the model must be there.

    Args:
        model: sharded; shards on the meta device get memory.
        path: a folder, a `.safetensors` file or a `.safetensors.index.json`, seen by all ranks.
        device: of shards that are on the meta device; None: that of their mesh. With an offload
            policy, "cpu".
        process_group: None: all ranks.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or not of this model; it is as it
            was, unless a file could not be read half-way.
        EngineError: a rank is gone.

        Each of them on every rank.
    """
    ranks = Ranks(process_group)
    findings = ranks.each(lambda: _found(model, path, verifies=ranks.number == 0))
    if any(parameter.is_meta for parameter in model.parameters()):
        _give_memory(model, device)
        findings = find(model, Checkpoint.open(path))
    let_go(model)

    def read() -> None:
        for match in findings.matches:
            bring_in(_local(match.dense), match.source)

    ranks.each(read)


def save_checkpoint(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Write the dense checkpoint of a sharded model, as safetensors; all ranks call it.

    The files are those that `memtile.save_checkpoint` writes for the untiled model. Meanwhile the
    shards take their own size on that disk once more.

    Args:
        model: tiled or not, sharded or not.
        folder: made where it is missing; on a filesystem that all ranks see.
        dtype: to write floating-point tensors in; None: their own.
        process_group: None: all ranks.

    Raises:
        CheckpointError, CheckpointWriteError, CannotTileError: as `memtile.save_checkpoint`.
        EngineError: a rank is gone.

        Each of them on every rank.
    """
    ranks = Ranks(process_group)
    view = ranks.each(lambda: dense_view(model))
    with _between(ranks, Path(folder)) as between, ranks.answering(), _silent():
        state_dict_saver.save(
            view,
            storage_writer=FileSystemWriter(between),
            process_group=ranks.group,
            no_dist=ranks.is_alone,
        )
        ranks.first(lambda: _write(model, Path(folder), between, dtype))


def _found(model: nn.Module, path: str | os.PathLike[str], verifies: bool) -> Findings:
    checkpoint = Checkpoint.open(path)
    if verifies:
        return checked(model, checkpoint, strict=True)
    findings = find(model, checkpoint)
    findings.check(path, strict=True)
    return findings


def _give_memory(model: nn.Module, device: torch.device | str | None) -> None:
    def real(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        own = tensor.device_mesh.device_type if isinstance(tensor, DTensor) else "cpu"
        return torch.empty_like(tensor, device=device or own)

    model._apply(real)


def _local(dense: DenseParameter) -> DenseParameter:
    """What this rank holds of a dense tensor, as parts of it; of more dimensions, as a matrix."""
    parts = [own for part in dense.parts for own in _own(dense, part)]
    if not any(isinstance(part.parameter, DTensor) for part in dense.parts):
        return dense
    shape = dense.shape if len(dense.shape) <= 2 else torch.Size([dense.shape[0], -1])
    return replace(dense, shape=shape, parts=tuple(parts))


def _own(dense: DenseParameter, part: Part) -> Iterator[Part]:
    tensor: Any = part.parameter  # a DTensor is a Parameter by its metaclass only
    if not isinstance(tensor, DTensor):
        yield part
        return
    rect = part.rect or _whole(dense.shape)
    for offset, values in local_pieces(tensor.detach()):
        if values.numel():
            rows = Span(rect.out.start + offset[0], rect.out.start + offset[0] + values.shape[0])
            yield Part(values, Rect(rows, rect.into), part.turned)  # type: ignore[arg-type]  # values move alike


def _whole(shape: Sequence[int]) -> Rect:
    rows, width = shape[0], shape[1] if len(shape) > 1 else 1
    return Rect(Span(0, rows), Span(0, width))


@contextmanager
def _between(ranks: Ranks, folder: Path) -> Iterator[Path]:
    """A folder beside what is to be written, gone afterwards."""

    def make() -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=".shards-", dir=folder))

    between = ranks.first(make)
    try:
        yield between
    finally:
        if ranks.number == 0:
            shutil.rmtree(between, ignore_errors=True)


def _write(model: nn.Module, folder: Path, between: Path, dtype: torch.dtype | None) -> None:
    tensors = [
        _outgoing(wanted.names[0], wanted.dense.shape, wanted.dtype, between, dtype)
        for wanted in wanted_by(model)
    ]
    texts = {name: text for own in integrations() for name, text in own.texts(model).items()}
    write_checkpoint(folder, tensors, texts=texts)


def _outgoing(
    name: str, shape: torch.Size, kept: torch.dtype, between: Path, dtype: torch.dtype | None
) -> Outgoing:
    written = dtype if dtype is not None and kept.is_floating_point else kept

    def flow() -> Iterator[Tensor]:
        if not shape:
            yield _read(between, name, torch.empty((), dtype=kept)).to(written)
            return
        height = max(1, BAND_BYTES // max(1, shape[1:].numel() * kept.itemsize))
        for start in range(0, shape[0], height):
            band = torch.empty(min(height, shape[0] - start), *shape[1:], dtype=kept)
            place = (start, *(0 for _ in shape[1:]))
            _read(between, name, DenseView(shape, [Piece(place, band)], band))
            yield band.to(written)

    return Outgoing(name, written, shape, flow)


def _read(between: Path, name: str, into: Tensor) -> Tensor:
    state_dict_loader.load({name: into}, storage_reader=PieceReader(between), no_dist=True)
    return into


@contextmanager
def _silent() -> Iterator[None]:
    """Without DCP's warning that one process reads, which is meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
