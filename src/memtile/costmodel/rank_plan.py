"""`RankPlan`: how a model is cut for some ranks, and what one rank then holds and moves."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

from memtile.costmodel.byte_sizes import format_byte_size
from memtile.costmodel.json_form import JsonRecord
from memtile.costmodel.plan_parts import (
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
from memtile.costmodel.rank_memory import Moment, Offload, peak_moment
from memtile.costmodel.rank_traffic import ClusterSpec, LinkTraffic
from memtile.costmodel.shards import Engine
from memtile.home_names import RANK_HOMES, at_home, parse_home

_TITLES: Final = {
    "device": "memory of a device",
    "host": "host memory of a rank",
    "disk": "disk of a rank",
}
_LINKS: Final = {"ranks": "between ranks", "host": "host and device", "disk": "disk"}
_ENGINES: Final = {"fsdp2": "FSDP2", "zero3": "ZeRO-3"}
_OFFLOADS: Final = {"none": "", "cpu": ", offloaded to the host", "nvme": ", offloaded to disk"}


@dataclass(frozen=True)
class RankPlan(JsonRecord):
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
        parks_activations: whether those that it keeps for backward live in a home.
        home: which: "host", "disk" or "disk:FOLDER".
        tiles_mlps: whether MLPs are computed without their intermediate activation.
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

    _json_name: ClassVar[str] = "RankPlan"
    _json_version: ClassVar[int] = 3

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
    parks_activations: bool
    home: str
    tiles_mlps: bool
    device_memory: int | None
    kept: tuple[Term, ...]
    moments: tuple[Moment, ...]
    padding_bytes: int
    traffic: tuple[LinkTraffic, ...]
    flops: int
    speeds: ClusterSpec
    floors: tuple[Floor, ...]
    smallest_world: int | None

    def __post_init__(self) -> None:
        check_tokens(self.tokens, self.batch)
        parse_home(self.home, "the plan's home=", RANK_HOMES, "; make the plan anew")

    @property
    def worst(self) -> Moment:
        """The moment that takes most."""
        return peak_moment(self.moments)

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
        return bytes_in(place, self.terms)

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
        """The plan in one line."""
        engine, work = _ENGINES[self.engine], self.optimizer or "inference"
        recomputed = ", gradient checkpointing" if self.checkpointing else ""
        recomputed += ", MLPs in tiles" if self.tiles_mlps else ""
        recomputed += f", activations {at_home(self.home)}" if self.parks_activations else ""
        seconds = "" if self.seconds is None else f", at least {self.seconds:.2g} s a step"
        return (
            f"{self.model}, {self.world} ranks of {engine}{_OFFLOADS[self.offload]}, "
            f"{self.tokens} tokens a rank, {work}{recomputed}: {self.tiles} tiles; predicted peak "
            f"{format_byte_size(self.peak_bytes)} a device{seconds}"
        )

    def __str__(self) -> str:
        lines = [self.summary, "", *layer_lines(self.layers), "", *self._memory_lines()]
        return "\n".join([*lines, *self._traffic_lines(), "", *self._time_lines()])

    def _memory_lines(self) -> Iterator[str]:
        for place in PLACES:
            nbytes = self.bytes_of(place)
            if not nbytes:
                continue
            on_device = place == "device"
            title = f"{_TITLES[place]}, in {self.worst.name}" if on_device else _TITLES[place]
            rows = term_rows(title, place, self.terms)
            if on_device and self.device_memory is not None:
                rows += limit_rows(nbytes, self.device_memory, "memory", "margin, left free")
            yield from aligned(rows, right={1})
            yield ""
        moments = ", ".join(f"{m.name} {format_byte_size(m.nbytes)}" for m in self.moments)
        yield f"beside what is kept: {moments}"
        if self.padding_bytes:
            yield f"of the shards, {format_byte_size(self.padding_bytes)} are padding"
        yield ""

    def _traffic_lines(self) -> Iterator[str]:
        rows = [(t.name, _LINKS[t.link], format_byte_size(t.nbytes)) for t in self.traffic]
        title = ("a rank moves in a step", "over", "bytes")
        return aligned([title, *(rows or [("nothing", "", "")])], right={2})

    def _time_lines(self) -> Iterator[str]:
        yield from floor_lines(self.floors)
        yield f"{self.flops:.3g} floating-point operations in products, on each rank"
        if self.smallest_world is not None and self.device_memory is not None:
            size = format_byte_size(self.device_memory)
            yield f"smallest world with {size} a device, of powers of two: {self.smallest_world}"
