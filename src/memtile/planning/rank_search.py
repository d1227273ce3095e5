"""The search: the fewest tiles with which a rank fits, and the fewest ranks on which it does.

Smaller tiles are smaller units, until they have fewer rows than there are ranks: then FSDP2 pads
each to one row a rank, and shards grow again. So every size is looked at, the largest first.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from memtile.errors import BudgetError
from memtile.geometry import Grid
from memtile.planning.budget import needed, usable
from memtile.planning.byte_sizes import format_byte_size
from memtile.planning.counted import Counted, Weight
from memtile.planning.layout import Layout
from memtile.planning.plan import Term
from memtile.planning.rank_memory import Moment, RankSetting, kept_terms, moments
from memtile.planning.search import SMALLEST_TILE, tile_grid
from memtile.planning.shards import LooseModule, ShardedLayer, Sharding, Units, Uses

LARGEST_WORLD: Final = 1 << 20

Count = Callable[[Layout, bool], tuple[Counted, Mapping[str, Uses]]]


@dataclass(frozen=True)
class RankFound:
    """Tiles and ranks that were looked at.

    Args:
        grids: of every weight that is a unit of its own, by the name of its first module.
        sharding: of the ranks.
        checkpointing: whether activations are recomputed.
        counted: one rank's step.
        units: what is gathered together.
        kept: what a rank holds all the time.
        moments: of a step.
    """

    grids: Mapping[str, Grid]
    sharding: Sharding
    checkpointing: bool
    counted: Counted
    units: Units
    kept: tuple[Term, ...]
    moments: tuple[Moment, ...]

    @property
    def device_terms(self) -> list[Term]:
        """The peak of a device, in the moment that takes most."""
        worst = max(self.moments, key=lambda moment: moment.nbytes)
        return [term for term in (*self.kept, *worst.terms) if term.place == "device"]

    @property
    def device_bytes(self) -> int:
        """The same as a sum."""
        return sum(term.nbytes for term in self.device_terms)


class RankSearch:
    """Finds tiles and ranks for one model, one step and one device.

    Args:
        setting: what depends on neither.
        weights: of the model, in its order.
        layers: the same of those that can be tiled, as shards, with uses that are not yet known.
        loose: the modules of all other parameters, likewise.
        count: counts a step of a layout, and the uses of its layers.
        memory: bytes of a device.
    """

    def __init__(
        self,
        setting: RankSetting,
        weights: Sequence[Weight],
        layers: Sequence[ShardedLayer],
        loose: Sequence[LooseModule],
        count: Count,
        memory: int | None,
    ) -> None:
        self._setting, self._weights = setting, tuple(weights)
        self._layers, self._loose = tuple(layers), tuple(loose)
        self._count, self._memory = count, memory
        self._counts: dict[tuple[int, bool], tuple[Counted, Mapping[str, Uses]]] = {}

    def best(self, sharding: Sharding, checkpointing: Sequence[bool]) -> RankFound:
        """The fewest tiles that fit on these ranks; without a limit, every layer whole.

        Raises:
            BudgetError: nothing fits.
        """
        found = self._fitting(sharding, checkpointing)
        if found is None:
            raise self._nothing_fits(sharding, checkpointing)
        return found

    def smallest_world(self, sharding: Sharding, checkpointing: Sequence[bool]) -> int | None:
        """The smallest power of two of ranks on which something fits; None: on none of them."""
        world = 1
        while world <= LARGEST_WORLD:
            if self._fitting(_on(sharding, world), checkpointing) is not None:
                return world
            world *= 2
        return None

    def cut(self, sharding: Sharding, tile_bytes: int, checkpointing: bool) -> RankFound:
        """The tiles that have so many bytes or fewer, whether they fit or not."""
        grids = {each.names[0]: tile_grid(each, tile_bytes) for each in self._tileable}
        return self._evaluate(
            sharding, grids, *self._counted_grids(grids, checkpointing), checkpointing
        )

    def _fitting(self, sharding: Sharding, checkpointing: Sequence[bool]) -> RankFound | None:
        for again in checkpointing:
            for number, grids in enumerate(self._cuts):
                guess = self._evaluate(sharding, grids, *self._counted(0, again), again)
                if self._fits(guess):
                    known = self._counted(number, again)
                    found = self._evaluate(sharding, grids, *known, again)
                    if self._fits(found):
                        return found
        return None

    def _fits(self, found: RankFound) -> bool:
        return self._memory is None or found.device_bytes <= usable(self._memory)

    @cached_property
    def _tileable(self) -> list[Weight]:
        return [weight for weight in self._weights if not weight.obstacle]

    @cached_property
    def _cuts(self) -> list[dict[str, Grid]]:
        """Grids of all weights that can be tiled, for ever smaller tiles, whole ones first."""
        largest = max((weight.nbytes for weight in self._tileable), default=0)
        found: list[dict[str, Grid]] = []
        while True:
            grids = {each.names[0]: tile_grid(each, max(1, largest)) for each in self._tileable}
            if not found or grids != found[-1]:
                found.append(grids)
            if largest <= SMALLEST_TILE:
                return found
            largest = max(SMALLEST_TILE, largest // 2)

    def _counted(self, number: int, again: bool) -> tuple[Counted, Mapping[str, Uses]]:
        key = number, again
        if key not in self._counts:
            self._counts[key] = self._counted_grids(self._cuts[number], again)
        return self._counts[key]

    def _counted_grids(
        self, grids: Mapping[str, Grid], again: bool
    ) -> tuple[Counted, Mapping[str, Uses]]:
        return self._count(Layout(self._weights, dict(grids)), again)

    def _evaluate(
        self,
        sharding: Sharding,
        grids: Mapping[str, Grid],
        counted: Counted,
        uses: Mapping[str, Uses],
        again: bool,
    ) -> RankFound:
        layers = [each.used(uses[each.name]) for each in self._layers]
        loose = [each.used(uses[each.name]) for each in self._loose]
        units = sharding.units(layers, grids, loose)
        kept = kept_terms(self._setting, sharding, units)
        found = moments(self._setting, sharding, units, counted)
        return RankFound(grids, sharding, again, counted, units, kept, found)

    def _nothing_fits(self, sharding: Sharding, checkpointing: Sequence[bool]) -> BudgetError:
        assert self._memory is not None
        tried = [
            self._evaluate(sharding, grids, *self._counted(0, again), again)
            for again in checkpointing
            for grids in self._cuts
        ]
        least = min(tried, key=lambda found: found.device_bytes)
        largest = sorted(least.device_terms, key=lambda term: -term.nbytes)[:3]
        parts = ", ".join(f"{term.name} ({format_byte_size(term.nbytes)})" for term in largest)
        world = self.smallest_world(sharding, checkpointing)
        enough = f"{world} ranks would do" if world else "no number of ranks would do"
        return BudgetError(
            f"{format_byte_size(self._memory)} a device: {sharding.world} ranks need at least "
            f"{format_byte_size(needed(least.device_bytes))} each; the largest parts are {parts}; "
            f"{enough}; take fewer tokens, or {_way_out(self._setting, sharding)}"
        )


def _on(sharding: Sharding, world: int) -> Sharding:
    return Sharding(sharding.engine, world, sharding.unit_bytes)


def _way_out(setting: RankSetting, sharding: Sharding) -> str:
    if setting.offload == "none":
        return "offload to cpu, which keeps shards, gradients and moments in host memory"
    return "a model with gradient checkpointing"
