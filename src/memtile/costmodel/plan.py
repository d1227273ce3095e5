"""`Plan`: which layers are tiled, where they live, and the predicted memory and time."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

from memtile.costmodel.budget import Budget
from memtile.costmodel.byte_sizes import format_byte_size
from memtile.costmodel.json_form import JsonRecord
from memtile.costmodel.model_records import Products
from memtile.costmodel.plan_parts import (
    KEPT_EXPERTS,
    KEPT_PAGES,
    PARKED,
    PLACES,
    Floor,
    Place,
    PlannedLayer,
    Term,
    aligned,
    bytes_in,
    check_tokens,
    floor_lines,
    layer_lines,
    limit_rows,
    term_rows,
)
from memtile.errors import ArgumentError
from memtile.home_names import HOMES, IN_FILES, at_home, parse_home

OptimizerMode = Literal["classic", "in_backward"]
_TITLES: Final = {"device": "memory of the device", "host": "memory", "disk": "disk"}


@dataclass(frozen=True)
class Plan(JsonRecord):
    """What `memtile.tile(model, plan)` will do, and what it is predicted to take.

    Args:
        model: the class that it is for.
        layers: every linear and embedding of it, in order.
        tokens: of one step: the batch's size times its length.
        batch: sequences of one step.
        optimizer: the class's name; None: inference.
        mode: of `TileOptimizer`.
        home: where parked tiles live: "disk", "disk:FOLDER", "host", "device" or "checkpoint".
        device: what does the work: "cpu".
        checkpointing: whether the model recomputes activations in backward.
        parks_activations: whether those that it keeps for backward live in the home too.
        tiles_mlps: whether MLPs are computed without their intermediate activation.
        budget: what was allowed.
        terms: the predicted peak, term by term.
        read_bytes: read from the home in a step.
        written_bytes: written to it.
        floors: what bounds the time of a step from below.
        products: the matrix products of a step; the widest is made first, for its workspace.
    """

    _json_name: ClassVar[str] = "Plan"
    _json_version: ClassVar[int] = 3

    model: str
    layers: tuple[PlannedLayer, ...]
    tokens: int
    batch: int
    optimizer: str | None
    mode: OptimizerMode
    home: str
    device: str
    checkpointing: bool
    parks_activations: bool
    tiles_mlps: bool
    budget: Budget
    terms: tuple[Term, ...]
    read_bytes: int
    written_bytes: int
    floors: tuple[Floor, ...]
    products: Products

    def __post_init__(self) -> None:
        check_tokens(self.tokens, self.batch)
        names = Counter(layer.name for layer in self.layers)
        twice = [name for name, times in names.items() if times > 1]
        if twice:
            raise ArgumentError(f"the plan names {twice[0]!r} twice; make it anew")
        parse_home(self.home, "the plan's home=", (*HOMES, IN_FILES), "; make the plan anew")
        if self.device != "cpu":
            raise ArgumentError(
                f"the plan's device={self.device!r} means nothing here; make it anew"
            )

    @property
    def place(self) -> Place:
        """Where the work's memory is: the device's own, or the host's where the CPU works."""
        return "host" if self.device == "cpu" else "device"

    @property
    def peak_bytes(self) -> int:
        """The predicted peak of the memory that the work is done in."""
        return self.bytes_of(self.place)

    def bytes_of(self, place: Place) -> int:
        """The predicted peak of "device", "host" or "disk"."""
        return bytes_in(place, self.terms)

    @property
    def kept_bytes(self) -> int:
        """What is left of the budget, for copies of the most used experts."""
        return self._bytes_named(KEPT_EXPERTS)

    @property
    def mapped_bytes(self) -> int:
        """What stays mapped of a home in the page cache, beside the tiles in use."""
        return self._bytes_named(KEPT_PAGES)

    def _bytes_named(self, name: str) -> int:
        return sum(term.nbytes for term in self.terms if term.name == name)

    @property
    def tiles(self) -> int:
        """Tiles of all parked layers, shared ones once."""
        return sum(layer.tiles for layer in self.layers)

    @property
    def parked_layers(self) -> tuple[PlannedLayer, ...]:
        """The layers that are parked."""
        return tuple(layer for layer in self.layers if layer.place == PARKED)

    @property
    def seconds(self) -> float:
        """The predicted time of a step: its highest floor."""
        return max((floor.seconds for floor in self.floors), default=0.0)

    @property
    def decided_by(self) -> str:
        """The name of the highest floor."""
        return max(self.floors, key=lambda floor: floor.seconds).name if self.floors else ""

    @property
    def summary(self) -> str:
        """The plan in one line."""
        work = f"{self.optimizer} {self.mode}" if self.optimizer else "inference"
        where = "all in memory"
        if self.parked_layers:
            where = f"{self.tiles} tiles of {len(self.parked_layers)} layers {at_home(self.home)}"
        kept = ", gradient checkpointing" if self.checkpointing else ""
        kept += ", MLPs in tiles" if self.tiles_mlps else ""
        kept += f", activations {at_home(self.home)}" if self.parks_activations else ""
        return (
            f"{self.model}, {self.tokens} tokens, {work}: {where}{kept}; predicted peak "
            f"{format_byte_size(self.peak_bytes)}, about {self.seconds:.2g} s a step"
        )

    def __str__(self) -> str:
        lines = [self.summary, "", *layer_lines(self.layers), "", *self._memory_lines()]
        return "\n".join([*lines, *self._time_lines()])

    def _memory_lines(self) -> Iterator[str]:
        for place in PLACES:
            nbytes, limit = self.bytes_of(place), self.budget.of_place(place)
            if not nbytes:
                continue
            rows = term_rows(_TITLES[place], place, self.terms)
            if limit is not None:
                free = None if place == "disk" else "margin, left free of the budget"
                rows += limit_rows(nbytes, limit, "budget", free)
            yield from aligned(rows, right={1})
            yield ""

    def _time_lines(self) -> Iterator[str]:
        yield from floor_lines(self.floors)
        decisive = self.decided_by.partition(" (")[0]
        yield f"decided by {decisive}: predicted {self.seconds:.3g} s a step"
        moved = format_byte_size(self.read_bytes), format_byte_size(self.written_bytes)
        yield f"read from the home in a step {moved[0]}, written to it {moved[1]}"
        if self.parked_layers:
            yield (
                "parked: kept at the home (a file or host memory) and brought in tile by tile; "
                "resident: kept in memory"
            )
        if any(term.name.startswith("slabs ") for term in self.terms):
            yield (
                "slabs: a few buffers, each as large as the largest tile, that tiles are read into"
            )
