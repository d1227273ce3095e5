"""Grids for all weights of a model that can be tiled, from whole weights down to small tiles."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from memtile.costmodel.model_records import Mlp, Weight
from memtile.geometry import Grid

_SMALLEST_TILE: Final = 64 << 10  # bytes; smaller tiles are mostly overhead


def tile_grids(weights: Iterable[Weight], mlps: Sequence[Mlp] = ()) -> list[dict[str, Grid]]:
    """Grids of all weights that can be tiled, for ever smaller tiles, whole ones first.

    Layers of these MLPs are cut alike along the intermediate dimension.
    """
    tileable = [weight for weight in weights if not weight.obstacle]
    largest = max((weight.nbytes for weight in tileable), default=0)
    found: list[dict[str, Grid]] = []
    while True:
        grids = grids_of(tileable, mlps, largest)
        if not found or grids != found[-1]:
            found.append(grids)
        if largest <= _SMALLEST_TILE:
            return found
        largest = max(_SMALLEST_TILE, largest // 2)


def grids_of(weights: Iterable[Weight], mlps: Sequence[Mlp], tile_bytes: int) -> dict[str, Grid]:
    """Those of tiles that have so many bytes or fewer."""
    tileable = {weight.names[0]: weight for weight in weights if not weight.obstacle}
    grids = {name: tile_grid(weight, tile_bytes) for name, weight in tileable.items()}
    for mlp in mlps:
        grids |= _mlp_grids(mlp, tileable, tile_bytes)
    return grids


def cut_alike(weights: Iterable[Weight], mlps: Sequence[Mlp]) -> tuple[Mlp, ...]:
    """The MLPs whose layers can all be cut, and are tied to nothing."""
    alone = {w.names[0] for w in weights if not (w.obstacle or w.is_tied or w.rows_only)}
    return tuple(each for each in mlps if alone.issuperset((*each.inner, each.down)))


def _mlp_grids(mlp: Mlp, weights: Mapping[str, Weight], tile_bytes: int) -> dict[str, Grid]:
    down = weights[mlp.down]
    own = [weights[name] for name in mlp.inner]
    width = max(down.shape[0], *(weight.shape[1] for weight in own))
    inner = down.shape[1]
    splits = Grid.splits_of_mlp(inner, width, tile_bytes // down.element_bytes)
    found = {weight.names[0]: Grid.of_mlp(*weight.shape, inner, splits) for weight in own}
    return {**found, mlp.down: Grid.uniform(*down.shape, 1, splits)}


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
