"""Finds the fewest tiles with which a rank fits, and the fewest ranks on which the model fits.

Smaller tiles are smaller units, until they have fewer rows than there are ranks: then FSDP2 pads
each to one row a rank, and shards grow again. So every size is tried, the largest first.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final

from memtile.costmodel.budget import needed, usable
from memtile.costmodel.byte_sizes import format_byte_size
from memtile.costmodel.model_records import Activations, Counted, Mlp, ParkedLayout, Weight
from memtile.costmodel.plan_parts import Term, bytes_in, largest_terms
from memtile.costmodel.rank_memory import (
    Moment,
    Rank,
    RankSetting,
    kept_terms,
    moments,
    peak_moment,
)
from memtile.costmodel.shards import LooseModule, ShardedLayer, Sharding, Uses
from memtile.costmodel.tile_grids import grids_of, tile_grids
from memtile.errors import BudgetError
from memtile.geometry import Grid

_LARGEST_POWER: Final = 20  # of two: the most ranks that are tried

Counts = tuple[Counted, Mapping[str, Uses]]
Count = Callable[[ParkedLayout, Activations], Counts]


@dataclass(frozen=True)
class RankFound:
    """Tiles for some number of ranks, with what one rank holds."""

    grids: Mapping[str, Grid]  # of every weight that can be tiled, by its first module's name
    activations: Activations  # what is done with them
    counted: Counted  # one rank's step
    rank: Rank
    kept: tuple[Term, ...]  # what a rank holds all the time
    moments: tuple[Moment, ...]  # of a step

    @property
    def device_terms(self) -> list[Term]:
        """The peak of a device, in the moment that takes most."""
        worst = peak_moment(self.moments)
        return [term for term in (*self.kept, *worst.terms) if term.place == "device"]

    @property
    def device_bytes(self) -> int:
        """The sum of the device's terms."""
        return bytes_in("device", self.device_terms)


@dataclass
class RankSearch:
    """Finds tiles and ranks for one model, one step and one device."""

    setting: RankSetting
    weights: Sequence[Weight]  # of the model, in its order
    layers: Sequence[ShardedLayer]  # those that can be tiled; their uses are not known yet
    loose: Sequence[LooseModule]  # the modules of all other parameters, likewise
    count: Count  # counts a step of a layout, and the uses of its layers
    memory: int | None  # bytes of a device; None: no limit
    mlps: Sequence[Mlp] = ()  # those that tiles can compute, all whose layers can be cut
    _counts: dict[tuple[int, Activations], Counts] = field(default_factory=dict, init=False)

    def best(self, sharding: Sharding, choices: Sequence[Activations]) -> RankFound:
        """The fewest tiles that fit on these ranks; without a limit, every layer whole.

        Raises:
            BudgetError: nothing fits.
        """
        found = self._fitting(sharding, choices)
        if found is None:
            raise self._nothing_fits(sharding, choices)
        return found

    def smallest_world(self, sharding: Sharding, choices: Sequence[Activations]) -> int | None:
        """The smallest power of two of ranks on which something fits; None: on none of them."""
        worlds = (1 << power for power in range(_LARGEST_POWER + 1))
        fits = (w for w in worlds if self._fitting(replace(sharding, world=w), choices))
        return next(fits, None)

    def cut(self, sharding: Sharding, tile_bytes: int, activations: Activations) -> RankFound:
        """The tiles that have so many bytes or fewer, whether they fit or not."""
        mlps = self.mlps if activations.mlps_in_tiles else ()
        grids = grids_of(self.weights, mlps, tile_bytes)
        counts = self.count(ParkedLayout(tuple(self.weights), grids), activations)
        return self._evaluate(sharding, grids, *counts, activations)

    def _fitting(self, sharding: Sharding, choices: Sequence[Activations]) -> RankFound | None:
        for each in choices:
            for number, grids in enumerate(self._cuts(each)):
                # A step is counted for these tiles only if they fit by the counts of whole tiles.
                guess = self._evaluate(sharding, grids, *self._counted(0, each), each)
                if not self._fits(guess):
                    continue
                counts = self._counted(number, each)
                found = self._evaluate(sharding, grids, *counts, each)
                if self._fits(found):
                    return found
        return None

    def _fits(self, found: RankFound) -> bool:
        return self.memory is None or found.device_bytes <= usable(self.memory)

    def _cuts(self, activations: Activations) -> list[dict[str, Grid]]:
        return self._mlp_cuts if activations.mlps_in_tiles else self._plain_cuts

    @cached_property
    def _plain_cuts(self) -> list[dict[str, Grid]]:
        return tile_grids(self.weights)

    @cached_property
    def _mlp_cuts(self) -> list[dict[str, Grid]]:
        return tile_grids(self.weights, self.mlps)

    def _counted(self, number: int, activations: Activations) -> Counts:
        """The counts of a step with the grids of this number in `_cuts`."""
        key = number, activations
        if key not in self._counts:
            layout = ParkedLayout(tuple(self.weights), self._cuts(activations)[number])
            self._counts[key] = self.count(layout, activations)
        return self._counts[key]

    def _evaluate(
        self,
        sharding: Sharding,
        grids: Mapping[str, Grid],
        counted: Counted,
        uses: Mapping[str, Uses],
        activations: Activations,
    ) -> RankFound:
        layers = [replace(each, uses=uses[each.name]) for each in self.layers]
        loose = [replace(each, uses=uses[each.name]) for each in self.loose]
        mlps = self.mlps if activations.mlps_in_tiles else ()
        rank = Rank(self.setting, sharding, sharding.units(layers, grids, loose, mlps))
        terms = kept_terms(rank, counted), moments(rank, counted)
        return RankFound(grids, activations, counted, rank, *terms)

    def _nothing_fits(self, sharding: Sharding, choices: Sequence[Activations]) -> BudgetError:
        assert self.memory is not None
        tried = [
            self._evaluate(sharding, grids, *self._counted(0, each), each)
            for each in choices
            for grids in self._cuts(each)
        ]
        least = min(tried, key=lambda found: found.device_bytes)
        world = self.smallest_world(sharding, choices)
        enough = f"{world} ranks would do" if world else "no number of ranks would do"
        ways = ["fewer tokens"]
        if self.setting.offload == "none":
            ways.append("offload to cpu, which keeps shards, gradients and moments in host memory")
        elif not any(each.recomputed for each in choices):
            ways.append("a model with gradient checkpointing")
        return BudgetError(
            f"{format_byte_size(self.memory)} a device: {sharding.world} ranks need at least "
            f"{format_byte_size(needed(least.device_bytes))} each; the largest parts are "
            f"{largest_terms(least.device_terms)}; {enough}; take {', or '.join(ways)}"
        )
