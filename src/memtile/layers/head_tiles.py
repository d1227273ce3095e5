"""How a head is visited tile by tile for a loss: by its weights where they can be had.

- A weight, a linear, an embedding, or a tiled layer of one column, plain or parked: each tile is
  one node of the graph, its logits are computed in blocks, and again in backward.
- A linear or a tile of one column that an engine gathers for its call is the same, inside a call.
- What is anything more (hooks, another class, several columns) is called as a module, tile after
  tile: the logits of one tile exist, and are computed again in backward.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memtile import ops
from memtile.errors import ArgumentError, TileClassError
from memtile.geometry import Span
from memtile.homes import is_parked
from memtile.layers import checks
from memtile.layers.gathered_calls import call_around, has_only_hooks_of_engines
from memtile.layers.tiled_embedding import TiledEmbedding
from memtile.layers.tiled_linear import TiledLinear
from memtile.layers.tiled_module import TiledModule
from memtile.layers.values import is_shard
from memtile.layers.weight_tiles import Layer, modules_of_tiles, weight_tiles
from memtile.transfer import ParkedSource, layer_call

Head = Layer
NAME = "linear_cross_entropy"  # in messages


class _Tile(Protocol):
    """The classes of one tile, and how the sums of its logits are had."""

    @property
    def classes(self) -> Span:
        """Those that the tile holds."""

    def sums(self, x: Tensor, query: ops.LogitQuery, blocks: ops.LogitBlocks) -> ops.LogitSums:
        """Those of x (N, H), for a query of these classes."""


@dataclass(frozen=True)
class _Weight:
    """A tile whose logits are computed here."""

    classes: Span
    weight: Any  # a Tensor; a Parameter where it is parked
    bias: Tensor | None

    def sums(self, x: Tensor, query: ops.LogitQuery, blocks: ops.LogitBlocks) -> ops.LogitSums:
        """They are computed in blocks."""
        if ops.transformed():
            return ops.plain_logit_sums(x, self.weight, self.bias, query, blocks.dtype)
        source = ParkedSource(self.weight) if is_parked(self.weight) else None
        return ops.tile_logit_sums(x, self.weight, self.bias, query, blocks, source)


@dataclass(frozen=True)
class _Gathered:
    """A tile whose weight an engine gathers while its module is called."""

    classes: Span
    module: Any  # a linear
    bias: Tensor | None  # its part of one that the layer keeps whole

    def sums(self, x: Tensor, query: ops.LogitQuery, blocks: ops.LogitBlocks) -> ops.LogitSums:
        """They are computed in blocks inside of the call."""
        made: list[ops.LogitSums] = []

        def act(x: Tensor) -> Tensor:
            weight, bias = self.module.weight, self.module.bias if self.bias is None else self.bias
            _check(x, weight)
            own = replace(blocks, dtype=ops.autocast_dtype(x) or x.dtype)  # the engine may cast x
            made.append(_Weight(self.classes, weight, bias).sums(x, query, own))
            return torch.stack([each for each in made[0] if each is not None])

        rows: Any = iter(_with_values_of(call_around([self.module], act, x), made[0]))
        found: list[Any] = [None if each is None else next(rows) for each in made[0]]
        return ops.LogitSums(*found)


def _with_values_of(found: Tensor, sums: ops.LogitSums) -> Tensor:
    """The sums as rows with the gradients of `found`, which an engine may have cast to 16 bits."""
    values = torch.stack([each.detach() for each in sums if each is not None])
    if found.dtype == values.dtype:
        return found
    wide = found.to(values.dtype)
    lost = values - wide.detach()
    return torch.where(lost.isfinite(), wide + lost, wide)  # -inf - -inf is not finite


@dataclass(frozen=True)
class _Called:
    """A tile, or a row of them, that is called as a module."""

    classes: Span
    layer: nn.Module
    call: Callable[[Tensor], Any]

    def sums(self, x: Tensor, query: ops.LogitQuery, blocks: ops.LogitBlocks) -> ops.LogitSums:
        """The logits of the tile exist meanwhile; they are computed again in backward."""
        replaced = checks.has_replaced_parameters(self.layer)
        if ops.transformed() or not torch.is_grad_enabled() or replaced:
            return self._sums(x, query)
        found: ops.LogitSums = checkpoint(self._sums, x, query, use_reentrant=False)
        return found

    def _sums(self, x: Tensor, query: ops.LogitQuery) -> ops.LogitSums:
        logits, classes = self.call(x), self.classes.size
        if not isinstance(logits, Tensor) or logits.shape != (len(x), classes):
            kind = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise TileClassError(
                f"{NAME}: the head returned {kind} for {len(x)} tokens, and must return a tensor "
                f"({len(x)}, {classes}); give its weight, or a module that returns logits"
            )
        return ops.sum_logits(query, ops.widened(logits))


def classes_of(head: Head) -> int:
    """How many classes a head has."""
    if isinstance(head, TiledModule):
        return head.grid.out_features
    found = head.shape[0] if isinstance(head, Tensor) else getattr(head, "out_features", None)
    found = getattr(head, "num_embeddings", None) if found is None else found
    if isinstance(found, int):
        return found
    raise ArgumentError(
        f"{NAME}: a {type(head).__name__} does not say how many classes it has; give a weight "
        "(classes, features), a linear, an embedding, a tiled layer, or a module with out_features"
    )


def head_sums(
    head: Head,
    bias: Tensor | None,
    x: Tensor,
    query: ops.LogitQuery,
    block_rows: int | None,
    block_classes: int | None,
) -> ops.LogitSums:
    """The sums (N,) of the logits that the head gives x (N, H); `bias` is of a head without one."""
    weights = _weights(head, bias)
    tiles: list[Any] = _by_calls(head, bias) if weights is None else list(weights)
    blocks = ops.LogitBlocks.fitting(
        len(x), block_rows, block_classes, ops.autocast_dtype(x) or x.dtype
    )
    if weights is not None:
        _check(x, weights[0].weight)
    if ops.transformed() or weights is None or not is_parked(weights[0].weight):
        return _sums(tiles, x, query, blocks)
    with layer_call():
        return _sums(tiles, x, query, blocks)


def _sums(
    tiles: list[_Tile], x: Tensor, query: ops.LogitQuery, blocks: ops.LogitBlocks
) -> ops.LogitSums:
    edges = (ops.float32_casts if ops.transformed() else ops.float32_edges)(x, len(tiles))
    return ops.combine_sums(
        [tile.sums(next(edges), query.of(None, tile.classes), blocks) for tile in tiles]
    )


def _weights(head: Head, bias: Tensor | None) -> list[_Weight] | None:
    """The tiles by their weights; None where they must be called."""
    tiles = weight_tiles(NAME, head)
    if tiles is None:
        return None
    if bias is not None and any(own is not None for _, _, own in tiles):
        raise ArgumentError(f"{NAME}: the head has a bias already; leave linear_bias out")
    return [
        _Weight(span, weight, own if bias is None else bias[span.as_slice()])
        for span, weight, own in tiles
    ]


def _by_calls(head: Head, bias: Tensor | None) -> list[_Gathered] | list[_Called]:
    """The tiles of a head that must be called, or the head where it has hooks of its own."""
    assert isinstance(head, nn.Module)
    if isinstance(head, TiledEmbedding | nn.Embedding):
        raise ArgumentError(
            f"{NAME}: this {type(head).__name__} has hooks or an engine's tiles, and an embedding "
            "cannot be called with hidden states; give the head that is tied to it"
        )
    if bias is not None:
        raise ArgumentError(
            f"{NAME}: linear_bias cannot be added to a head that is called as a module; make it "
            "the head's own bias"
        )
    modules = None if ops.transformed() else modules_of_tiles(head)
    if modules and not any(checks.has_replaced_parameters(tile.weight) for tile in modules):
        return [_Gathered(*tile) for tile in modules]
    known = checks.class_of(head) is TiledLinear and has_only_hooks_of_engines(head)
    if not isinstance(head, TiledLinear) or not known or _has_bias_of_engine(head):
        call = partial(nn.Module.__call__, head)  # a deferring one's own would defer
        return [_Called(Span(0, classes_of(head)), head, call)]
    return [_Called(span, head, _RowOfTiles(head, o)) for o, span in enumerate(head.grid.out_spans)]


def _has_bias_of_engine(head: TiledLinear) -> bool:
    """Whether an engine gathers a bias that the layer keeps whole, when the layer is called."""
    return head.whole_bias is not None and is_shard(head.whole_bias)


@dataclass(frozen=True)
class _RowOfTiles:
    """Calls the tiles of one row of a layer; several results are added in float32."""

    layer: TiledLinear
    row: int

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        chunks = x.split([span.size for span in layer.grid.in_spans], dim=-1)
        total: Tensor = layer.tile(self.row, 0)(chunks[0])
        for column, chunk in enumerate(chunks[1:], start=1):
            total = ops.widened(total) + layer.tile(self.row, column)(chunk)
        span, whole = layer.grid.out_spans[self.row], layer.whole_bias
        return total if whole is None else total + whole[span.as_slice()].to(total.dtype)


def _check(x: Tensor, weight: Tensor) -> None:
    checks.split_sizes(NAME, x.shape[-1], 1, [weight.shape[1]])
    checks.check_dtypes_and_devices(NAME, [x], weight, same_device=not is_parked(weight))
