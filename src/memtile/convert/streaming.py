"""The values of one dense tensor between a file and the tiles that hold them, a few MiB at a time.

Where tiles are rows of the dense tensor, parked ones are read and written past their mapping.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from memtile.checkpoints import PIECE_BYTES, Outgoing, StoredTensor
from memtile.errors import CheckpointError, NotFiniteError
from memtile.geometry import Grid, Rect, Span
from memtile.homes import PAGE, aligned_buffer, evict, pieces, streamed_allocation
from memtile.optim import DenseParameter, Part, is_finite
from memtile.transfer import catch_up

Index = tuple[int, int]
Held = Callable[[Part], Tensor]  # which tensor of a part is meant: its values, a moment


class TensorSource(Protocol):
    """Where the values of one dense tensor are read."""

    @property
    def shape(self) -> torch.Size:
        """The shape of the dense tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored values."""

    def elements(self, start: int, stop: int) -> Tensor:
        """Elements of the flattened tensor."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Whole rows."""


def stored_tensors(source: object) -> Iterator[StoredTensor]:
    """The tensors of files that a source is read from."""
    if isinstance(source, StoredTensor):
        yield source
    for other in getattr(source, "sources", ()):
        yield from stored_tensors(other)


class TiledSource:
    """The dense matrix, or bias, that stored tiles make; the tiles of a bias are one column."""

    def __init__(self, tiles: Mapping[Index, StoredTensor]) -> None:
        self.tiles = tiles
        dtypes = {tile.dtype for tile in tiles.values()}
        ranks = {len(tile.shape) for tile in tiles.values()}
        if len(dtypes) > 1:
            raise CheckpointError(f"the tiles are {' and '.join(sorted(map(str, dtypes)))}")
        if ranks not in ({1}, {2}):
            raise CheckpointError("the tiles are neither matrices nor vectors")
        (self.dtype,), (rank,) = dtypes, ranks
        self.grid = Grid.of_shapes(
            {i: (tile.shape[0], tile.shape[1] if rank == 2 else 1) for i, tile in tiles.items()}
        )
        whole = (self.grid.out_features, self.grid.in_features)
        self.shape = torch.Size(whole[:rank])
        self.sources = tuple(tiles.values())

    def elements(self, start: int, stop: int) -> Tensor:
        """Elements of the flattened tensor, in new memory."""
        width = self.grid.in_features
        first, last = start // width, -(-stop // width)
        return self.rows(first, last).view(-1)[start - first * width : stop - first * width]

    def rows(self, start: int, stop: int) -> Tensor:
        """Whole rows, in new memory."""
        place = Rect(Span(start, stop), Span(0, self.grid.in_features))
        out = torch.empty(place.shape, dtype=self.dtype)
        for index, common in self.grid.overlapping(place):
            rows = common.since(self.grid.rect(*index)).out
            part = self.tiles[index].rows(rows.start, rows.stop)
            out[common.since(place).index] = part.view(rows.size, -1)
        return out.view(stop - start, *self.shape[1:])


class ModelSource:
    """A dense tensor of a model, read where its parts are.

    Args:
        dense: the tensor and its parts.
        name: for messages.
    """

    def __init__(self, dense: DenseParameter, name: str) -> None:
        self.dense = dense
        self.shape, self.dtype = dense.shape, _common_dtype(dense, name, values_of)
        starts = [first_element(dense, part) for part in dense.parts]
        self._has_gaps = None in starts
        self._starts = [start or 0 for start in starts]  # in order: parts are in their grid's

    def elements(self, start: int, stop: int) -> Tensor:
        """Elements of the flattened tensor, in new memory."""
        if self._has_gaps:
            width = self.shape[1]
            first, last = start // width, -(-stop // width)
            return self._band(first, last).view(-1)[start - first * width : stop - first * width]
        out = torch.empty(stop - start, dtype=self.dtype)
        for number in range(bisect_right(self._starts, start) - 1, len(self._starts)):
            held, begin = self.dense.parts[number].parameter, self._starts[number]
            if begin >= stop:
                break
            first, last = max(start, begin), min(stop, begin + held.numel())
            out[first - start : last - start] = _flat_range(held, first - begin, last - begin)
        return out

    def rows(self, start: int, stop: int) -> Tensor:
        """Whole rows, in new memory."""
        inner = self.shape[1:].numel()
        return self.elements(start * inner, stop * inner).view(stop - start, *self.shape[1:])

    def _band(self, start: int, stop: int) -> Tensor:
        band = torch.empty(stop - start, self.shape[1], dtype=self.dtype)
        for in_band, in_part in _crossing(self.dense.parts, values_of, start, band):
            in_band.copy_(in_part)
        return band


