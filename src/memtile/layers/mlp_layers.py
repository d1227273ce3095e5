"""The layers of an MLP: whether they fit together, and what is done with each of their tiles."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, Final, NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from memtile import ops
from memtile.errors import ArgumentError, TileShapeError
from memtile.geometry import Grid, Span
from memtile.layers import checks
from memtile.layers.low_rank import LowRanks, low_rank_of
from memtile.layers.tiled_linear import TiledLinear
from memtile.layers.weight_tiles import (
    Layer,
    WeightTile,
    is_called_by_tiles,
    modules_of_tiles,
    weight_tiles,
)

Call = Callable[[Tensor], Any]  # Any: modules give anything
GatheredTile = dict[str, WeightTile]  # by the layer's name; the weight is the module that has it
NAME: Final = "tiled_mlp"  # in messages


class Half(nn.Module):
    """One half of the features that a linear gives, as a layer: of one that is gate and up."""

    def __init__(self, whole: "_Whole", number: int) -> None:
        super().__init__()
        self._whole, self._number = whole, number  # no child: it is one of the model's
        self.out_features, self.in_features = whole.layer.out_features // 2, whole.layer.in_features

    @classmethod
    def both(cls, layer: nn.Module) -> "tuple[Half, Half]":
        """Both halves of a linear, for one call."""
        whole = _Whole(layer)
        return cls(whole, 0), cls(whole, 1)

    def cut(self) -> tuple[int, ...]:
        """The bounds of its tiles; TileShapeError where the other half is cut in another way."""
        layer = self._whole.layer
        if checks.class_of(layer) is nn.Linear:
            return (0, self.out_features)
        if not isinstance(layer, TiledLinear):
            raise TileShapeError(
                f"{NAME}: gate and up are one layer, a {type(layer).__module__}."
                f"{type(layer).__name__}; it must be an nn.Linear or TiledLinear without adapters"
            )
        parts, middle = layer.grid.out_parts, self.out_features
        cut = tuple(bound for bound in parts if bound <= middle)
        if layer.grid.in_splits > 1 or (*cut, *(middle + b for b in cut[1:])) != parts:
            raise TileShapeError(
                f"{NAME}: gate and up are one linear, cut at {list(parts)}; both halves of its "
                "rows must be cut alike, as memtile.tile(…, tile_mlps=True) does"
            )
        return cut

    def tiles(self) -> list[WeightTile] | None:
        """As `weight_tiles` of a layer."""
        halves = self._whole.halves
        return None if halves is None else halves[self._number]

    def modules_of_tiles(self) -> list[WeightTile] | None:
        """As `modules_of_tiles` of a layer; None where one module has both halves."""
        both = modules_of_tiles(self._whole.layer)
        if both is None or len(both) < 2:
            return None
        own = both[len(both) // 2 :] if self._number else both[: len(both) // 2]
        return [tile._replace(span=tile.span.since(own[0].span.start)) for tile in own]

    def forward(self, x: Tensor) -> Tensor:
        """(…, out) of (…, in); the other half is computed too."""
        y: Tensor = self._whole.layer(x)
        return y.chunk(2, -1)[self._number]


class _Whole:
    """What two halves are of."""

    def __init__(self, layer: Any) -> None:  # a linear, plain or in tiles
        self.layer = layer

    @cached_property
    def halves(self) -> list[list[WeightTile]] | None:
        """The tiles of both, made once, so that the gradient of a weight is one tensor."""
        tiles = weight_tiles(NAME, self.layer)
        if tiles is None:
            return None
        middle = tiles[-1].span.stop // 2
        if len(tiles) > 1:
            first, second = tiles[: len(tiles) // 2], tiles[len(tiles) // 2 :]
            return [first, [tile._replace(span=tile.span.since(middle)) for tile in second]]
        _, weight, bias = tiles[0]
        biases = (None, None) if bias is None else bias.split(middle)
        pairs = zip(ops.halves(weight), biases, strict=True)
        return [[WeightTile(Span(0, middle), *pair)] for pair in pairs]


class MlpLayers(NamedTuple):
    """Gate, where there is one, up and down."""

    gate: Layer | None
    up: Layer
    down: Layer

    def check(self, weight: type[Tensor] = Tensor) -> None:
        """Raise ArgumentError for no layer or `weight`, TileShapeError where they do not fit."""
        for name, given in zip(self._fields, self, strict=True):
            if not isinstance(given, weight | nn.Module) and (name != "gate" or given is not None):
                raise ArgumentError(
                    f"{NAME}: {name} is a {type(given).__name__}; it must be a linear layer, or "
                    f"its weight as a {weight.__name__}"
                )
        shapes = {name: shape_of(layer) for name, layer in self.named()}
        up, down, gate = shapes["up"], shapes["down"], shapes.get("gate")
        if up and ((down and down[1] != up[0]) or (gate and gate != up)):
            raise TileShapeError(
                f"{NAME}: up is {up}, gate {gate}, down {down}, each (out, in): up and gate must "
                "be (intermediate, features), down (out, intermediate)"
            )
        known = ((name, _cut(name, layer)) for name, layer in self.named())
        cuts = {name: cut for name, cut in known if cut is not None}
        if len(set(cuts.values())) > 1:
            raise TileShapeError(
                f"{NAME}: the layers cut the intermediate dimension at "
                + ", ".join(f"{list(cut)} ({name})" for name, cut in cuts.items())
                + "; the rows of gate and up and the columns of down must be cut alike: "
                "TiledLinear(…, out_splits=N) for gate and up, in_splits=N for down"
            )

    def named(self) -> list[tuple[str, Layer]]:
        """(name, layer) of those that it has."""
        found = [("gate", self.gate), ("up", self.up), ("down", self.down)]
        return [(name, layer) for name, layer in found if layer is not None]

    def weights(self) -> dict[str, list[WeightTile]] | None:
        """The tiles of each layer by their weights; None where one must be called."""
        found: dict[str, list[WeightTile]] = {}
        lows = self.low_ranks()
        if lows.drop_hidden or lows.are_gathered:
            return None
        for name, base in self._bases(lows):
            if isinstance(base, Half):
                tiles = base.tiles()
            else:
                tiles = weight_tiles(NAME, base, name == "down")
            if tiles is None:
                return None
            found[name] = tiles
        # not alike where `memtile.tile` has cut them since
        spans = {tuple(tile.span for tile in tiles) for tiles in found.values()}
        return found if len(spans) == 1 else None

    def low_ranks(self) -> LowRanks:
        """The low-rank adapters, by the names of their layers."""
        if ops.transformed():
            return LowRanks()
        found = ((name, low_rank_of(layer)) for name, layer in self.named())
        return LowRanks({name: low for name, low in found if low is not None})

    def _bases(self, lows: LowRanks) -> list[tuple[str, Layer]]:
        """(name, layer) of those that it has, without their adapters."""
        return [(n, lows[n].base if n in lows else layer) for n, layer in self.named()]

    def gathered(self) -> list[GatheredTile] | None:
        """The modules of each tile, plain but for an engine that gathers some when called."""
        lows = self.low_ranks()
        if lows.drop_hidden:
            return None
        found = {
            name: (
                base.modules_of_tiles()
                if isinstance(base, Half)
                else modules_of_tiles(base, int(name == "down"))
            )
            for name, base in self._bases(lows)
        }
        tiles = {name: own for name, own in found.items() if own is not None}
        spans = {tuple(tile.span for tile in own) for own in tiles.values()}
        modules = [tile.weight for own in tiles.values() for tile in own]
        if len(tiles) < len(found) or len(spans) != 1:
            return None
        layers = [layer for _, layer in self.named() if isinstance(layer, nn.Module)]
        if not (lows.are_gathered or any(map(checks.has_hooks, (*modules, *layers)))):
            return None
        return [dict(zip(tiles, own, strict=True)) for own in zip(*tiles.values(), strict=True)]

    def calls(self) -> list[list[Call]]:
        """What is called for each tile: of gate (where there is one), up and down."""
        layers = [layer for _, layer in self.named()]
        tiled = [e for e in layers if isinstance(e, TiledLinear) and is_called_by_tiles(e)]
        if len(tiled) == len(layers) and _are_cut_alike([each.grid for each in tiled]):
            tiles = range(tiled[0].grid.out_splits)
            return [
                [partial(_call_tile, each, n, each is tiled[-1]) for each in tiled] for n in tiles
            ]
        return [
            [
                partial(functional.linear, weight=each) if isinstance(each, Tensor) else each
                for each in layers
            ]
        ]


def shape_of(layer: Layer) -> tuple[int, int] | None:
    """(out, in) of a weight, or of a layer that tells."""
    if isinstance(layer, Tensor):
        return (layer.shape[0], layer.shape[1]) if layer.dim() == 2 else None
    out, into = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    return (out, into) if isinstance(out, int) and isinstance(into, int) else None


def _cut(name: str, layer: Layer) -> tuple[int, ...] | None:
    """The bounds of the layer's tiles along the intermediate dimension; None: it is called."""
    if isinstance(layer, Half):
        return layer.cut()
    column = name == "down"
    low = low_rank_of(layer)
    layer = layer if low is None else low.base
    if not isinstance(layer, TiledLinear):
        shape = shape_of(layer) if isinstance(layer, Tensor | nn.Linear) else None
        return (0, shape[column]) if shape else None
    grid = layer.grid
    if (grid.out_splits if column else grid.in_splits) > 1:
        raise TileShapeError(
            f"{NAME}: {name} is cut into {grid} tiles; gate and up must be cut over rows only "
            "(out_splits), down over columns only (in_splits)"
        )
    return grid.in_parts if column else grid.out_parts


def _are_cut_alike(grids: Sequence[Grid]) -> bool:
    """Whether up and gate are cut over rows only, down over columns only, at the same bounds."""
    *inner, down = grids
    found = {(grid.out_parts, grid.in_splits) for grid in inner}
    return found == {(down.in_parts, 1)} and down.out_splits == 1


def _call_tile(layer: TiledLinear, number: int, is_column: bool, x: Tensor) -> Tensor:
    """What a tile gives, with the part of a bias that the layer keeps whole."""
    y: Tensor = layer.tile(*((0, number) if is_column else (number, 0)))(x)
    if layer.whole_bias is None or (is_column and number < layer.grid.in_splits - 1):
        return y
    whole = layer.whole_bias
    return y + (whole if is_column else whole[layer.grid.out_spans[number].as_slice()]).to(y.dtype)
