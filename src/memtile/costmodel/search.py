"""Finds the layout with the fewest tiles that fits, and what to do with activations.

Two numbers make a layout: the largest tile that is allowed, and how many weights stay in memory,
small ones first, since each of those saves a tile. For every size of tile as many weights stay as
fit; of those layouts the one with the fewest tiles is taken. The sizes do not depend on the budget,
so more budget never means more tiles. The smallest tiles take least memory: where those do not fit,
nothing does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Final

from memtile.costmodel.budget import Budget, needed, usable
from memtile.costmodel.byte_sizes import format_byte_size
from memtile.costmodel.memory_model import Setting, home_bytes, terms
from memtile.costmodel.model_records import (
    Activations,
    Counted,
    Mlp,
    ParkedLayout,
    Products,
    Weight,
    in_turn,
)
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
from memtile.costmodel.tile_grids import cut_alike, tile_grids
from memtile.costmodel.time_model import Moved, floors, moved
from memtile.errors import BudgetError
from memtile.geometry import HUGE_PAGE, Grid, round_up

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
    mlps: Sequence[Mlp] = ()  # those that tiles can compute
    _known_cuts: dict[tuple[Mlp, ...], list[dict[str, Grid]]] = field(
        default_factory=dict, init=False
    )
    _known: dict[tuple[Activations, tuple[tuple[str, Grid], ...]], Found] = field(
        default_factory=dict, init=False
    )

    def best(self, choices: Sequence[Activations]) -> Found:
        """The fastest of the layouts with the fewest tiles, one for each of the first that fit.

        Raises:
            BudgetError: none fits.
        """
        for some in in_turn(choices):
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
        most = min(round_up(parked, HUGE_PAGE), MAPPED_BYTES)
        return self._keeping(mapped, KEPT_PAGES, most, HUGE_PAGE)

    def _keeping_experts(self, found: Found) -> Found:
        """The same, with what is left of the budget for the most used experts."""
        parked = home_bytes(self.setting, self._layout(self._kept_grids(found.layout)))
        return self._keeping(found, KEPT_EXPERTS, parked)

    def _keeping(self, found: Found, name: str, most: int, unit: int = 1) -> Found:
        """The same with one term more: at most so many bytes, and what the budget leaves.

        It is a multiple of `unit`.
        """
        limit = self.budget.of_place("host")
        left = most if limit is None else usable(limit) - found.bytes_of("host")
        kept = Term(name, min(most, max(0, left)) // unit * unit, "host")
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

        Once one fits, no other is counted.
        """
        smallest = ((self._cuts(each)[-1], each) for each in _thriftiest(choices))
        found = (self._excess(self._evaluate(*layout).terms) for layout in smallest)
        first = next(found)
        return first if first <= 0 else min([first, *found])

    def _fewest_tiles(self, activations: Activations) -> Found | None:
        best: Found | None = None
        whole = self._evaluate({}, activations)
        if self._excess(whole.terms) <= 0:
            return whole
        cuts = self._cuts(activations)
        smallest = self._evaluate(cuts[-1], activations)
        if self._excess(smallest.terms) > 0:
            return None
        least = smallest.counted
        for tiles, grids in self._least_tiles(cuts, least):
            if best is not None and best.layout.tiles <= tiles:
                break
            fit = self._most_resident(grids, least, activations)
            if fit is not None and (best is None or fit.layout.tiles < best.layout.tiles):
                best = fit
        return best or smallest

    def _least_tiles(
        self, cuts: Sequence[dict[str, Grid]], guess: Counted
    ) -> list[tuple[int, dict[str, Grid]]]:
        """Each size of tile with the tiles that it would take if a step held the least: ascending.

        No layout with tiles of this size has fewer, so most sizes need no counting.
        """
        found = (
            (self._layout(parked).tiles, grids)
            for grids in cuts
            if (parked := self._parked_by(grids, guess)) is not None
        )
        return sorted(found, key=lambda each: each[0])

    def _cuts(self, activations: Activations) -> list[dict[str, Grid]]:
        """Grids of all weights that can be parked, for ever smaller tiles, while that saves memory.

        Beyond some size the objects of more tiles take more than smaller slabs save.
        """
        mlps = self._whole_mlps if activations.mlps_in_tiles else ()
        if mlps not in self._known_cuts:
            self._known_cuts[mlps] = self._made_cuts(mlps)
        return self._known_cuts[mlps]

    def _made_cuts(self, mlps: Sequence[Mlp]) -> list[dict[str, Grid]]:
        found = tile_grids(self.weights, mlps)
        nothing = Counted(0, 0, 0, 0, 0, Products((), 0))
        sizes = []
        for grids in found:
            some = terms(self.setting, self._layout(grids), nothing)
            sizes.append(sum(term.nbytes for term in some if term.place != "disk"))
        return found[: sizes.index(min(sizes)) + 1]

    @cached_property
    def _whole_mlps(self) -> tuple[Mlp, ...]:
        return cut_alike(self.weights, self.mlps)

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
            self._units(grids),
            key=lambda u: (keeps and not u[0].experts, -max(w.nbytes for w in u)),
        )
        low = max(1, sum(1 for unit in order if keeps and unit[0].experts))
        high = len(order) + 1
        while low < high:  # the first number of parked weights that fits
            middle = (low + high) // 2
            parked = {w.names[0]: grids[w.names[0]] for w in chain(*order[:middle])}
            if self._excess(terms(self.setting, self._layout(parked), guess)) <= 0:
                high = middle
            else:
                low = middle + 1
        if low > len(order):
            return None
        return {w.names[0]: grids[w.names[0]] for w in chain(*order[:low])}

    def _units(self, grids: Mapping[str, Grid]) -> list[tuple[Weight, ...]]:
        """The weights that are parked together: those of an MLP in tiles, others one by one."""
        weights = {w.names[0]: w for w in self.weights if w.names[0] in grids}
        units: list[tuple[Weight, ...]] = []
        for mlp in self._whole_mlps:
            names = (*mlp.inner, mlp.down)
            cut = grids[mlp.down].in_parts  # one linear that is gate and up is cut so twice
            alike = all(grids[name].out_parts[: len(cut)] == cut for name in mlp.inner)
            if alike and all(name in weights for name in names):
                units.append(tuple(weights.pop(name) for name in names))
        return [*units, *((weight,) for weight in weights.values())]

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
        plain = [each for each in choices if not (each.parked or each.mlps_in_tiles)]
        tried = [
            self._evaluate(grids, each)
            for each in dict.fromkeys([*_thriftiest(choices), *plain])
            for grids in ({}, self._cuts(each)[-1])
        ]
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


def _thriftiest(choices: Sequence[Activations]) -> list[Activations]:
    """What may take least: all that is possible, and the same without parking.

    Of few layers, what is parked takes less than the slabs and pages that it goes through.
    """
    most = max(choices)
    return [each for each in (most, most._replace(parked=False)) if each in choices]


def _limit(place: str, size: int) -> int:
    """What may be used: all of a disk, and memory but for the margin."""
    return size if place == "disk" else usable(size)


def _asked(place: str, nbytes: int) -> int:
    """The budget that so many bytes fit in."""
    return nbytes if place == "disk" else needed(nbytes)
