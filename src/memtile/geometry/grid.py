"""Spans, and the grid of one weight: out-spans × in-spans, one tile in each rectangle."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise, product
from operator import index
from typing import Final, SupportsIndex

from memtile.errors import SplitsError, TileShapeError

HUGE_PAGE: Final = 2 << 20
"""Bytes of a huge page on most machines; on others what is done for them is in vain."""


@dataclass(frozen=True, slots=True)
class Span:
    """The indices from `start` up to, not including, `stop`."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many indices the span holds."""
        return self.stop - self.start

    def overlap(self, other: "Span") -> "Span | None":
        """The indices that both spans hold, or None when there are none."""
        start, stop = max(self.start, other.start), min(self.stop, other.stop)
        return Span(start, stop) if start < stop else None

    def since(self, origin: int) -> "Span":
        """The same indices counted from `origin`."""
        return Span(self.start - origin, self.stop - origin)

    def as_slice(self) -> slice:
        """The span as an index of a tensor's dimension."""
        return slice(self.start, self.stop)


def partition_uniform(num_items: int, num_parts: int) -> list[int]:
    """The bounds that cut `num_items` into `num_parts` spans as even as possible.

    Args:
        num_items: how many indices there are, at least 0.
        num_parts: how many spans to make, at least 1.

    Returns:
        `num_parts + 1` bounds, from 0 to `num_items`; sizes differ by at most one, the longer
        spans first: `partition_uniform(10, 4) == [0, 3, 6, 8, 10]`.

    Raises:
        SplitsError: `num_parts` is below 1 or `num_items` below 0.

    Examples:
        >>> memtile.partition_uniform(10, 4)
        [0, 3, 6, 8, 10]
    """
    if num_parts < 1 or num_items < 0:
        raise SplitsError(
            f"partition_uniform(num_items={num_items}, num_parts={num_parts}): there must be at "
            "least one part and no fewer than 0 items; pass num_parts >= 1 and num_items >= 0"
        )
    size, longer = num_items // num_parts, num_items % num_parts  # divmod: no size of compilers
    return [part * size + min(part, longer) for part in range(num_parts + 1)]


