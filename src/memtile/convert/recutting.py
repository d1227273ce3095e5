"""`convert_checkpoint`: changes dense tensors of a checkpoint into tiles and back, without a model.

A tile is recognised by its name, which ends in `linears.{row}.{column}.weight` or `.bias`. Which
tensors become tiles is said by the user, since a name does not tell a linear from an embedding.
"""

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from memtile.checkpoints import (
    PIECE_BYTES,
    SHARD_BYTES,
    Checkpoint,
    Outgoing,
    StoredTensor,
    write_checkpoint,
)
from memtile.checkpoints.opening import files_beside
from memtile.convert.name_matching import tiles_by_layer
from memtile.convert.streaming import TensorSource, TiledSource
from memtile.errors import ArgumentError, CheckpointError, MemtileError
from memtile.geometry import Grid, Rect, Span
from memtile.layers import TiledLinear


@dataclass(frozen=True)
class TilingSpec:
    """How linears are cut.

    Args:
        modules: patterns of their names, as shells have them, such as "*.mlp.*".
        out_splits: rows of tiles.
        in_splits: columns of tiles.
        max_tile_bytes: the largest tile, in place of numbers of splits.

    Raises:
        ArgumentError: no size is given, or two, or no module.
    """

    modules: Collection[str]
    out_splits: int = 1
    in_splits: int = 1
    max_tile_bytes: int | None = None

    def __post_init__(self) -> None:
        is_split = self.out_splits != 1 or self.in_splits != 1
        if not self.modules or isinstance(self.modules, str):
            raise ArgumentError(
                f"modules={self.modules!r} must be patterns of names, such as ['*.mlp.*']: a "
                "checkpoint does not tell linears from embeddings"
            )
        size = self.max_tile_bytes
        is_size = type(size) is int and size >= 1
        if is_split == (size is not None) or not (is_size or size is None):
            raise ArgumentError(
                "a cut needs a size: out_splits and in_splits, or max_tile_bytes, in bytes, alone"
            )

    def grid(self, shape: tuple[int, int], element_bytes: int) -> Grid:
        """The grid of a weight (out, in)."""
        if self.max_tile_bytes is None:
            return Grid.uniform(*shape, self.out_splits, self.in_splits)
        return Grid.fewest(*shape, self.max_tile_bytes // element_bytes)


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    cut: TilingSpec | None = None,
    *,
    max_shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Write a checkpoint anew with other names, a few MiB at a time; values stay bit for bit.

    Tiles of any grid are joined; then, with a `cut`, the named linears are cut into tiles under the
    names of DeepSpeed's tiled linear. What lies beside the tensors (config, tokenizer) is copied as
    it is, and so are the bytes of a tensor that stays as it is, whatever its dtype.

    Args:
        source: a folder, a `.safetensors` file or an index.
        target: another folder.
        cut: which linears become tiles; None: none, the checkpoint is dense.
        max_shard_bytes: no file is larger, unless one tensor is.

    Returns:
        The names of the linears that were cut, or of those whose tiles were joined.

    Raises:
        ArgumentError: source and target are one, or the cut is none.
        CheckpointError: there is no checkpoint, tiles of it make no linear, or no linear of it has
            one of the names.
        SplitsError: a linear cannot be cut so.
        CheckpointWriteError: it could not be written; what was there is as it was.
    """
    if cut is not None and not isinstance(cut, TilingSpec):
        raise ArgumentError(
            f"the cut is a {type(cut).__name__}; give memtile.convert.TilingSpec(['*.mlp.*'], "
            "out_splits=4), or None for a dense checkpoint"
        )
    place, out = Path(source), Path(target)
    if out.resolve() in (place.resolve(), place.resolve().parent if place.is_file() else None):
        raise ArgumentError(f"{out} is where the checkpoint is; give another folder")
    checkpoint = Checkpoint.open(place)
    dense, joined = _dense(checkpoint)
    weights = {} if cut is None else _to_cut(dense, cut, place)
    tensors = [each for name, found in dense.items() for each in _outgoing(name, found, weights)]
    beside = files_beside(place) if place.is_dir() else {}
    write_checkpoint(out, tensors, max_shard_bytes=max_shard_bytes, beside=beside)
    return joined if cut is None else list(weights)


def _dense(checkpoint: Checkpoint) -> tuple[dict[str, TensorSource], list[str]]:
    """Every dense tensor by its name, tiles joined; and the layers that were in tiles."""
    tiles = tiles_by_layer(checkpoint)
    layer_of = {key: place for place, keyed in tiles.items() for key in keyed.values()}
    dense: dict[str, TensorSource] = {}
    for name, stored in checkpoint.items():
        if name not in layer_of:
            dense[name] = stored
            continue
        layer, own = layer_of[name]
        full = f"{layer}.{own}" if layer else own
        if full not in dense:
            dense[full] = _joined(full, checkpoint, tiles[layer, own])
    return dense, sorted({layer for layer, _ in tiles})


def _joined(name: str, checkpoint: Checkpoint, keyed: Mapping[tuple[int, int], str]) -> TiledSource:
    if name in checkpoint:
        raise CheckpointError(f"the checkpoint holds {name} both dense and in tiles; keep one")
    try:
        return TiledSource({place: checkpoint[key] for place, key in keyed.items()})
    except MemtileError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _to_cut(dense: Mapping[str, TensorSource], cut: TilingSpec, place: Path) -> dict[str, Grid]:
    """The grid of each linear that is to be cut, by its name."""
    found = {}
    for name, source in dense.items():
        layer, _, own = name.rpartition(".")
        if own == "weight" and len(source.shape) == 2 and _is_one(layer, cut.modules):
            found[layer] = cut.grid((source.shape[0], source.shape[1]), source.dtype.itemsize)
    for pattern in cut.modules:
        if not any(fnmatchcase(layer, pattern) for layer in found):
            linears = [n[: -len(".weight")] for n, s in dense.items() if n.endswith(".weight")]
            raise CheckpointError(
                f"{place} has no linear called {pattern!r}; it has {', '.join(linears[:_SHOWN])} "
                "and so on: memtile inspect lists all names"
            )
    return found


_SHOWN: Final = 4


def _is_one(layer: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(layer, pattern) for pattern in patterns)


def _outgoing(name: str, source: TensorSource, cut: Mapping[str, Grid]) -> Iterator[Outgoing]:
    layer, _, own = name.rpartition(".")
    grid = cut.get(layer)
    if grid is None or own not in ("weight", "bias"):
        yield _part(name, source, None)
        return
    last = grid.in_splits - 1
    for row, column in grid.indices():
        rect = grid.rect(row, column)
        if own == "weight" or column == last:
            tile = f"{layer}.{TiledLinear.tile_path(row, column)}.{own}"
            yield _part(tile, source, rect if own == "weight" else Rect(rect.out, Span(0, 1)))


def _part(name: str, source: TensorSource, rect: Rect | None) -> Outgoing:
    """A rectangle of a source, or all of it, under a name."""
    if isinstance(source, StoredTensor) and (rect is None or not source.shape):
        return Outgoing(name, source.entry.kind, source.shape, source.raw)
    if rect is None or not source.shape:
        return Outgoing(name, source.dtype, source.shape, lambda: _flat(source))
    shape = torch.Size(rect.shape if len(source.shape) == 2 else rect.shape[:1])
    return Outgoing(name, source.dtype, shape, lambda: _bands(source, rect))


def _flat(source: TensorSource) -> Iterator[Tensor]:
    step, size = PIECE_BYTES // source.dtype.itemsize, source.shape.numel()
    return (source.elements(i, min(i + step, size)) for i in range(0, size, step))


def _bands(source: TensorSource, rect: Rect) -> Iterator[Tensor]:
    height = max(1, PIECE_BYTES // (source.shape[1:].numel() * source.dtype.itemsize))
    for start in range(rect.out.start, rect.out.stop, height):
        rows = source.rows(start, min(start + height, rect.out.stop))
        yield (rows[:, rect.into.as_slice()] if rows.dim() == 2 else rows).contiguous()
