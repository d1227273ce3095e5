"""Records of a model and of one step of it: weights, tiles, counted bytes and operations."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from memtile.geometry import Grid


class Activations(NamedTuple):
    """What a step does with activations, the tensors that its backward needs.

    In the order of tuples the largest does most to save memory.
    """

    parked: bool = False  # those that are kept live in the home
    mlps_in_tiles: bool = False  # those inside of MLPs are never whole (`memtile.tile_mlps`)
    recomputed: bool = False  # by gradient checkpointing


def in_turn(choices: Sequence[Activations]) -> list[list[Activations]]:
    """These choices in the order in which they are tried: first those that do least, together.

    Those with MLPs in tiles, and those that park activations, come one by one where nothing else
    fits, with recomputation if there is one: their times are less certain, and alone they take as
    long and save less (SmolLM2, 1024 tokens: recomputed 1.23 of the time, MLPs in tiles 1.22, both
    1.34; parked 1.31). What is parked without recomputation is twenty times as much: never, where
    there is one.
    """
    least, recomputed = min(choices)[:2], max(each.recomputed for each in choices)
    first = [each for each in choices if each[:2] == least]
    others = [each for each in choices if each[:2] != least]
    full = [each for each in (*first, *sorted(others)) if each.recomputed == recomputed]
    together = [each for each in first if not each.parked or each in full]
    return [together, *([each] for each in full if each not in first)]


class Mlp(NamedTuple):
    """The names of the linears of an MLP, which are cut alike along its intermediate dimension."""

    inner: tuple[str, ...]  # gate and up, or up, or one that is both
    down: str
    adapters: tuple[str, ...] = ()  # those of their low-rank adapters that each tile has parts of


@dataclass(frozen=True)
class Products:
    """The matrix products of a step."""

    shapes: tuple[tuple[int, int, int], ...]  # (rows, depth, columns) of each different float32 one
    kinds_16: int  # different products in 16 bits; the library compiles a kernel for each

    @property
    def widest(self) -> tuple[int, int, int] | None:
        """The shape with most columns, of those the deepest."""
        return max(self.shapes, key=lambda shape: shape[::-1], default=None)

    def at_least(self, other: "Products") -> "Products":
        """The products of both."""
        shapes = tuple(dict.fromkeys((*self.shapes, *other.shapes)))
        return Products(shapes, max(self.kinds_16, other.kinds_16))


@dataclass(frozen=True)
class Counted:
    """One step, counted with shapes alone."""

    forward_bytes: int  # made in forward and held at the peak
    backward_bytes: int  # made in backward and held at the peak
    kept_bytes: int  # held at the end of forward, for backward
    flops: int  # of all matrix products
    touched_bytes: int  # read and written by all other operations
    products: Products
    held_at_steps: tuple[tuple[int, int], ...] = ()  # (elements of parked tiles, bytes held then)
    workspace_bytes: int = 0  # what the library keeps for float32 products
    parked_bytes: int = 0  # activations that go home, in whole pages
    largest_parked: int = 0  # the most of them that one tensor has

    @property
    def peak_bytes(self) -> int:
        """The most that is held at once."""
        return self.forward_bytes + self.backward_bytes

    def at_least(self, other: "Counted") -> "Counted":
        """The larger of each count, and the products of both."""
        larger = {
            field.name: max(getattr(self, field.name), getattr(other, field.name))
            for field in fields(self)
            if field.name not in ("products", "held_at_steps")
        }
        steps = tuple({*self.held_at_steps, *other.held_at_steps})
        products = self.products.at_least(other.products)
        return Counted(products=products, held_at_steps=steps, **larger)


@dataclass(frozen=True)
class Weight:
    """A linear's or an embedding's weight, or a stack of experts, with all that share it."""

    names: tuple[str, ...]  # of the modules that have it, in the model's order
    shape: tuple[int, int]  # (rows, columns)
    dtype: str  # such as "float32"
    element_bytes: int
    trainable: bool
    rows_only: bool  # whether an embedding has it, or it is a stack: only rows can be cut
    obstacle: str  # why it cannot be tiled; "" where it can
    experts: int = 0  # how many matrices are stacked; 0: it is no stack
    used: int = 0  # experts that each token is routed to, at most

    @property
    def elements(self) -> int:
        """How many values it has."""
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.elements * self.element_bytes

    @property
    def is_looked_up(self) -> bool:
        """Whether an embedding has it, whose rows are read one by one."""
        return self.rows_only and not self.experts

    def hit_share(self, tokens: int) -> float:
        """The share of the weight that a step of so many tokens is expected to read.

        Of E experts, each token hits k at random: 1 - (1 - k/E)^tokens.
        """
        return 1 - (1 - self.used / self.experts) ** tokens if self.experts else 1.0

    @property
    def is_tied(self) -> bool:
        """Whether several modules share it."""
        return len(self.names) > 1


@dataclass(frozen=True)
class Rest:
    """Buffers, and the parameters that are no linear's or embedding's weight."""

    nbytes: int  # of the parameters
    trainable: tuple[tuple[int, int], ...]  # (bytes of an element, how many are trained)
    buffer_bytes: int
    tensors: int  # how many parameters there are
    converting_bytes: int = 0  # the most that one conversion takes while weights are loaded
    large: str = ""  # which of the parameters are large, and have no rule to be cut by
    large_bytes: int = 0  # of these


@dataclass(frozen=True)
class StateSizes:
    """What an optimizer keeps of one element."""

    # (bytes of a weight's element, bytes of each moment and master beside it)
    entries: tuple[tuple[int, tuple[int, ...]], ...]
    temporary_bytes: int  # held while some rows are stepped

    def of(self, element_bytes: int) -> tuple[int, ...]:
        """Bytes of each tensor that is kept, for an element of so many bytes."""
        return dict(self.entries)[element_bytes]


@dataclass(frozen=True)
class ParkedLayout:
    """Every weight of a model in its order, and the grids of those that are parked."""

    weights: tuple[Weight, ...]
    grids: Mapping[str, Grid]  # by the name of the weight's first module

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
        """Elements of each tile of a weight; the first is the largest."""
        grid = self.grids[weight.names[0]]
        for index in grid.indices():
            rows, columns = grid.rect(*index).shape
            yield rows * columns

    def largest_tile(self, weight: Weight) -> int:
        """Elements of the largest tile of a weight."""
        return next(self.tile_elements(weight))
