"""Finds the layout with the fewest tiles that fits, and what to do with activations.

Two numbers make a layout: the largest tile that is allowed, and how many weights stay in memory,
small ones first, since each of those saves a tile. For every size of tile as many weights stay as
fit; of those layouts the one with the fewest tiles is taken. The sizes do not depend on the budget,
so more budget never means more tiles. The smallest tiles take least memory: where those do not fit,
nothing does.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final

from memtile.costmodel.budget import Budget, needed, usable
from memtile.costmodel.byte_sizes import format_byte_size
from memtile.costmodel.memory_model import Setting, home_bytes, terms
from memtile.costmodel.model_records import Activations, Counted, ParkedLayout, Products, Weight
from memtile.costmodel.plan_parts import (
    KEPT_EXPERTS,
    KEPT_PAGES,
    PLACES,
    Floor,
    Place,
    Term,
    bytes_in,
    largest_terms,
    sorted_terms,
)
from memtile.costmodel.time_model import Moved, floors, moved
from memtile.errors import BudgetError
from memtile.geometry import Grid

_SMALLEST_TILE: Final = 64 << 10  # bytes; smaller tiles are mostly overhead
_TRIES: Final = 8

Count = Callable[[ParkedLayout, Activations], Counted]


@dataclass(frozen=True)
class Found:
    """A layout that was counted, with its predicted peak and time."""

    layout: ParkedLayout
    activations: Activations
    counted: Counted
    terms: tuple[Term, ...]
    moved: Moved  # between home and memory
    floors: tuple[Floor, ...]

    @property
    def seconds(self) -> float:
        """The predicted time of a step."""
        return max(floor.seconds for floor in self.floors)

    def bytes_of(self, place: Place) -> int:
        """The predicted peak of a place."""
        return bytes_in(place, self.terms)


MAPPED_BYTES: Final = 32 << 20
"""What stays mapped after its use where tiles are worked on in the page cache: fewer, larger drops.

