"""`Plan`: which layers are tiled, living where, and what that is predicted to take."""

from collections import Counter
from dataclasses import dataclass
from typing import Final, Literal

from memtile.errors import ArgumentError
from memtile.geometry import Grid
from memtile.home_names import parse_home
from memtile.planning import table
from memtile.planning.budget import Budget
from memtile.planning.counted import Products, check_tokens
from memtile.planning.json_form import from_text, to_text

Place = Literal["device", "host", "disk"]
Mode = Literal["classic", "in_backward"]
RESIDENT: Final = "resident"
PARKED: Final = "parked"
_VERSION: Final = 2


@dataclass(frozen=True)
class PlannedLayer:
    """What a plan says about one linear or embedding.

    Args:
        name: the module's name in the model.
        shape: (rows, columns) of its weight.
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
    """One part of the predicted peak.

    Args:
        name: what it is.
        nbytes: how much.
        place: where: "device", "host" or "disk".
    """

    name: str
    nbytes: int
    place: Place


@dataclass(frozen=True)
class Floor:
    """Seconds that a step cannot be faster than, for one reason.

    Args:
        name: the reason, such as "products".
        seconds: the least time.
    """

    name: str
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What `memtile.tile(model, plan)` will do, and what it is predicted to take.

    Args:
        model: the class that it is for.
        layers: every linear and embedding of it, in order.
        tokens: of one step: the batch's size times its length.
        batch: sequences of one step.
        optimizer: the class's name; None: inference.
        mode: of `TileOptimizer`.
        home: where parked tiles live: "disk", "disk:FOLDER", "host" or "device".
        device: what does the work: "cpu".
        checkpointing: whether the model recomputes activations in backward.
        budget: what was allowed.
        terms: the predicted peak, term by term.
        read_bytes: read from the home in a step.
        written_bytes: written to it.
        floors: what bounds the time of a step from below.
        products: the matrix products of a step; the widest is made first, for its workspace.
    """

    model: str
    layers: tuple[PlannedLayer, ...]
    tokens: int
    batch: int
    optimizer: str | None
    mode: Mode
    home: str
    device: str
    checkpointing: bool
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
        parse_home(self.home, "the plan's home=", more="; make the plan anew")
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
        return sum(term.nbytes for term in self.terms if term.place == place)

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
        """What it comes to, in one line."""
        return table.summary(self)

    def to_json(self) -> str:
        """The plan as JSON text, for `Plan.from_json`."""
        return to_text(self, _VERSION)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan that `to_json` wrote.

        Raises:
            ArgumentError: the text is no plan; the message says what is wrong with it.
        """
        return from_text(cls, text, _VERSION)

    def __str__(self) -> str:
        return table.of(self)