def _flat_range(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Elements of a flattened parameter; of a parked one they are read past its mapping."""
    allocation, size = streamed_allocation(tensor), tensor.element_size()
    if allocation is None:
        return tensor.detach().reshape(-1)[start:stop].cpu()
    page = start * size // PAGE * PAGE
    buffer = aligned_buffer(stop * size - page)
    allocation.read(buffer, page)
    return buffer[start * size - page : stop * size - page].view(tensor.dtype)


def written(name: str, source: TensorSource) -> Outgoing:
    """A tensor that is to be written under a name, from where it is read."""
    if isinstance(source, ModelSource):
        return outgoing(source.dense, name)

    def flow() -> Iterator[Tensor]:
        for piece in spans(source.shape.numel(), source.dtype.itemsize):
            yield source.elements(*piece)

    block = getattr(source, "block", None)
    return Outgoing(name, source.dtype, source.shape, flow, block)


def spans(stop: int, unit_bytes: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """Consecutive (start, stop) of at most `PIECE_BYTES`, in units: elements, or rows."""
    step = max(1, PIECE_BYTES // max(1, unit_bytes))
    return ((first, min(first + step, stop)) for first in range(start, stop, step))


def values_of(part: Part) -> Tensor:
    """The parameter itself, not its data: only the parameter is known to be parked."""
    return part.parameter


def outgoing(dense: DenseParameter, name: str, held: Held = values_of) -> Outgoing:
    """One dense tensor that is to be written, from what is held for each part."""
    dtype = _common_dtype(dense, name, held)

    def flow() -> Iterable[Tensor]:
        starts = [first_element(dense, part) for part in dense.parts]
        if None not in starts and starts == sorted(starts, key=lambda start: start or 0):
            return chain.from_iterable(_flat_pieces(held(part)) for part in dense.parts)
        return _joined_bands(dense, held, dtype)

    return Outgoing(name, dtype, dense.shape, flow)


def finite(tensor: Outgoing) -> Outgoing:
    """The same, whose pieces raise NotFiniteError where a value is not finite."""

    def flow() -> Iterator[Tensor]:
        for piece in tensor.pieces():
            check_finite(tensor.name, piece)
            yield piece

    return replace(tensor, pieces=flow)


def check_finite(name: str, values: Tensor) -> None:
    """Refuse to save a NaN or an infinity."""
    if not is_finite(values):
        raise NotFiniteError(
            f"{name} is not finite; a run cannot go on from it, so nothing was saved, and what was "
            "saved before is as it was: go back to it with a lower lr, or pass check_finite=False"
        )


def _common_dtype(dense: DenseParameter, name: str, held: Held) -> torch.dtype:
    tensors = [held(part) for part in dense.parts]
    dtypes = sorted({str(tensor.dtype) for tensor in tensors})
    if len(dtypes) > 1:
        raise CheckpointError(
            f"the tiles of {name} are {' and '.join(dtypes)}; a dense tensor has one dtype: "
            "convert the layer with .to(dtype) first"
        )
    for part, tensor in zip(dense.parts, tensors, strict=True):
        expected = dense.shape if part.rect is None else part.rect.shape
        if tensor.numel() != math.prod(expected):
            raise CheckpointError(
                f"a tile of {name} is {tuple(tensor.shape)} and should be {tuple(expected)}: it is "
                "a shard of a parallel linear; save each rank's own state dict"
            )
    return tensors[0].dtype


@torch.no_grad()
def bring_in(dense: DenseParameter, source: TensorSource, held: Held = values_of) -> None:
    """Write a source's values into what is held for each part, in place, converting the dtype."""
    catch_up(part.parameter for part in dense.parts)
    starts = [(part, first_element(dense, part)) for part in dense.parts]
    for part, start in starts:
        if start is not None:
            _write_flat(held(part), source, start)
    with_gaps = [part for part, start in starts if start is None]
    if with_gaps:
        for first, last in spans(dense.shape[0], dense.shape[1] * source.dtype.itemsize):
            band = source.rows(first, last)
            for in_band, in_part in _crossing(with_gaps, held, first, band):
                in_part.copy_(in_band)
    for part in dense.parts:
        torch.autograd.graph.increment_version(part.parameter)


def first_element(dense: DenseParameter, part: Part) -> int | None:
    """The flat element of the dense tensor where a part begins; None where it is not contiguous."""
    if part.rect is None:
        return 0
    if len(dense.shape) == 1:
        return part.rect.out.start
    width = dense.shape[-1]
    if part.transposed or part.rect.into != Span(0, width):
        return None
    return part.rect.out.start * width


def _flat_pieces(tensor: Tensor) -> Iterator[Tensor]:
    allocation = streamed_allocation(tensor)
    if allocation is None:
        flat = tensor.detach().contiguous().view(-1)
        yield from (piece.cpu() for piece in flat.split(PIECE_BYTES // tensor.element_size()))
        return
    for start, piece in pieces(allocation.nbytes):
        allocation.read(piece, start)
        used = min(piece.numel(), allocation.nbytes - start)
        yield piece[:used].view(tensor.dtype)


def _write_flat(tensor: Tensor, source: TensorSource, first: int) -> None:
    allocation = streamed_allocation(tensor)
    size = tensor.element_size()
    if allocation is not None:
        for start, piece in pieces(allocation.nbytes):
            used = min(piece.numel(), allocation.nbytes - start)
            values = source.elements(first + start // size, first + (start + used) // size)
            piece[:used].view(tensor.dtype).copy_(values)
            allocation.write(piece, start)
    elif tensor.is_contiguous():
        flat = tensor.view(-1)
        for start, stop in spans(flat.numel(), source.dtype.itemsize):
            flat[start:stop].copy_(source.elements(first + start, first + stop))
    else:
        tensor.copy_(source.elements(first, first + tensor.numel()).view(tensor.shape))


def _joined_bands(dense: DenseParameter, held: Held, dtype: torch.dtype) -> Iterator[Tensor]:
    for start, stop in spans(dense.shape[0], dense.shape[1] * dtype.itemsize):
        band = torch.empty(stop - start, dense.shape[1], dtype=dtype)
        for in_band, in_part in _crossing(dense.parts, held, start, band):
            in_band.copy_(in_part)
        yield band


def _crossing(
    parts: Iterable[Part], held: Held, start: int, band: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """What a band of dense rows and each part have in common: (view of the band, of the part)."""
    rows, columns = Span(start, start + band.shape[0]), Span(0, band.shape[1])
    for part in parts:
        assert part.rect is not None
        place = Rect(columns, rows) if part.transposed else Rect(rows, columns)
        common = part.rect.overlap(place)
        if common is not None:
            tensor, matrix = held(part), band.t() if part.transposed else band
            in_part = tensor.detach()[common.since(part.rect).index]
            yield matrix[common.since(place).index], in_part
            evict(tensor)