def round_up(nbytes: int, page: int) -> int:
    """The number of bytes, or the address, rounded up to a multiple of `page`."""
    return -(-nbytes // page) * page


def spans_of(bounds: Sequence[int]) -> tuple[Span, ...]:
    """The spans between consecutive bounds."""
    return tuple(Span(start, stop) for start, stop in pairwise(bounds))


def spans_of_size(length: int, size: int) -> list[Span]:
    """Parts of this size, the last one smaller; one empty part of nothing."""
    starts = range(0, max(length, 1), size)
    return [Span(start, min(start + size, length)) for start in starts]


@dataclass(frozen=True, slots=True)
class Rect:
    """A rectangle of a weight of shape (out_features, in_features)."""

    out: Span
    into: Span

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the rectangle."""
        return self.out.size, self.into.size

    @property
    def index(self) -> tuple[slice, slice]:
        """The rectangle as an index of the dense weight."""
        return self.out.as_slice(), self.into.as_slice()

    def overlap(self, other: "Rect") -> "Rect | None":
        """The part that both rectangles hold, or None when there is none."""
        out, into = self.out.overlap(other.out), self.into.overlap(other.into)
        return Rect(out, into) if out and into else None

    def since(self, origin: "Rect") -> "Rect":
        """The same rectangle counted from the corner of `origin`."""
        return Rect(self.out.since(origin.out.start), self.into.since(origin.into.start))


@dataclass(frozen=True)
class Grid:
    """How a weight of shape (out_features, in_features) is cut into tiles."""

    out_parts: tuple[int, ...]  # bounds of the out-spans, from 0 to out_features
    in_parts: tuple[int, ...]  # bounds of the in-spans, from 0 to in_features

    @staticmethod
    def splits_of_mlp(inner: int, width: int, elements: int) -> int:
        """Into how many parts the intermediate dimension of an MLP is cut, one feature at least.

        A part of each layer, features by the `width` of the widest one's other side, has at most
        so many elements.
        """
        return -(-inner // max(1, elements // width))

    @classmethod
    def of_mlp(cls, rows: int, columns: int, inner: int, splits: int) -> "Grid":
        """The grid of gate, or up, or both one below the other: `inner` rows each in such parts."""
        return cls.split_stack(rows // inner, inner, columns, rows // inner * splits)

    @classmethod
    def uniform(
        cls,
        out_features: SupportsIndex,
        in_features: SupportsIndex,
        out_splits: SupportsIndex = 1,
        in_splits: SupportsIndex = 1,
    ) -> "Grid":
        """The grid of `out_splits` × `in_splits` tiles that are as even as possible.

        SplitsError unless each number of splits is a whole one from 1 to its number of features.
        """
        in_parts = _bounds("in", in_features, in_splits)
        return cls(_bounds("out", out_features, out_splits), in_parts)

    @classmethod
    def fewest(cls, out_features: int, in_features: int, max_elements: int) -> "Grid":
        """The grid with the fewest rows of tiles that keeps each at `max_elements` or fewer.

        Rows of the weight stay whole where they fit (row tiles are contiguous in a checkpoint and
        need no sums); a row that is itself too long is cut into as few columns as it needs.
        """
        if max_elements < 1:
            raise SplitsError(
                f"a tile of at most {max_elements} elements cannot hold anything; "
                "allow at least one element"
            )
        in_splits = -(-in_features // max_elements)
        rows = max(1, max_elements // -(-in_features // in_splits))
        return cls.uniform(out_features, in_features, -(-out_features // rows), in_splits)

    @classmethod
    def of_stack(cls, experts: int, rows: int, columns: int, max_elements: int) -> "Grid":
        """The grid of a stack of experts (rows, columns) that keeps tiles at `max_elements`.

        As many whole experts as fit make a tile, or equal parts of the rows of one; at least a row.
        """
        together = max_elements // (rows * columns)
        if together:
            return cls.split_stack(experts, rows, columns, -(-experts // together))
        parts = -(-rows // max(1, max_elements // columns))
        return cls.split_stack(experts, rows, columns, experts * parts)

    @classmethod
    def split_stack(
        cls, experts: int, rows: int, columns: int, out_splits: SupportsIndex
    ) -> "Grid":
        """The grid of `out_splits` row tiles whose bounds respect experts, or of slightly more.

        Up to `experts` tiles hold whole experts, numbers that differ by one at most. More are made
        by cutting the rows of every expert into the same number of parts, as even as possible.
        """
        whole = cls.uniform(experts * rows, columns, out_splits)  # checks the number
        if whole.out_splits <= experts:
            bounds = partition_uniform(experts, whole.out_splits)
            return cls(tuple(rows * bound for bound in bounds), whole.in_parts)
        within = partition_uniform(rows, min(rows, -(-whole.out_splits // experts)))[1:]
        cut = (expert * rows + bound for expert in range(experts) for bound in within)
        return cls((0, *cut), whole.in_parts)

    @classmethod
    def of_shapes(cls, shapes: Mapping[tuple[int, int], tuple[int, int]]) -> "Grid":
        """The grid that tiles of the given shapes make, keyed by (row, column).

        Checkpoints of other releases cut their spans in other ways: they are read, never assumed.
        TileShapeError where tiles are missing, or do not line up in rows and columns.
        """
        out_splits = 1 + max(row for row, _ in shapes)
        in_splits = 1 + max(column for _, column in shapes)
        missing = [
            (o, i) for o in range(out_splits) for i in range(in_splits) if (o, i) not in shapes
        ]
        if missing:
            raise TileShapeError(
                f"tiles {missing[:4]} of a {out_splits}×{in_splits} grid are missing"
            )
        for (row, column), shape in shapes.items():
            if shape != (shapes[row, 0][0], shapes[0, column][1]):
                raise TileShapeError(
                    f"tile ({row}, {column}) of shape {shape} does not line up with tile "
                    f"({row}, 0) of shape {shapes[row, 0]} and tile (0, {column}) of shape "
                    f"{shapes[0, column]}"
                )
        return cls(
            tuple(accumulate((shapes[o, 0][0] for o in range(out_splits)), initial=0)),
            tuple(accumulate((shapes[0, i][1] for i in range(in_splits)), initial=0)),
        )

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.out_parts[-1]

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.in_parts[-1]

    @property
    def out_splits(self) -> int:
        """How many rows of tiles there are."""
        return len(self.out_parts) - 1

    @property
    def in_splits(self) -> int:
        """How many columns of tiles there are."""
        return len(self.in_parts) - 1

    @cached_property
    def out_spans(self) -> tuple[Span, ...]:
        """The spans of the rows of tiles."""
        return spans_of(self.out_parts)

    @cached_property
    def in_spans(self) -> tuple[Span, ...]:
        """The spans of the columns of tiles."""
        return spans_of(self.in_parts)

    def rect(self, row: int, column: int) -> Rect:
        """The rectangle of the tile at (row, column)."""
        return Rect(self.out_spans[row], self.in_spans[column])

    def indices(self) -> Iterator[tuple[int, int]]:
        """(row, column) of every tile, row by row."""
        return ((o, i) for o in range(self.out_splits) for i in range(self.in_splits))

    def overlapping(self, rect: Rect) -> Iterator[tuple[tuple[int, int], Rect]]:
        """Every tile that shares elements with `rect`: its index and the shared rectangle."""
        rows = [o for o, span in enumerate(self.out_spans) if span.overlap(rect.out)]
        columns = [i for i, span in enumerate(self.in_spans) if span.overlap(rect.into)]
        for place in product(rows, columns):
            shared = self.rect(*place).overlap(rect)
            assert shared is not None
            yield place, shared

    def __str__(self) -> str:
        return f"{self.out_splits}×{self.in_splits}"


def _bounds(side: str, features: SupportsIndex, splits: SupportsIndex) -> tuple[int, ...]:
    features_name, splits_name = f"{side}_features", f"{side}_splits"
    items = _whole_number(features_name, features, "of at least 1")
    parts = _whole_number(splits_name, splits, f"from 1 to {features_name}={items}")
    if items < 1:
        raise SplitsError(
            f"{features_name}={items} leaves nothing to cut: a weight has at least one row and one "
            f"column; pass {features_name} >= 1"
        )
    if not 1 <= parts <= items:
        raise SplitsError(
            f"{splits_name}={parts} is outside [1, {features_name}={items}]: every tile needs at "
            f"least one feature; choose {splits_name} between 1 and {items}"
        )
    return tuple(partition_uniform(items, parts))


def _whole_number(name: str, value: SupportsIndex, rule: str) -> int:
    """The int that a value is an index for, as numpy's integers are; True and 2.0 are none."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise SplitsError(f"{name}={value!r} must be a whole number {rule}")
    return index(value)
