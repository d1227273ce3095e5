"""`convert_checkpoint`: changes dense tensors of a checkpoint into tiles and back, without a model.

A tile is known by its name, which ends in `linears.{row}.{column}.weight` or `.bias`. The caller
says what becomes tiles, since a name does not tell a linear from an embedding. How many experts the
tiles of a stack hold is known from the model that a `config.json` beside them describes.
"""

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from memtile.checkpoints import (
    SHARD_BYTES,
    Checkpoint,
    Outgoing,
    StoredTensor,
    write_checkpoint,
)
from memtile.checkpoints.opening import as_path, files_beside
from memtile.convert.kinds import integrations
from memtile.convert.name_matching import tiles_by_layer
from memtile.convert.streaming import TensorSource, TiledSource, spans, written
from memtile.errors import ArgumentError, CheckpointError, MemtileError
from memtile.geometry import Grid, Rect, Span
from memtile.layers import TiledLinear, TiledStack


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
    names of DeepSpeed's tiled linear. Files beside the tensors (config, tokenizer) are copied, and
    so are the bytes of a tensor that is neither joined nor cut, whatever its dtype. Known
    checksums are verified before anything is written, which reads the checkpoint once more.

    Args:
        source: a folder, a `.safetensors` file or an index.
        target: another folder.
        cut: which linears become tiles; None: none, the checkpoint is dense.
        max_shard_bytes: no file is larger, unless one tensor is.

    Returns:
        The names of the linears that were cut, or of the layers whose tiles were joined.

    Raises:
        ArgumentError: source and target are no paths, or the same, or `cut` is not a `TilingSpec`.
        CheckpointError: there is no checkpoint, it is damaged, tiles of it make no linear or no
            stack of experts of the config's model, or no linear of it has one of the names.
        SplitsError: a linear cannot be cut so.
        CheckpointWriteError: it could not be written; what was there is unchanged.
    """
    if cut is not None and not isinstance(cut, TilingSpec):
        raise ArgumentError(
            f"the cut is a {type(cut).__name__}; give memtile.convert.TilingSpec(['*.mlp.*'], "
            "out_splits=4), or None for a dense checkpoint"
        )
    place, out = as_path("source", source), as_path("target", target)
    if out.resolve() in (place.resolve(), place.resolve().parent if place.is_file() else None):
        raise ArgumentError(f"{out} is where the checkpoint is; give another folder")
    checkpoint = Checkpoint.open(place)
    dense, joined = _dense(checkpoint, place)
    weights = {} if cut is None else _to_cut(dense, cut, place)
    tensors = [each for name, found in dense.items() for each in _outgoing(name, found, weights)]
    beside = files_beside(place) if place.is_dir() else {}
    checkpoint.check_sums()  # or damaged bytes would get valid checksums
    write_checkpoint(out, tensors, max_shard_bytes=max_shard_bytes, beside=beside)
    return joined if cut is None else list(weights)


def _dense(checkpoint: Checkpoint, place: Path) -> tuple[dict[str, TensorSource], list[str]]:
    """Every dense tensor by its name, tiles joined; and the layers that were in tiles."""
    tiles = tiles_by_layer(checkpoint)
    place_of = {key: place for place, keyed in tiles.items() for key in keyed.values()}
    shapes = _shapes_beside(place) if any(map(_is_of_stack, place_of)) else {}
    dense: dict[str, TensorSource] = {}
    joined = set[str]()
    for key, stored in checkpoint.items():
        layer = place_of.get(key)
        name = ".".join(filter(None, layer)) if layer else key
        if layer is None:
            dense[name] = stored
        elif name in checkpoint:
            raise CheckpointError(f"the checkpoint holds {name} both dense and in tiles; keep one")
        elif name not in dense:
            try:
                source = TiledSource({i: checkpoint[k] for i, k in tiles[layer].items()})
            except MemtileError as error:
                raise CheckpointError(f"{name}: {error}") from error
            is_stack = _is_of_stack(key)
            dense[name] = _joined_stack(name, source, shapes) if is_stack else source
            joined.add(name if is_stack else layer[0])
    return dense, sorted(joined)


@dataclass(frozen=True)
class _StackSource:
    """A stack of experts (E, R, C): the matrix (E·R, C) that its tiles make, element by element."""

    matrix: TiledSource
    shape: torch.Size

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    def elements(self, start: int, stop: int) -> Tensor:
        return self.matrix.elements(start, stop)

    def rows(self, start: int, stop: int) -> Tensor:
        _, rows, columns = self.shape
        return self.matrix.rows(start * rows, stop * rows).view(-1, rows, columns)


def _is_of_stack(key: str) -> bool:
    return TiledStack.tile_pattern.search(key) is not None


def _shapes_beside(place: Path) -> dict[str, torch.Size]:
    """The shapes of the parameters of the model that the config beside a checkpoint describes."""
    folder = place if place.is_dir() else place.parent
    if not (folder / "config.json").is_file():
        return {}
    for integration in integrations(imported_only=False):
        model = integration.empty(folder, None)
        if model is not None:
            named = model.named_parameters(remove_duplicate=False)
            return {name: parameter.shape for name, parameter in named}
    return {}


def _joined_stack(name: str, source: TiledSource, shapes: Mapping[str, torch.Size]) -> _StackSource:
    """The stack of the matrix (E·R, C), which has one of the shapes of a model's parameters."""
    if not shapes:
        raise CheckpointError(
            f"{name} is a stack of experts in tiles, and how many experts they are is not known: "
            "put the model's config.json beside the checkpoint (and have transformers installed), "
            "or load it into the tiled model with memtile.load_checkpoint(model, folder), and "
            "write that with memtile.save_checkpoint(model, folder)"
        )
    shape = shapes.get(name, torch.Size())
    if len(shape) != 3 or (shape[0] * shape[1], shape[2]) != tuple(source.shape):
        known = f"{tuple(shape)} there" if shape else "not there"
        raise CheckpointError(
            f"{name}: the tiles are experts of {tuple(source.shape)} rows and columns together, no "
            f"stack of the model that the config.json beside them describes ({known}); put the "
            "config of this checkpoint's model there"
        )
    return _StackSource(source, shape)


