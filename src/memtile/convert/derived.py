"""Tensors that a function makes of stored ones, known by their rows before anything is read.

The function is run on the meta device first, which gives shapes, and then on probes: integers that
number the elements of its sources, with the last dimension shortened. Where all rows of a result
are rows of the sources, it is a `RowMap`, which reads only what is asked for. Anything else is
`Computed`: for one call of the function at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from memtile.convert.streaming import TensorSource

Shown = Callable[[Tensor], Tensor]
"""What a function sees in place of a tensor that it looks at: a probe, or the tensor itself."""

Make = Callable[[dict[str, Tensor], Shown], Mapping[str, Tensor]]
"""Makes tensors of tensors. It moves rows by their numbers alone, whatever their values and width;
or it computes, and then gives no integers in steps of one for integers in steps of one."""

_WIDTH: Final = 4  # of probes; in a row of 2, swapping halves of the row would change nothing
_LONG: Final = 8  # rows of a run, on average, from which on each run is read by itself
_DENSE: Final = 4  # a range of source rows is read whole where it has at most 4 times those needed


@dataclass
class Latest:
    """The results of the last call of a function; the ones before are dropped."""

    of: object = None
    values: Mapping[str, Tensor] = field(default_factory=dict)


def derived(
    sources: Mapping[str, TensorSource], make: Make, dtype: torch.dtype | None, latest: Latest
) -> dict[str, "RowMap | Computed"]:
    """Where the values of what `make` makes of the sources are read, by its names.

    Args:
        sources: by the names that `make` knows them by.
        make: gives the same names and shapes whenever it is called.
        dtype: of the sources when they come to `make`; None: their own.
        latest: holds what was computed, of one call, for all that share it.
    """
    with torch.no_grad():
        blank = {
            name: torch.empty(source.shape, dtype=dtype or source.dtype, device="meta")
            for name, source in sources.items()
        }
        made = make(blank, lambda tensor: tensor)
        maps = _row_maps(sources, make, made)
    results = sum(like.nbytes for like in made.values())
    call = _Call(dict(sources), make, dtype, latest, results)
    found: dict[str, RowMap | Computed] = {
        name: maps.get(name) or Computed(call, name, like) for name, like in made.items()
    }
    for name, source in found.items():
        source.block = call, made[name].untyped_storage()._cdata
    return found


@dataclass(frozen=True, eq=False)
class _Call:
    sources: Mapping[str, TensorSource]
    make: Make
    dtype: torch.dtype | None
    latest: Latest
    result_bytes: int

    @property
    def nbytes(self) -> int:
        sizes = [(source.shape.numel(), source.dtype.itemsize) for source in self.sources.values()]
        cast = None if self.dtype is None else self.dtype.itemsize
        read = sum(count * (cast or size) for count, size in sizes)
        stored = max((count * size for count, size in sizes), default=0) if cast else 0
        return read + stored + self.result_bytes

    @torch.no_grad()
    def values(self) -> Mapping[str, Tensor]:
        if self.latest.of is not self:
            self.latest.of, self.latest.values = None, {}  # freed before more is read
            read = {name: self._read(source) for name, source in self.sources.items()}
            self.latest.values = self.make(read, lambda tensor: tensor)
            self.latest.of = self
        return self.latest.values

    def _read(self, source: TensorSource) -> Tensor:
        values = source.elements(0, source.shape.numel()).view(source.shape)
        return values if self.dtype is None else values.to(self.dtype)


class Computed:
    """A tensor whose values are computed, from all of its sources, when they are read.

    `block` is equal for those that share one memory when all are made at once.
    """

    block: tuple[object, int]

    def __init__(self, call: _Call, name: str, like: Tensor) -> None:
        self._call, self._name = call, name
        self.shape, self.dtype = like.shape, like.dtype
        self.sources = tuple(call.sources.values())

    @property
    def call_bytes(self) -> int:
        """The memory that the call takes: its sources and its results, and one source as stored."""
        return self._call.nbytes

    def elements(self, start: int, stop: int) -> Tensor:
        """Elements of the flattened tensor."""
        return self._call.values()[self._name].reshape(-1)[start:stop]

    def rows(self, start: int, stop: int) -> Tensor:
        """Whole rows."""
        return self._call.values()[self._name][start:stop]


@dataclass(frozen=True)
class Piece:
    """Elements that follow one another in a source: so many from the first on."""

    source: TensorSource
    first: int
    count: int


class RowMap:
    """A tensor whose rows are rows of other tensors.

    Args:
        sources: of one width, of one dtype, or else all are read as the given dtype.
        runs: (runs, 3) int64: the first row here, the number of the source, the first row there;
            in order of the first.
        shape: of the tensor.
        width: elements of a row.
        dtype: of the values.

    `block` is that of `Computed`.
    """

    block: tuple[object, int]

    def __init__(
        self,
        sources: Sequence[TensorSource],
        runs: Tensor,
        shape: torch.Size,
        width: int,
        dtype: torch.dtype,
    ) -> None:
        self.sources = tuple(sources)
        self.shape, self.dtype = shape, dtype
        self._starts, self._source, self._first = (column.contiguous() for column in runs.t())
        self._width, self._count = width, shape.numel() // width

    def elements(self, start: int, stop: int) -> Tensor:
        """Elements of the flattened tensor, in new memory."""
        first, last = start // self._width, -(-stop // self._width)
        ends = torch.tensor([first, last - 1])
        runs = torch.searchsorted(self._starts, ends, right=True)
        read = self._long_runs if runs.diff() < (last - first) // _LONG else self._short_runs
        return read(first, last).view(-1)[start - first * self._width : stop - first * self._width]

    def rows(self, start: int, stop: int) -> Tensor:
        """Whole rows, in new memory."""
        inner = self.shape[1:].numel()
        return self.elements(start * inner, stop * inner).view(stop - start, *self.shape[1:])

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """Where elements of the flattened tensor lie, in order; whole rows are asked for."""
        row, last = start // self._width, stop // self._width
        run = int(torch.searchsorted(self._starts, row, right=True)) - 1
        while row < last:
            ends = [*self._starts[run + 1 : run + 2].tolist(), self._count]
            count = min(ends[0], last) - row
            there = int(self._first[run]) + row - int(self._starts[run])
            source = self.sources[int(self._source[run])]
            yield Piece(source, there * self._width, count * self._width)
            row, run = row + count, run + 1

    def _long_runs(self, first: int, last: int) -> Tensor:
        read = [
            piece.source.elements(piece.first, piece.first + piece.count).to(self.dtype)
            for piece in self.pieces(first * self._width, last * self._width)
        ]
        return torch.cat(read) if len(read) > 1 else read[0]

    def _short_runs(self, first: int, last: int) -> Tensor:
        rows = torch.arange(first, last)
        run = torch.searchsorted(self._starts, rows, right=True) - 1
        numbers, sources = self._first[run] + rows - self._starts[run], self._source[run]
        out = torch.empty(last - first, self._width, dtype=self.dtype)
        for source in sources.unique().tolist():
            mine = (sources == source).nonzero().flatten()
            self._gather(self.sources[source], numbers[mine], mine, out)
        return out

    def _gather(self, source: TensorSource, numbers: Tensor, into: Tensor, out: Tensor) -> None:
        """Read rows of a source into rows of a tensor, with what lies between if that is little."""
        low, high = int(numbers.min()), int(numbers.max()) + 1
        if high - low <= _DENSE * len(numbers):
            block = source.elements(low * self._width, high * self._width).view(-1, self._width)
            out[into] = block[numbers - low].to(self.dtype)
            return
        for number, row in zip(numbers.tolist(), into.tolist(), strict=True):
            out[row] = source.elements(number * self._width, (number + 1) * self._width)


def pieces_of(source: TensorSource, start: int, stop: int) -> Iterator[Piece]:
    """Where elements of a flattened tensor lie, in order: whole rows of it are asked for."""
    if isinstance(source, RowMap):
        return source.pieces(start, stop)
    return iter([Piece(source, start, stop - start)])


def _row_maps(
    sources: Mapping[str, TensorSource], make: Make, made: Mapping[str, Tensor]
) -> dict[str, RowMap]:
    """Which of the results consist of rows of the sources."""
    widths = {source.shape[-1] if len(source.shape) > 1 else 0 for source in sources.values()}
    if len(widths) != 1 or not (width := widths.pop()):
        return {}
    starts, probes, row = [], {}, 1  # zeros are no row
    for name, source in sources.items():
        starts.append(row)
        probes[name] = _probe(source.shape, row)
        row += source.shape[:-1].numel()
    try:
        found = make(probes, _narrowed)
    except Exception:  # whatever it raises: it is not made for rows of another width
        return {}
    dtypes = {source.dtype for source in sources.values()}
    maps = {}
    for name, like in made.items():
        runs = _runs(found.get(name), torch.tensor([*starts, row]), min(width, _WIDTH))
        if runs is not None and runs[1] * width == like.numel():
            dtype = dtypes.copy().pop() if len(dtypes) == 1 else like.dtype
            maps[name] = RowMap(list(sources.values()), runs[0], like.shape, width, dtype)
    return maps


def _probe(shape: torch.Size, first_row: int) -> Tensor:
    width, rows = min(shape[-1], _WIDTH), shape[:-1].numel()
    last = (first_row + rows) * width
    dtype = torch.int32 if last < torch.iinfo(torch.int32).max else torch.int64
    return torch.arange(first_row * width, last, dtype=dtype).view(*shape[:-1], width)


def _narrowed(tensor: Tensor) -> Tensor:
    """A tensor of no values that stands beside probes."""
    shape = tensor.shape
    if len(shape) > 1:
        shape = torch.Size([*shape[:-1], min(shape[-1], _WIDTH)])
    return torch.empty(shape, dtype=torch.int32, device="meta")


def _runs(probe: Tensor | None, starts: Tensor, width: int) -> tuple[Tensor, int] | None:
    """The runs of a result, and its rows; None where it does not consist of rows."""
    if probe is None or probe.dtype not in (torch.int32, torch.int64) or probe.numel() % width:
        return None
    rows = probe.reshape(-1, width)
    in_order = torch.arange(width, dtype=rows.dtype).expand_as(rows)
    numbers = rows[:, 0].long() // width
    is_whole = torch.equal(rows - rows[:, :1], in_order) and not (rows[:, 0] % width).any()
    if not is_whole or not len(numbers) or numbers.min() < 1 or numbers.max() >= starts[-1]:
        return None
    source = torch.searchsorted(starts, numbers, right=True) - 1
    goes_on = (numbers[1:] == numbers[:-1] + 1) & (source[1:] == source[:-1])
    begins = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + (~goes_on).nonzero().flatten()])
    there = numbers[begins] - starts[source[begins]]
    return torch.stack([begins, source[begins], there], dim=1), len(numbers)
