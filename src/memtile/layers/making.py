"""Making tiles, and giving them the starting values of one whole `nn.Linear`.

A tile that initialised itself would use its own fan-in: with in_splits columns its weights would be
√in_splits too large. So plain tiles are made without starting values, and drawn once, from the
distribution of the whole layer, tile by tile and without a full-size temporary. Row tiles on the
CPU come out bit-identical to `nn.Linear` under the same seed, since the draws follow one another.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from memtile.errors import TileClassError
from memtile.homes import resolve_home
from memtile.layers.gather import gathered
from memtile.layers.parked import ParkedLinear
from memtile.layers.tiled_module import TiledModule

LinearClass = Callable[..., nn.Module]


class _UninitialisedLinear(nn.Linear):
    """An `nn.Linear` whose parameters are left as allocated."""

    def reset_parameters(self) -> None:
        """Draw nothing: whoever made this tile fills it."""


class _UninitialisedParkedLinear(ParkedLinear):
    """A `ParkedLinear` whose parameters are left as they are found at home."""

    def reset_parameters(self) -> None:
        """Draw nothing: whoever made this tile fills it."""


_UNINITIALISED: dict[Any, type[nn.Module]] = {  # a linear_cls may be any callable
    nn.Linear: _UninitialisedLinear,
    ParkedLinear: _UninitialisedParkedLinear,
}


def with_home(linear_cls: LinearClass, arguments: dict[str, Any]) -> LinearClass:
    """The class that a `home` among the arguments asks for; tiles of one layer share one home.

    With a class of the user's the argument is passed on as it is.
    """
    if linear_cls is nn.Linear and arguments.get("home") is None:
        arguments.pop("home", None)
        return linear_cls
    if linear_cls in (nn.Linear, ParkedLinear):
        arguments["home"] = resolve_home(arguments.get("home") or "host", arguments.get("device"))
        return ParkedLinear
    return linear_cls


def make_tile(
    linear_cls: LinearClass, in_features: int, out_features: int, bias: bool, **kwargs: Any
) -> nn.Module:
    """One tile; a plain `nn.Linear` comes without starting values.

    Args:
        linear_cls: called as `linear_cls(in_features, out_features, bias=bias, **kwargs)`.
        in_features: columns of the tile.
        out_features: rows of the tile.
        bias: whether the tile carries its row's bias.
        **kwargs: the user's own, passed on by contract.

    Raises:
        TileClassError: the class ignores `bias=False`, is none, or gives no module.
    """
    uninitialised = _UNINITIALISED.get(linear_cls) if isinstance(linear_cls, type) else None
    if uninitialised is not None:
        tile: nn.Module = uninitialised(in_features, out_features, bias=bias, **kwargs)
        tile.__class__ = linear_cls  # type: ignore[assignment]  # it is one of the two above
        return tile
    name = getattr(linear_cls, "__qualname__", repr(linear_cls))
    if not callable(linear_cls):
        raise TileClassError(f"linear_cls={name} must be a class, or a function that makes a tile")
    tile = linear_cls(in_features, out_features, bias=bias, **kwargs)
    if isinstance(tile, TiledModule):
        raise TileClassError(
            f"linear_cls={name} makes tiled layers, and a tile of tiles has no values of its own; "
            "use one layer with more splits"
        )
    if not isinstance(tile, nn.Module):
        raise TileClassError(
            f"linear_cls={name} made a {type(tile).__name__}; it must make an nn.Module"
        )
    if not bias and getattr(tile, "bias", None) is not None:
        raise TileClassError(
            f"linear_cls={name} was asked for bias=False and made a bias: a bias belongs to the "
            "last column of tiles only, or it is added once for each; make the class honour "
            "bias=False"
        )
    return tile


def draws_like_linear(tile: nn.Module) -> bool:
    """Whether a tile starts with `nn.Linear`'s values, so that the whole layer's apply."""
    drawn = getattr(type(tile), "reset_parameters", None)
    return isinstance(tile, nn.Linear) and drawn is nn.Linear.reset_parameters


@torch.no_grad()
def draw_like_whole_linear(layer: TiledModule) -> None:
    """Draw all tiles from the distribution that `nn.Linear` gives the whole layer."""
    fan_in = layer.grid.in_features
    gain = nn.init.calculate_gain("leaky_relu", math.sqrt(5))
    bounds = {"weight": math.sqrt(3.0) * (gain / math.sqrt(fan_in)), "bias": 1 / math.sqrt(fan_in)}
    parameters = {name: layer.writable_parameters(name) for name in bounds}
    for name, bound in bounds.items():
        for parameter in parameters[name].values():
            with gathered([parameter], write=True):
                parameter.uniform_(-bound, bound)
