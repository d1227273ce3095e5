"""A layout: which weights are parked and in which grid; the rest is resident."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from memtile.geometry import Grid, round_up
from memtile.planning.counted import Weight


@dataclass(frozen=True)
class Rings:
    """The buffers of fixed number that a home which is not worked on in place needs.

    Args:
        weights: slabs for tiles in forward and backward.
        gradients: slabs for gradients on their way home.
        steps: slabs for what the optimizer works on.
        page: bytes that rooms are multiples of.
        fault_bytes: what the kernel maps around a page that is read through a mapping.
    """

    weights: int
    gradients: int
    steps: int
    page: int
    fault_bytes: int

    def room(self, nbytes: int) -> int:
        """Bytes, rounded up to pages."""
        return round_up(nbytes, self.page)


@dataclass(frozen=True)
class Layout:
    """Every weight of a model, and the grids of those that are parked.

    Args:
        weights: all of them, in the model's order.
        grids: by the name of the weight's first module.
    """

    weights: tuple[Weight, ...]
    grids: Mapping[str, Grid]

    def grid_of(self, weight: Weight) -> Grid | None:
        """Its grid; None where it is resident."""
        return self.grids.get(weight.names[0])

    @property
    def parked(self) -> tuple[Weight, ...]:
        """The weights that are parked."""
        return tuple(weight for weight in self.weights if weight.names[0] in self.grids)

    @property
    def resident(self) -> tuple[Weight, ...]:
        """The weights that stay in memory."""
        return tuple(weight for weight in self.weights if weight.names[0] not in self.grids)

    @property
    def tiles(self) -> int:
        """How many tiles there are."""
        return sum(grid.out_splits * grid.in_splits for grid in self.grids.values())

    def tile_elements(self, weight: Weight) -> Iterator[int]:
        """Elements of each of its tiles."""
        grid = self.grids[weight.names[0]]
        for index in grid.indices():
            rows, columns = grid.rect(*index).shape
            yield rows * columns

    def largest_tile(self, weight: Weight) -> int:
        """Elements of its largest tile: the first, since the longer spans come first."""
        rows, columns = self.grids[weight.names[0]].rect(0, 0).shape
        return rows * columns
