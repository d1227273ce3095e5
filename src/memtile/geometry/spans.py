"""Spans: half-open ranges of indices along one dimension; and rounding up to pages."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from memtile.errors import SplitsError


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
    """
    if num_parts < 1 or num_items < 0:
        raise SplitsError(
            f"partition_uniform(num_items={num_items}, num_parts={num_parts}): there must be at "
            "least one part and no fewer than 0 items; pass num_parts >= 1 and num_items >= 0"
        )
    size, longer = divmod(num_items, num_parts)
    return [part * size + min(part, longer) for part in range(num_parts + 1)]


def round_up(nbytes: int, page: int) -> int:
    """The number of bytes, or the address, rounded up to a multiple of `page`."""
    return -(-nbytes // page) * page


def spans_of(bounds: Sequence[int]) -> tuple[Span, ...]:
    """The spans between consecutive bounds."""
    return tuple(Span(start, stop) for start, stop in pairwise(bounds))