A step of SmolLM2 took 1.27 of its time in memory with it, and 1.32 without (16 MiB tiles).
"""


@dataclass
class Search:
    """Finds the layout for one model, one step and one budget."""

    setting: Setting
    weights: Sequence[Weight]  # of the model, in its order
    count: Count  # counts a step of a layout
    budget: Budget
    cached: Callable[[int], bool]  # whether a home of so many bytes is in the page cache
    maps: bool = False  # whether tiles are worked on there
    _known: dict[tuple[Activations, tuple[tuple[str, Grid], ...]], Found] = field(
        default_factory=dict, init=False
    )

    def best(self, choices: Sequence[Activations]) -> Found:
        """The fastest of the layouts with the fewest tiles, one for each of these choices.

        Those that park activations are tried where nothing else fits. Of these the one that
        recomputes is the first: it writes a tenth, and takes no longer (docs/park-activations.md).

        Raises:
            BudgetError: none fits.
        """
        in_turn = [[each for each in choices if not each.parked]]
        in_turn += [[each] for each in sorted(choices, key=_saves, reverse=True) if each.parked]
        for some in in_turn:
            if found := [fit for each in some if (fit := self._fewest_tiles(each))]:
                break
        else:
            raise self._nothing_fits(choices)
        fastest = min(found, key=lambda each: (each.seconds, each.layout.tiles))
        if self.setting.in_place:
            return fastest
        if self.maps and self.cached(self._home_bytes(fastest.layout, fastest.counted)):
            return self._mapped(fastest)
        return self._keeping_experts(fastest)

    def _mapped(self, found: Found) -> Found:
        """The same with a tile at a time instead of slabs; those fit too, should they be needed."""
        rings = replace(self.setting.rings, weights=1, gradients=1, steps=1, activations=1)
        setting = replace(self.setting, rings=rings)
        mapped = replace(found, terms=terms(setting, found.layout, found.counted))
        parked = self._home_bytes(found.layout, found.counted)
        return self._keeping(mapped, KEPT_PAGES, min(parked, MAPPED_BYTES))

    def _keeping_experts(self, found: Found) -> Found:
        """The same, with what is left of the budget for the most used experts."""
        parked = home_bytes(self.setting, self._layout(self._kept_grids(found.layout)))
        return self._keeping(found, KEPT_EXPERTS, parked)

    def _keeping(self, found: Found, name: str, most: int) -> Found:
        """The same with one term more: at most so many bytes, and what the budget leaves."""
        limit = self.budget.of_place("host")
        left = most if limit is None else usable(limit) - found.bytes_of("host")
        kept = Term(name, min(most, max(0, left)), "host")
        return replace(found, terms=sorted_terms([*found.terms, kept]))

    def _kept_grids(self, layout: ParkedLayout) -> dict[str, Grid]:
        """The parked stacks whose experts may be kept.

        In a step that trains on disk they are those that train: copies of frozen ones would be
        out of date with each write to the home.
        """
        setting = self.setting
        writes = setting.state is not None and not setting.in_files
        return {
            weight.names[0]: layout.grids[weight.names[0]]
            for weight in layout.parked
            if weight.experts and (weight.trainable or not writes)
        }

    def least_excess(self, choices: Sequence[Activations]) -> int:
        """Bytes over the budget of the choice with the smallest tiles that takes least.

        It is the one that parks and recomputes, if that is possible.
        """
        return self._excess(self._evaluate(self._cuts[-1], max(choices, key=_saves)).terms)

    def _fewest_tiles(self, activations: Activations) -> Found | None:
        best: Found | None = None
        whole = self._evaluate({}, activations)
        if self._excess(whole.terms) <= 0:
            return whole
        smallest = self._evaluate(self._cuts[-1], activations)
        if self._excess(smallest.terms) > 0:
            return None
        least = smallest.counted
        for tiles, grids in self._least_tiles(least):
            if best is not None and best.layout.tiles <= tiles:
                break
            fit = self._most_resident(grids, least, activations)
            if fit is not None and (best is None or fit.layout.tiles < best.layout.tiles):
                best = fit
        return best or smallest

    def _least_tiles(self, guess: Counted) -> list[tuple[int, dict[str, Grid]]]:
        """Each size of tile with the tiles that it would take if a step held the least: ascending.

        No layout with tiles of this size has fewer, so most sizes need no counting.
        """
        found = (
            (self._layout(parked).tiles, grids)
            for grids in self._cuts
            if (parked := self._parked_by(grids, guess)) is not None
        )
        return sorted(found, key=lambda each: each[0])

    @cached_property
    def _cuts(self) -> list[dict[str, Grid]]:
        """Grids of all weights that can be parked, for ever smaller tiles, while that saves memory.

        Beyond some size the objects of more tiles take more than smaller slabs save.
        """
        found = tile_grids(self.weights)
        nothing = Counted(0, 0, 0, 0, 0, Products((), 0))
        sizes = []
        for grids in found:
            some = terms(self.setting, self._layout(grids), nothing)
            sizes.append(sum(term.nbytes for term in some if term.place != "disk"))
        return found[: sizes.index(min(sizes)) + 1]

    def _most_resident(
        self, grids: Mapping[str, Grid], guess: Counted, activations: Activations
    ) -> Found | None:
        """As many weights in memory as fit beside tiles of this size, small ones first."""
        for _ in range(_TRIES):
            parked = self._parked_by(grids, guess)
            if parked is None:
                return None
            fit = self._evaluate(parked, activations)
            if self._excess(fit.terms) <= 0:
                return fit
            guess = guess.at_least(fit.counted)
        return None

    def _parked_by(self, grids: Mapping[str, Grid], guess: Counted) -> dict[str, Grid] | None:
        """The fewest to park if a step held what was guessed; None: parking all is not enough."""
        setting = self.setting  # without training, the most used experts, better than whole stacks
        keeps = setting.in_files or (setting.state is None and not setting.in_place)
        order = sorted(
            (w for w in self.weights if w.names[0] in grids),
            key=lambda w: (keeps and not w.experts, -w.nbytes),
        )
        low = max(1, sum(1 for weight in order if keeps and weight.experts))
        high = len(order) + 1
        while low < high:  # the first number of parked weights that fits
            middle = (low + high) // 2
            parked = {w.names[0]: grids[w.names[0]] for w in order[:middle]}
            if self._excess(terms(self.setting, self._layout(parked), guess)) <= 0:
                high = middle
            else:
                low = middle + 1
        return {w.names[0]: grids[w.names[0]] for w in order[:low]} if low <= len(order) else None

    def _evaluate(self, grids: Mapping[str, Grid], activations: Activations) -> Found:
        """A layout, counted, with its peak and its time."""
        key = activations, tuple(sorted(grids.items(), key=lambda item: item[0]))
        if key not in self._known:
            layout = self._layout(grids)
            counted = self.count(layout, activations)
            found = terms(self.setting, layout, counted)
            moves = moved(self.setting, layout, activations, counted.parked_bytes)
            cached = self.cached(self._home_bytes(layout, counted))
            times = floors(self.setting, layout, counted, moves, cached=cached)
            self._known[key] = Found(layout, activations, counted, found, moves, times)
        return self._known[key]

    def _home_bytes(self, layout: ParkedLayout, counted: Counted) -> int:
        """Bytes of a home that is no memory."""
        if self.setting.in_place:
            return 0
        return home_bytes(self.setting, layout) + counted.parked_bytes

    def _layout(self, grids: Mapping[str, Grid]) -> ParkedLayout:
        return ParkedLayout(tuple(self.weights), dict(grids))

    def _excess(self, found: Sequence[Term]) -> int:
        """Bytes over the limit of the place that exceeds it most; 0 or less: everything fits."""
        return max(
            (
                bytes_in(place, found) - _limit(place, size)
                for place in PLACES
                if (size := self.budget.of_place(place)) is not None
            ),
            default=0,
        )

    def _nothing_fits(self, choices: Sequence[Activations]) -> BudgetError:
        ends: tuple[dict[str, Grid], ...] = ({}, self._cuts[-1])
        tried = [self._evaluate(grids, each) for each in choices for grids in ends]
        least = min(tried, key=lambda found: self._excess(found.terms))
        lacking = [
            f"{place} {format_byte_size(_asked(place, least.bytes_of(place)))}"
            for place in PLACES
            if least.bytes_of(place)
        ]
        return BudgetError(
            f"budget {self.budget}: {self.setting.tokens} tokens need at least "
            f"{', '.join(lacking)}; the largest parts are {largest_terms(least.terms)}. "
            f"Give more, or {self._ways_out(least, choices)}"
        )

    def _ways_out(self, least: Found, choices: Sequence[Activations]) -> str:
        setting = self.setting
        ways = ["fewer tokens"]
        if setting.state is not None and setting.mode == "classic":
            ways.append("mode='in_backward', which keeps no gradients")
        if setting.state is not None and not any(each.recomputed for each in choices):
            ways.append("a model with gradient checkpointing")
        if setting.in_place:
            ways.append("home='disk:FOLDER', which keeps weights and moments out of memory")
        if least.bytes_of("disk") > _limit("disk", self.budget.of_place("disk") or 1 << 62):
            ways.append("another folder, on a disk with more room")
        return ", or ".join(ways)


def _saves(activations: Activations) -> tuple[bool, bool]:
    return activations.parked, activations.recomputed


def tile_grids(weights: Iterable[Weight]) -> list[dict[str, Grid]]:
    """Grids of all weights that can be tiled, for ever smaller tiles, whole ones first."""
    tileable = [weight for weight in weights if not weight.obstacle]
    largest = max((weight.nbytes for weight in tileable), default=0)
    found: list[dict[str, Grid]] = []
    while True:
        grids = {weight.names[0]: tile_grid(weight, largest) for weight in tileable}
        if not found or grids != found[-1]:
            found.append(grids)
        if largest <= _SMALLEST_TILE:
            return found
        largest = max(_SMALLEST_TILE, largest // 2)


def tile_grid(weight: Weight, tile_bytes: int) -> Grid:
    """The fewest tiles of a weight that have so many bytes or fewer, where rows can be cut so.

    A tile of a stack holds one expert at most: more would be read for a token of one of them.
    """
    rows, columns = weight.shape
    elements = max(1, tile_bytes // weight.element_bytes)
    if weight.rows_only:
        elements = max(elements, columns)
    if weight.experts:
        rows //= weight.experts
        return Grid.of_stack(weight.experts, rows, columns, min(elements, rows * columns))
    return Grid.fewest(rows, columns, elements)


def _limit(place: str, size: int) -> int:
    """What may be used: all of a disk, and memory but for the margin."""
    return size if place == "disk" else usable(size)


def _asked(place: str, nbytes: int) -> int:
    """The budget that so many bytes fit in."""
    return nbytes if place == "disk" else needed(nbytes)
