"""The search: the layout with the fewest tiles that fits, and whether to recompute activations.

Two numbers make a layout: the largest tile that is allowed, and how many weights stay in memory,
small ones first, since each of those is a tile less. For every size of tile as many weights stay as
fit; of those layouts the one with the fewest tiles is taken. The sizes do not depend on the budget,
so more budget never means more tiles. The finest tiles of them take least memory: where those do
not fit, nothing does.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from memtile.errors import BudgetError
from memtile.geometry import Grid
from memtile.planning.budget import Budget, needed, usable
from memtile.planning.byte_sizes import format_byte_size
from memtile.planning.counted import Counted, Products, Weight
from memtile.planning.layout import Layout
from memtile.planning.memory_model import Setting, terms
from memtile.planning.plan import Place, Term
from memtile.planning.time_model import floors, moved

SMALLEST_TILE: Final = 64 << 10
"""Bytes below which a tile is mostly overhead: no plan asks for smaller ones."""

_TRIES: Final = 8

Count = Callable[[Layout, bool], Counted]


@dataclass(frozen=True)
class Found:
    """A layout that was counted.

    Args:
        layout: what is parked.
        checkpointing: whether activations are recomputed.
        counted: one step of it.
        terms: its predicted peak.
        seconds: its predicted time.
    """

    layout: Layout
    checkpointing: bool
    counted: Counted
    terms: tuple[Term, ...]
    seconds: float

    def bytes_of(self, place: Place) -> int:
        """The predicted peak of a place."""
        return sum(term.nbytes for term in self.terms if term.place == place)


class Search:
    """Finds the layout for one model, one step and one budget.

    Args:
        setting: what does not depend on the layout.
        weights: of the model, in its order.
        count: counts a step of a layout.
        budget: what may be used.
        cached: whether a home of so many bytes is reached through the page cache.
    """

    def __init__(
        self,
        setting: Setting,
        weights: Sequence[Weight],
        count: Count,
        budget: Budget,
        cached: Callable[[int], bool],
    ) -> None:
        self._setting, self._weights = setting, tuple(weights)
        self._count, self._budget, self._cached = count, budget, cached
        self._known: dict[tuple[bool, tuple[tuple[str, Grid], ...]], Found] = {}

    def best(self, checkpointing: Sequence[bool]) -> Found:
        """The fastest of the layouts with the fewest tiles, one for each of these choices.

        Raises:
            BudgetError: none fits.
        """
        found = [fit for again in checkpointing if (fit := self._fewest_tiles(again)) is not None]
        if not found:
            raise self._nothing_fits(checkpointing)
        return min(found, key=lambda each: (each.seconds, each.layout.tiles))

    def _fewest_tiles(self, checkpointing: bool) -> Found | None:
        best: Found | None = None
        whole = self.evaluate({}, checkpointing)
        if self._excess(whole) <= 0:
            return whole
        if not self._cuts or self._excess(self.evaluate(self._cuts[-1], checkpointing)) > 0:
            return None
        least = self.evaluate(self._cuts[-1], checkpointing).counted
        for tiles, grids in self._least_tiles(least):
            if best is not None and best.layout.tiles <= tiles:
                break
            fit = self._most_resident(grids, least, checkpointing)
            if fit is not None and (best is None or fit.layout.tiles < best.layout.tiles):
                best = fit
        return best or self.evaluate(self._cuts[-1], checkpointing)

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
        found = list(self._all_cuts())
        nothing = Counted(0, 0, 0, 0, 0, Products((), 0))
        sizes = [
            self._memory(terms(self._setting, self._layout(grids), nothing)) for grids in found
        ]
        return found[: sizes.index(min(sizes)) + 1] if found else []

    def _all_cuts(self) -> Iterator[dict[str, Grid]]:
        movable = [weight for weight in self._weights if not weight.obstacle]
        largest = max((weight.nbytes for weight in movable), default=0)
        seen: set[tuple[Grid, ...]] = set()
        while largest:
            grids = {weight.names[0]: tile_grid(weight, largest) for weight in movable}
            if tuple(grids.values()) not in seen:
                seen.add(tuple(grids.values()))
                yield grids
            if largest <= SMALLEST_TILE:
                return
            largest = max(SMALLEST_TILE, largest // 2)

    @staticmethod
    def _memory(found: Sequence[Term]) -> int:
        return sum(term.nbytes for term in found if term.place != "disk")

    def _most_resident(
        self, grids: Mapping[str, Grid], guess: Counted, checkpointing: bool
    ) -> Found | None:
        """As many weights in memory as fit beside tiles of this size, small ones first.

        Args:
            grids: of all that can be parked.
            guess: what a step holds with the tiles that take least memory.
            checkpointing: whether activations are recomputed.
        """
        for _ in range(_TRIES):
            parked = self._parked_by(grids, guess)
            if parked is None:
                return None
            fit = self.evaluate(parked, checkpointing)
            if self._excess(fit) <= 0:
                return fit
            guess = guess.at_least(fit.counted)
        return None

    def _parked_by(self, grids: Mapping[str, Grid], guess: Counted) -> dict[str, Grid] | None:
        """The fewest to park if a step held what was guessed; None where all are too few."""
        order = sorted((w for w in self._weights if w.names[0] in grids), key=lambda w: -w.nbytes)
        low, high = 1, len(order) + 1
        while low < high:  # the first number of parked weights that fits
            middle = (low + high) // 2
            parked = {w.names[0]: grids[w.names[0]] for w in order[:middle]}
            if self._excess_of(terms(self._setting, self._layout(parked), guess)) <= 0:
                high = middle
            else:
                low = middle + 1
        if low > len(order):
            return None
        return {w.names[0]: grids[w.names[0]] for w in order[:low]}

    def evaluate(self, grids: Mapping[str, Grid], checkpointing: bool) -> Found:
        """A layout, counted, with its peak and its time."""
        key = checkpointing, tuple(sorted(grids.items(), key=lambda item: item[0]))
        if key not in self._known:
            layout = self._layout(grids)
            counted = self._count(layout, checkpointing)
            found = terms(self._setting, layout, counted)
            moves = moved(self._setting, layout, checkpointing)
            cached = self._cached(sum(term.nbytes for term in found if term.place == "disk"))
            times = floors(self._setting, layout, counted, moves, cached=cached)
            seconds = max(floor.seconds for floor in times)
            self._known[key] = Found(layout, checkpointing, counted, found, seconds)
        return self._known[key]

    def _layout(self, grids: Mapping[str, Grid]) -> Layout:
        return Layout(self._weights, dict(grids))

    def _excess(self, found: Found) -> int:
        return self._excess_of(found.terms)

    def _excess_of(self, found: Sequence[Term]) -> int:
        """Bytes that are too much in the place that is worst off; none where it is 0 or less."""
        return max(
            (
                sum(term.nbytes for term in found if term.place == place) - _limit(place, size)
                for place in ("device", "host", "disk")
                if (size := self._budget.of_place(place)) is not None
            ),
            default=0,
        )

    def _nothing_fits(self, checkpointing: Sequence[bool]) -> BudgetError:
        ends = [{}, *self._cuts[-1:]]
        tried = [self.evaluate(grids, again) for again in checkpointing for grids in ends]
        least = min(tried, key=self._excess)
        lacking = [
            f"{place} {format_byte_size(_asked(place, least.bytes_of(place)))}"
            for place in ("device", "host", "disk")
            if least.bytes_of(place)
        ]
        return BudgetError(
            f"budget {self._budget}: {self._setting.tokens} tokens need at least "
            f"{', '.join(lacking)}; the largest parts are {_largest(least)}. Give more, or "
            f"{self._ways_out(least, checkpointing)}"
        )

    def _ways_out(self, least: Found, checkpointing: Sequence[bool]) -> str:
        setting = self._setting
        ways = ["fewer tokens"]
        if setting.state is not None and setting.mode == "classic":
            ways.append("mode='in_backward', which keeps no gradients")
        if setting.state is not None and not any(checkpointing):
            ways.append("a model with gradient checkpointing")
        if setting.in_place:
            ways.append("home='disk:FOLDER', which keeps weights and moments out of memory")
        if least.bytes_of("disk") > _limit("disk", self._budget.of_place("disk") or 1 << 62):
            ways.append("another folder, on a disk with more room")
        return ", or ".join(ways)


def tile_grid(weight: Weight, tile_bytes: int) -> Grid:
    """The fewest tiles of a weight that have so many bytes or fewer, where rows can be cut so."""
    rows, columns = weight.shape
    elements = max(1, tile_bytes // weight.element_bytes)
    if weight.rows_only:
        elements = max(elements, columns)
    return Grid.fewest(rows, columns, elements)


def _limit(place: str, size: int) -> int:
    """What may be used: all of a disk, and memory but for the margin."""
    return size if place == "disk" else usable(size)


def _asked(place: str, nbytes: int) -> int:
    """The budget that so many bytes fit in."""
    return nbytes if place == "disk" else needed(nbytes)


def _largest(found: Found) -> str:
    some = sorted(found.terms, key=lambda term: -term.nbytes)[:3]
    return ", ".join(f"{term.name} ({format_byte_size(term.nbytes)})" for term in some)
