"""Tiles of layers by their weights, for operations that use a weight in another way than a call."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from memtile.errors import TileShapeError
from memtile.geometry import Span
from memtile.layers import checks
from memtile.layers.gathered_calls import has_only_hooks_of_engines, is_gathered_when_called
from memtile.layers.handle import DenseHandle
from memtile.layers.parked import ParkedEmbedding, ParkedLinear
from memtile.layers.tiled_embedding import TiledEmbedding
from memtile.layers.tiled_linear import TiledLinear
from memtile.layers.tiled_module import TiledModule
from memtile.layers.values import is_shard

Layer = Tensor | nn.Module
_PLAIN = (nn.Linear, ParkedLinear, nn.Embedding, ParkedEmbedding)


class WeightTile(NamedTuple):
    """One tile, cut along one dimension of the weight only."""

    span: Span  # of that dimension
    weight: Any  # a Tensor; a Parameter where it is parked
    bias: Tensor | None


def layer_of(given: Layer) -> Layer:
    """The tiled layer that a handle of its weight stands for; anything else as it is."""
    layer = given.layer_of_weight if isinstance(given, DenseHandle) else None
    return given if layer is None else layer


def weight_tiles(name: str, layer: Layer, dimension: int = 0) -> list[WeightTile] | None:
    """The tiles of a layer cut along one dimension: 0 is its output, 1 its input.

    None where tiles or layer are anything more than their weights and must be called as modules,
    or are cut along the other dimension too. Along the input the last tile has the bias.
    """
    if isinstance(layer, Tensor):
        check_matrix(name, layer)
        return [WeightTile(Span(0, layer.shape[dimension]), layer, None)]
    if not isinstance(layer, TiledModule):
        if not is_plain(layer):
            return None
        own = getattr(layer, "bias", None)
        weight: Any = layer.weight  # a Tensor, which mypy does not know
        return [WeightTile(Span(0, weight.shape[dimension]), weight, own)]
    tiles, grid = [tile for _, tile in layer.tiles()], layer.grid
    other = grid.out_splits if dimension else grid.in_splits
    if other > 1 or not is_called_by_tiles(layer) or not all(map(is_plain, tiles)):
        return None
    spans = grid.in_spans if dimension else grid.out_spans
    biases = _biases_kept_whole(layer, spans, dimension) or (
        getattr(tile, "bias", None) for tile in tiles
    )
    found = zip(spans, tiles, biases, strict=True)
    return [WeightTile(span, tile.weight, bias) for span, tile, bias in found]


def modules_of_tiles(layer: Layer, dimension: int = 0) -> list[WeightTile] | None:
    """The modules that have a linear's tiles, in place of weights; None where one does more.

    An engine may gather them when they are called.
    """
    biases: list[Tensor | None] = []
    size = getattr(layer, "in_features" if dimension else "out_features", 0)
    tiles = [(Span(0, size), layer)]
    if isinstance(layer, TiledLinear):
        grid, whole = layer.grid, layer.whole_bias
        known = checks.class_of(layer) is TiledLinear and has_only_hooks_of_engines(layer)
        is_shared = whole is not None and is_shard(whole)
        if not known or is_shared or (grid.out_splits if dimension else grid.in_splits) > 1:
            return None
        spans = grid.in_spans if dimension else grid.out_spans
        biases = _biases_kept_whole(layer, spans, dimension)
        tiles = [*zip(spans, (tile for _, tile in layer.tiles()), strict=True)]
    modules = [module for _, module in tiles if isinstance(module, nn.Module)]
    plain = (is_plain(module) or is_gathered_when_called(module) for module in modules)
    if len(modules) < len(tiles) or not all(plain):
        return None
    biases = biases or [None] * len(tiles)
    return [WeightTile(*tile, bias) for tile, bias in zip(tiles, biases, strict=True)]


def _biases_kept_whole(
    layer: TiledModule, spans: Sequence[Span], dimension: int
) -> list[Tensor | None]:
    """The part of each tile in a bias that the layer keeps whole; nothing where it keeps none."""
    whole = layer.whole_bias
    if whole is None:
        return []
    if dimension == 0:
        return [whole[span.as_slice()] for span in spans]
    return [*[None] * (len(spans) - 1), whole]


def check_matrix(name: str, weight: Tensor) -> None:
    """TileShapeError where a weight has not two dimensions."""
    if weight.dim() != 2:
        raise TileShapeError(
            f"{name}: a weight is {tuple(weight.shape)}; it must have two dimensions: "
            "further dimensions are not tiled"
        )


def is_called_by_tiles(layer: nn.Module) -> bool:
    """Whether calling a tiled layer is calling its tiles, and nothing else."""
    known = checks.class_of(layer) in (TiledLinear, TiledEmbedding)
    return known and not checks.has_hooks(layer)


def is_plain(module: nn.Module) -> bool:
    """Whether it is a linear or an embedding, parked or not, that its weight and bias stand for."""
    return checks.class_of(module) in _PLAIN and checks.is_plain(module, type(module))
