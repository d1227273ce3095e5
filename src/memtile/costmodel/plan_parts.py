"""Parts of `Plan` and `RankPlan`: layers, memory terms, lower bounds of time, lines of a table."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from memtile.costmodel.budget import margin
from memtile.costmodel.byte_sizes import format_byte_size
from memtile.errors import ArgumentError, check_whole_number
from memtile.geometry import Grid

Place = Literal["device", "host", "disk"]
PLACES: Final[tuple[Place, ...]] = ("device", "host", "disk")
RESIDENT: Final = "resident"
PARKED: Final = "parked"
KEPT_EXPERTS: Final = "most used experts"
KEPT_PAGES: Final = "pages of tiles used before"


@dataclass(frozen=True)
class PlannedLayer:
    """What a plan says about one linear, embedding or stack of experts.

    Args:
        name: the module's name in the model, or the stack's own, as of a parameter.
        shape: (rows, columns) of its weight; a stack (E, R, C) is the matrix (E·R, C).
        dtype: of its weight, such as "float32".
        nbytes: of its weight.
        grid: how it is cut; None: it stays dense.
        place: "parked" in the home, or "resident" in memory.
        reason: why.
        trainable: whether its weight gets gradients and moments.
        ties: the names of all modules that share its weight, itself included, in order.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    nbytes: int
    grid: Grid | None
    place: str
    reason: str
    trainable: bool = True
    ties: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        grid = self.grid
        if grid is not None and (grid.out_features, grid.in_features) != self.shape:
            raise ArgumentError(
                f"{self.name}: a grid of {grid.out_features} × {grid.in_features} cuts no weight "
                f"of {self.shape}; its bounds must end where the weight does"
            )
        if self.place != (RESIDENT if grid is None else PARKED):
            raise ArgumentError(
                f"{self.name}: place={self.place!r} is wrong for a layer "
                f"{'without' if grid is None else 'with'} a grid: what is cut is {PARKED!r}, what "
                f"is not is {RESIDENT!r}"
            )

    @property
    def tiles(self) -> int:
        """Tiles that it is cut into; 0 for a dense layer, and for all but the first of a tie."""
        if self.grid is None or self.name not in (self.ties[:1] or (self.name,)):
            return 0
        return self.grid.out_splits * self.grid.in_splits


@dataclass(frozen=True)
class Term:
    """One part of the predicted peak: its name, its bytes, and where they are."""

    name: str
    nbytes: int
    place: Place


@dataclass(frozen=True)
class Floor:
    """Seconds that a step takes at least, for a reason such as "products"."""

    name: str
    seconds: float


def check_tokens(tokens: object, batch: object) -> None:
    """Check the numbers of tokens and of sequences of a step."""
    for name, value, example in (("batch", batch, 1), ("tokens", tokens, 512)):
        check_whole_number(name, value, 1, f", such as {name}={example}")
    assert isinstance(tokens, int)
    assert isinstance(batch, int)
    if tokens % batch:
        raise ArgumentError(
            f"tokens={tokens} are not a whole number of sequences for batch={batch}: tokens are "
            "those of the whole step, batch times length"
        )


def bytes_in(place: str, terms: Iterable[Term]) -> int:
    """The sum of the terms of a place."""
    return sum(term.nbytes for term in terms if term.place == place)


def sorted_terms(terms: Iterable[Term]) -> tuple[Term, ...]:
    """Largest first in each place, those of 0 bytes left out."""
    some = [term for term in terms if term.nbytes]
    return tuple(sorted(some, key=lambda term: (term.place, -term.nbytes)))


def largest_terms(terms: Iterable[Term]) -> str:
    """The three largest terms, for a message."""
    some = sorted(terms, key=lambda term: -term.nbytes)[:3]
    return ", ".join(f"{term.name} ({format_byte_size(term.nbytes)})" for term in some)


def layer_lines(layers: Sequence[PlannedLayer]) -> Iterator[str]:
    """The layers as a table; those that differ only in one number of their name share a line."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for layer in layers:
        head, number, tail = _split_name(layer.name)
        cells = (
            f"{layer.shape[0]}×{layer.shape[1]}",
            layer.dtype,
            format_byte_size(layer.nbytes),
            str(layer.grid or "-"),
            layer.place,
            layer.reason,
        )
        alike.setdefault((head, tail, *cells), []).append(number)
    rows: list[tuple[str, ...]] = [("layer", "shape", "dtype", "bytes", "tiles", "where", "why")]
    for (head, tail, *cells_of), numbers in alike.items():
        rows.append((f"{head}{_ranges(numbers)}{tail}", *cells_of))
    return aligned(rows)


def _split_name(name: str) -> tuple[str, str, str]:
    """A name around its first number: before, the number, after."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return name, "", ""
    return ".".join([*parts[:at], ""]), parts[at], "".join(f".{part}" for part in parts[at + 1 :])


def _ranges(numbers: list[str]) -> str:
    """Ascending numbers with consecutive ones shortened, such as "0-3,7"."""
    if numbers == [""]:
        return ""
    runs: list[list[int]] = []
    for number in map(int, numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def term_rows(title: str, place: str, terms: Iterable[Term]) -> list[tuple[str, str]]:
    """The terms of a place and their sum, as rows of a table."""
    here = [term for term in terms if term.place == place]
    return [
        (title, ""),
        *((term.name, format_byte_size(term.nbytes)) for term in here),
        ("predicted peak", format_byte_size(bytes_in(place, here))),
    ]


def limit_rows(
    nbytes: int, limit: int, title: str, margin_title: str | None
) -> list[tuple[str, str]]:
    """What a limit leaves beside `nbytes` and its margin; no margin title: no margin."""
    free = margin(limit) if margin_title else 0
    rows = [
        ("left", format_byte_size(max(0, limit - free - nbytes))),
        (title, format_byte_size(limit)),
    ]
    return [(margin_title, format_byte_size(free)), *rows] if margin_title else rows


def floor_lines(floors: Iterable[Floor]) -> Iterator[str]:
    """The floors as a table."""
    rows = [("a step takes at least, for", "seconds")]
    return aligned([*rows, *((f.name, f"{f.seconds:.3g}") for f in floors)], right={1})


def aligned(rows: Sequence[tuple[str, ...]], right: Collection[int] = frozenset()) -> Iterator[str]:
    """Rows of equal length as lines; the columns with the given numbers are aligned right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()
