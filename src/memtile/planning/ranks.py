"""`RankPlan`: how a model is cut for so many ranks, and what one rank then holds and moves."""

from dataclasses import dataclass
from typing import Final

from memtile.planning import rank_table
from memtile.planning.counted import check_tokens
from memtile.planning.json_form import from_text, to_text
from memtile.planning.plan import Floor, Place, PlannedLayer, Term
from memtile.planning.rank_memory import Moment, Offload
from memtile.planning.rank_traffic import Speeds, Traffic
from memtile.planning.shards import Engine

_VERSION: Final = 1


@dataclass(frozen=True)
class RankPlan:
    """What `memtile.tile(model, plan)` cuts for an engine, and what one rank is predicted to take.

    Args:
        model: the class that it is for.
        engine: "fsdp2" or "zero3".
        world: ranks.
        offload: where shards, gradients and moments live: "none", "cpu" or "nvme".
        prefetch: units that are gathered ahead.
        unit_bytes: FSDP2 gathers neighbouring tiles together up to this size.
        layers: every linear and embedding, in order; those with a grid are units of their own.
        tokens: of one rank's step: its batch's size times its length.
        batch: sequences of one rank's step.
        optimizer: the class's name; None: inference.
        checkpointing: whether the model recomputes activations in backward.
        device_memory: bytes of the device of one rank; None: no limit was given.
        kept: what the fullest rank holds all the time, term by term.
        moments: of a step, and what each takes besides.
        padding_bytes: how much of it pads shards to one size.
        traffic: what a step of one rank moves.
        flops: of all matrix products of one rank's step.
        speeds: what a rank does in a second.
        floors: what bounds the time of a step from below.
        smallest_world: the smallest power of two of ranks that it fits on; None without a limit.
    """

    model: str
    engine: Engine
    world: int
    offload: Offload
    prefetch: int
    unit_bytes: int
    layers: tuple[PlannedLayer, ...]
    tokens: int
    batch: int
    optimizer: str | None
    checkpointing: bool
    device_memory: int | None
    kept: tuple[Term, ...]
    moments: tuple[Moment, ...]
    padding_bytes: int
    traffic: tuple[Traffic, ...]
    flops: int
    speeds: Speeds
    floors: tuple[Floor, ...]
    smallest_world: int | None

    def __post_init__(self) -> None:
        check_tokens(self.tokens, self.batch)

    @property
    def worst(self) -> Moment:
        """The moment that takes most."""
        return max(self.moments, key=lambda moment: moment.nbytes)

    @property
    def terms(self) -> tuple[Term, ...]:
        """The predicted peak of one rank: what is kept, and what the worst moment takes."""
        return (*self.kept, *self.worst.terms)

    @property
    def peak_bytes(self) -> int:
        """The predicted peak of a device."""
        return self.bytes_of("device")

    def bytes_of(self, place: Place) -> int:
        """The predicted peak of one rank's "device", "host" or "disk"."""
        return sum(term.nbytes for term in self.terms if term.place == place)

    def term(self, name: str) -> int:
        """The bytes of the terms of this name; 0 where there is none."""
        return sum(term.nbytes for term in self.terms if term.name == name)

    def moved(self, name: str) -> int:
        """The bytes that a step of one rank moves for this reason, such as "all-gather"."""
        return sum(each.nbytes for each in self.traffic if each.name == name)

    @property
    def tiles(self) -> int:
        """Tiles of all layers, those that are one tile included, shared ones once."""
        return sum(layer.tiles for layer in self.layers)

    @property
    def seconds(self) -> float | None:
        """The least time of a step; None where no speed was given."""
        return max((floor.seconds for floor in self.floors), default=None)

    @property
    def summary(self) -> str:
        """What it comes to, in one line."""
        return rank_table.summary(self)

    def to_json(self) -> str:
        """The plan as JSON text, for `RankPlan.from_json`."""
        return to_text(self, _VERSION)

    @classmethod
    def from_json(cls, text: str) -> "RankPlan":
        """The plan that `to_json` wrote.

        Raises:
            ArgumentError: the text is none; the message says what is wrong with it.
        """
        return from_text(cls, text, _VERSION)

    def __str__(self) -> str:
        return rank_table.of(self)
