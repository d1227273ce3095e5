"""How many elements the tiles of a model have: what the keys of a ZeRO-3 config come from."""

from dataclasses import dataclass

from torch import nn

from memtile.engines.zero3_values import whole_numel
from memtile.errors import ArgumentError
from memtile.layers import TiledModule


@dataclass(frozen=True)
class Sizes:
    """Numbers of elements in a tiled model, whole ones, whoever keeps them.

    Args:
        largest: of the largest tile.
        smallest: of the smallest tile.
        beside: of the largest parameter that a tile has beside its weight; 0 where there is none.
        others: of every other parameter of the model, each once.
        most_at_once: parameters that the module with most of them has itself.
    """

    largest: int
    smallest: int
    beside: int
    others: tuple[int, ...]
    most_at_once: int

    @property
    def persistent_up_to(self) -> int:
        """The threshold that keeps what tiles have beside their weights gathered, and no tile."""
        return min(self.beside, self.smallest - 1)

    def persistent(self, threshold: int) -> int:
        """Elements that stay gathered on every rank under a threshold, tiles not counted."""
        return sum(numel for numel in self.others if numel <= threshold)

    def live(self, prefetch: int, threshold: int) -> int:
        """The value of `stage3_max_live_parameters` that allows this many tiles ahead and no more.

        A tile is brought ahead while fewer elements are live: so more than `prefetch` of the
        largest and what is persistent, and no more than `prefetch + 1` of the smallest. Where tiles
        differ so much that nothing lies between, memory decides: elements of tiles, not their
        number, stay within `prefetch + 1` of the largest.
        """
        enough = prefetch * self.largest + 1
        return max(enough, min(enough + self.persistent(threshold), (prefetch + 1) * self.smallest))


def sizes_of(model: nn.Module) -> Sizes:
    """The sizes of a tiled model: on the meta device, partitioned or ordinary.

    Raises:
        ArgumentError: nothing is tiled.
    """
    weights: dict[nn.Parameter, int] = {}
    beside: list[int] = []
    for tile in tiles_of(model):
        first, *rest = sorted(tile.parameters(), key=whole_numel, reverse=True)
        weights[first] = whole_numel(first)
        beside += map(whole_numel, rest)
    others = [whole_numel(p) for p in model.parameters() if p not in weights]
    most = max(len(module._parameters) for module in model.modules())
    return Sizes(
        max(weights.values()), min(weights.values()), max(beside, default=0), tuple(others), most
    )


def tiles_of(model: nn.Module) -> list[nn.Module]:
    """Every tile of a model, each once.

    Raises:
        ArgumentError: nothing is tiled.
    """
    layers = [module for module in model.modules() if isinstance(module, TiledModule)]
    if not layers:
        raise ArgumentError(
            f"nothing of {type(model).__name__} is tiled: call memtile.tile(model, …) first, or "
            "use DeepSpeed as it is for what needs no tiles"
        )
    return list(dict.fromkeys(tile for layer in layers for _, tile in layer.tiles()))