def _to_cut(dense: Mapping[str, TensorSource], cut: TilingSpec, place: Path) -> dict[str, Grid]:
    """The grid of each linear that is to be cut, by its name."""
    found = {}
    for name, source in dense.items():
        layer, _, own = name.rpartition(".")
        is_named = any(fnmatchcase(layer, pattern) for pattern in cut.modules)
        if own == "weight" and len(source.shape) == 2 and is_named:
            found[layer] = cut.grid((source.shape[0], source.shape[1]), source.dtype.itemsize)
    for pattern in cut.modules:
        if not any(fnmatchcase(layer, pattern) for layer in found):
            linears = [name.removesuffix(".weight") for name in dense if name.endswith(".weight")]
            raise CheckpointError(
                f"{place} has no linear called {pattern!r}; it has {', '.join(linears[:4])} "
                "and so on: memtile inspect lists all names"
            )
    return found


def _outgoing(name: str, source: TensorSource, cut: Mapping[str, Grid]) -> Iterator[Outgoing]:
    """A tensor under its dense name; or, of a linear that is cut, each of its tiles."""
    layer, _, own = name.rpartition(".")
    grid = cut.get(layer)
    if grid is None or own not in ("weight", "bias") or not source.shape:
        if isinstance(source, _StackSource):
            yield written(name, source)
        elif isinstance(source, StoredTensor):
            yield Outgoing(name, source.entry.kind, source.shape, source.raw)
        else:
            yield _part(name, source, Rect(Span(0, source.shape[0]), Span(0, source.shape[-1])))
        return
    last = grid.in_splits - 1
    for row, column in grid.indices():
        if own == "weight" or column == last:
            tile = f"{layer}.{TiledLinear.tile_path(row, column)}.{own}"
            yield _part(tile, source, grid.rect(row, column))


def _part(name: str, source: TensorSource, rect: Rect) -> Outgoing:
    """A rectangle of a matrix, or its rows of a bias, under a name."""
    shape = torch.Size(rect.shape[: len(source.shape)])
    return Outgoing(name, source.dtype, shape, lambda: _bands(source, rect))


def _bands(source: TensorSource, rect: Rect) -> Iterator[Tensor]:
    row_bytes = source.shape[1:].numel() * source.dtype.itemsize
    for start, stop in spans(rect.out.stop, row_bytes, rect.out.start):
        rows = source.rows(start, stop)
        yield (rows[:, rect.into.as_slice()] if rows.dim() == 2 else rows).contiguous()
