"""`TiledMLP`: a gated or plain MLP tile by tile, whose intermediate activation never exists.

Shapes: input (…, H), gate and up (I, H), down (M, I); I is the intermediate dimension.

- Where all layers are plain linears, weights, or tiled layers of plain tiles, resident or parked,
  their products are computed in blocks, and again in backward (`ops.mlp`).
- So are those of tiles that are an engine's shards, a gate, an up and a down tile after another,
  which the engine gathers for that, once in forward and once in backward.
- Tiles that are anything more (hooks, another class) are called as modules, a gate, an up and a
  down tile after another; other layers are called whole. What was called is called again in
  backward. Low-rank adapters of plain linears are computed with the products.
- Under compilers and `torch.func`: ordinary operations, a tile after another.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from memtile import ops
from memtile.errors import ArgumentError, check_fraction, check_whole_number
from memtile.homes import is_parked
from memtile.layers import checks
from memtile.layers.gathered_calls import call_around
from memtile.layers.loss_options import rows_of
from memtile.layers.low_rank import LowRanks
from memtile.layers.mlp_layers import NAME, Call, GatheredTile, MlpLayers, shape_of
from memtile.layers.weight_tiles import (
    Layer,
    WeightTile,
    layer_of,
)
from memtile.transfer import layer_call

Activation = Callable[[Tensor], Tensor]


def tiled_mlp(
    input: Tensor,
    gate: Layer | None,
    up: Layer,
    down: Layer,
    *,
    activation: Activation = functional.silu,
    dropout: float = 0.0,
    block_rows: int | None = None,
    block_features: int | None = None,
) -> Tensor:
    """`down(dropout(activation(gate(input)) * up(input)))` without the intermediate activation.

    Blocks of it are computed one after another, and again in backward: 11 products instead of 9,
    and three blocks of `block_rows × block_features` in memory. Sums over blocks are float32 in
    every dtype. Parked tiles of gate, up and down are brought in together, once in forward and once
    in backward.

    Args:
        input: (…, features).
        gate: None for `down(dropout(activation(up(input))))`; otherwise as `up`.
        up: a weight (intermediate, features), its handle, `nn.Linear`, or `TiledLinear` of one
            column, with the bias that it has.
        down: the same, (out, intermediate), a `TiledLinear` of one row: its columns are cut as the
            rows of `gate` and `up` are.
        activation: element-wise, without parameters; computed in float32 for 16-bit inputs.
        dropout: the part of the intermediate activation that is zeroed; what it zeroes depends on
            the seed and the block.
        block_rows: rows of a block; by default as many as are worked on at once.
        block_features: intermediate features of a block; by default as many as make 2 MiB, 256 at
            least.

    Returns:
        (…, out), in the dtype of the input, or of autocast.

    Raises:
        TileShapeError: shapes, or the cuts of the layers, do not fit together.
        TileDtypeError: the input's dtype is not that of the weights, without autocast.
        TileDeviceError: the input is on another device than resident weights.
        ArgumentError: an option outside its range, an activation with parameters, or one that is
            not element-wise.
        HomeIOError: a parked tile could not be read or written.
        ParkedError: a parked tile was written to between forward and backward.

    Examples:
        >>> up, gate = torch.nn.Linear(64, 256), torch.nn.Linear(64, 256)
        >>> memtile.tiled_mlp(torch.randn(8, 64), gate, up, torch.nn.Linear(256, 64)).shape
        torch.Size([8, 64])
    """
    layers = MlpLayers(None if gate is None else layer_of(gate), layer_of(up), layer_of(down))
    options = _Options(activation, dropout, block_rows, block_features)
    options.check(layers.up)
    layers.check()
    return _call(input, layers, options)


class TiledMLP(nn.Module):
    """A gated or plain MLP as one module, whose intermediate activation never exists.

    Args:
        gate: as of `tiled_mlp`, a module or None.
        up: likewise.
        down: likewise.
        activation: element-wise; a function, or a module without parameters.
        dropout: in training mode only.
        block_rows: as of `tiled_mlp`.
        block_features: likewise.

    Raises:
        ArgumentError: an option outside its range.
        TileShapeError: shapes, or the cuts of the layers, do not fit together.

    Examples:
        >>> gate, up = (memtile.TiledLinear(64, 256, out_splits=4) for _ in range(2))
        >>> mlp = memtile.TiledMLP(gate, up, memtile.TiledLinear(256, 64, in_splits=4))
        >>> mlp(torch.randn(8, 64)).shape
        torch.Size([8, 64])
    """

    def __init__(
        self,
        gate: nn.Module | None,
        up: nn.Module,
        down: nn.Module,
        *,
        activation: Activation = functional.silu,
        dropout: float = 0.0,
        block_rows: int | None = None,
        block_features: int | None = None,
    ) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down
        self.activation, self.dropout = activation, dropout
        self.block_rows, self.block_features = block_rows, block_features
        self._options().check(up)
        MlpLayers(gate, up, down).check(nn.Parameter)

    def forward(self, input: Tensor) -> Tensor:
        """(…, out) of (…, features); errors of `tiled_mlp`."""
        return _call(input, MlpLayers(self.gate, self.up, self.down), self._options())

    def extra_repr(self) -> str:
        """Activation, where it is a function, and dropout."""
        named = [] if isinstance(self.activation, nn.Module) else [f"activation={self.activation}"]
        return ", ".join([*named, f"dropout={self.dropout}"])

    def _options(self) -> "_Options":
        dropout = self.dropout if self.training else 0.0
        return _Options(self.activation, dropout, self.block_rows, self.block_features)


class _Options(NamedTuple):
    activation: Activation
    dropout: float
    block_rows: int | None
    block_features: int | None

    def spec(self, x: Tensor) -> ops.MlpSpec:
        """With what is left out chosen for x (N, H)."""
        return ops.MlpSpec.fitting(
            self.activation, self.dropout, x, self.block_rows, self.block_features
        )

    def drop(self, h: Tensor) -> Tensor:
        """h after dropout."""
        return functional.dropout(h, self.dropout) if self.dropout else h

    def check(self, up: Layer) -> None:
        """Raise ArgumentError for what is outside its range."""
        check_fraction("dropout", self.dropout)
        for name in ("block_rows", "block_features"):
            if getattr(self, name) is not None:
                check_whole_number(name, getattr(self, name), 1)
        if not callable(self.activation):
            raise ArgumentError(
                f"activation={self.activation!r} must be a function of a tensor, such as "
                "torch.nn.functional.silu"
            )
        if isinstance(self.activation, nn.Module) and any(
            True for _ in self.activation.parameters()
        ):
            raise ArgumentError(
                f"the activation {type(self.activation).__name__} has parameters, which would get "
                "no gradient; use one without"
            )
        if not ops.transformed():
            shape = shape_of(up)
            ops.check_element_wise(self.activation, None if shape is None else shape[0])


def _call(input: Tensor, layers: MlpLayers, options: _Options) -> Tensor:
    shape = shape_of(layers.up)
    if shape:
        checks.split_sizes(NAME, checks.check_tensor(NAME, input).shape[-1], 1, [shape[1]])
    is_hooked = not ops.transformed() and checks.hooked_globally()
    weights = None if is_hooked else layers.weights()
    tiles = [] if is_hooked or weights or ops.transformed() else layers.gathered() or []
    if not weights and not tiles:
        return _called(input, layers, options)
    parked = False
    for (_, weight, _), *_ in (weights or {}).values():
        here = is_parked(weight)
        checks.check_dtypes_and_devices(NAME, [input], weight, same_device=not here)
        parked = parked or here
    x = rows_of(input.to(ops.autocast_dtype(input) or input.dtype)).contiguous()
    lows = layers.low_ranks()
    with layer_call() if parked and not ops.transformed() else nullcontext():
        y = _computed(x, weights, lows, options) if weights else _gathered(x, tiles, lows, options)
    return y.view(*input.shape[:-1], y.shape[-1])


def _computed(
    x: Tensor,
    weights: dict[str, list[WeightTile]],
    lows: LowRanks,
    options: _Options,
) -> Tensor:
    """y (N, M) of x (N, H), weights and adapters."""
    parts = lows.parts([tile.span.size for tile in weights["up"]])
    tiles, bias = _mlp_tiles(weights, parts), weights["down"][-1].bias
    if not ops.transformed():
        wide = ops.mlp_of_tiles(lows.widened(x), tiles, lows.padded(bias), options.spec(x))
        return lows.narrowed(wide)
    edges, activation = ops.float32_casts(x, len(tiles)), options.activation
    y = _sum(ops.plain_mlp_tile(next(edges), tile, activation, options.drop) for tile in tiles)
    return y if bias is None else y + bias.to(y.dtype)


def _mlp_tiles(
    weights: dict[str, list[WeightTile]], parts: Sequence[dict[str, Tensor]]
) -> list[ops.MlpTile]:
    up, down = weights["up"], weights["down"]
    gates: list[Any] = weights.get("gate") or [WeightTile(span, None, None) for span, _, _ in up]
    return [
        ops.MlpTile(u.span, g.weight, u.weight, d.weight, g.bias, u.bias, **own)
        for g, u, d, own in zip(gates, up, down, parts, strict=True)
    ]


def _gathered(
    x: Tensor, tiles: Sequence[GatheredTile], lows: LowRanks, options: _Options
) -> Tensor:
    """y (N, M) of x (N, H), and of tiles that are gathered one after another, each for its use."""
    saved, inputs = ops.inputs_saved_once(lows.widened(x), len(tiles))
    spec, sizes = options.spec(x), [tile["up"].span.size for tile in tiles]

    def part(number: int, x: Tensor) -> Tensor:
        """That of a tile, whose weights are gathered."""
        weights = {}
        for name, (span, module, bias) in tiles[number].items():
            checks.check_dtypes_and_devices(NAME, [x], module.weight)
            weights[name] = [WeightTile(span, module.weight, module.bias if bias is None else bias)]
        # copies: a view would keep all of an adapter that ZeRO-3 has gathered for this tile
        low = {name: own.clone() for name, own in lows.parts(sizes)[number].items()}
        made, bias = _mlp_tiles(weights, [low]), weights["down"][-1].bias
        return ops.mlp_of_tiles(x, made, lows.padded(bias), spec, saved)

    gathered = lows.gathered_for_tiles
    y = _sum(
        call_around([*gathered, *(own.weight for own in tile.values())], partial(part, n), each)
        for n, (tile, each) in enumerate(zip(tiles, inputs, strict=True))
    )
    return lows.narrowed(ops.asking_first(y, saved))


def _called(input: Tensor, layers: MlpLayers, options: _Options) -> Tensor:
    """y (…, M) of modules that are called, and called again in backward."""

    def one(x: Tensor, *modules: Call) -> Tensor:
        first, *up, down = modules
        h = options.activation(_tensor(first(x)))
        h = h * _tensor(up[0](x)) if up else h
        return _tensor(down(options.drop(h)))

    calls, modules = layers.calls(), (e for e in layers if isinstance(e, nn.Module))
    transformed = ops.transformed() or any(map(checks.has_replaced_parameters, modules))
    edges = (ops.float32_casts if transformed else ops.float32_edges)(input, len(calls))
    if transformed or not torch.is_grad_enabled():
        return _sum(one(x, *tile) for x, tile in zip(edges, calls, strict=True))
    return _sum(
        checkpoint(one, x, *tile, use_reentrant=False) for x, tile in zip(edges, calls, strict=True)
    )


def _tensor(found: Any) -> Tensor:
    """What a layer gave; ArgumentError where it is none."""
    if isinstance(found, Tensor):
        return found
    raise ArgumentError(
        f"{NAME}: a layer gives a {type(found).__name__}; gate, up and down must each give a "
        "tensor, as TiledLinear does (TiledLinearReturnBias gives its bias apart)"
    )


def _sum(parts: Iterable[Tensor]) -> Tensor:
    """The sum of the tiles' results, float32 where several are of 16 bits."""
    total: Any = None  # a Tensor, once there is one
    for part in parts:
        total = part if total is None else ops.widened(total) + part
        dtype = part.dtype
    found: Tensor = total.to(dtype)
    return found
