"""`TiledLinear`: a linear layer whose weight is a grid of tiles, each a module of its own.

Source: the memory-centric tiling of DeepSpeed ZeRO-3 (ZeRO-Infinity, arXiv 2104.07857, §5.1.3),
whose contract it keeps: names, defaults, override hooks, state dict names.

A tile that initialised itself would use its own fan-in: with in_splits columns its weights would be
√in_splits too large. So plain tiles are made without starting values, and drawn once, from the
distribution of the whole layer, tile by tile and without a full-size temporary. Row tiles on the
CPU are bit-identical to `nn.Linear` under the same seed, since the draws follow one another.
"""

import math
import re
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from memtile.errors import TileClassError, TileDeviceError, TileShapeError
from memtile.geometry import Grid
from memtile.homes import Home, resolve_home
from memtile.layers.parked import ParkedLinear, uninitialised
from memtile.layers.paths import LinearPaths
from memtile.layers.tiled_module import TiledModule
from memtile.layers.values import DENSE_NAMES, Index, Values, gathered, whole_shape

LinearClass = Callable[..., nn.Module]
Self = TypeVar("Self", bound="TiledLinear")


class TiledLinear(LinearPaths):
    """A linear layer cut into `out_splits × in_splits` tiles that are computed one at a time.

    Tile (o, i) is `linears[o][i]`, a `linear_cls(in_i, out_o, bias=…, **kwargs)`; the bias of a row
    belongs to its last column. Starting values have `nn.Linear`'s distribution for the whole layer.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bias: whether an offset is added.
        in_splits: columns of tiles, 1 to in_features.
        out_splits: rows of tiles, 1 to out_features.
        input_is_already_split: `forward` takes a sequence of in_splits chunks.
        combine_out_splits: `forward` gives one tensor; False: a list of out_splits tensors.
        linear_cls: makes a tile; may return other widths (tensor-parallel linears).
        init_linear: an untiled linear whose values are copied.
        **kwargs: go to `linear_cls`, `device` and `dtype` among them. `home` ("host", "device", a
            `Home`) with the default `linear_cls` parks the tiles' weights there.

    Raises:
        SplitsError: a number of splits is outside its range.
        TileClassError: `linear_cls` ignores `bias=False`.
        TileShapeError: `init_linear` has another shape.
        HomeFullError: the home has no room for the tiles.

    Examples:
        >>> layer = memtile.TiledLinear(1000, 3000, in_splits=2, out_splits=7)
        >>> layer(torch.zeros(8, 1000)).shape
        torch.Size([8, 3000])
    """

    tile_pattern: ClassVar[re.Pattern[str]] = re.compile(
        r"linears\.(?P<row>\d+)\.(?P<column>\d+)\.(?P<name>weight|bias)"
    )

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        in_splits: int = 1,
        out_splits: int = 1,
        input_is_already_split: bool = False,
        combine_out_splits: bool = True,
        linear_cls: LinearClass = nn.Linear,
        init_linear: nn.Module | None = None,
        **kwargs: Any,  # the contract passes them to linear_cls
    ) -> None:
        super().__init__()
        linear_cls, kwargs = _with_home(linear_cls, kwargs)
        uniform = Grid.uniform(out_features, in_features, out_splits, in_splits)
        grid: Grid = kwargs.pop("_grid", uniform)  # of from_dense
        self.grid = grid
        self.in_features, self.out_features = grid.in_features, grid.out_features
        self.in_splits, self.out_splits = grid.in_splits, grid.out_splits
        self.in_parts, self.out_parts = list(grid.in_parts), list(grid.out_parts)
        self.use_bias = bool(bias)
        self.input_is_already_split = input_is_already_split
        self.combine_out_splits = combine_out_splits
        self.linears = nn.ModuleList(
            nn.ModuleList(
                _make_tile(
                    linear_cls,
                    into.size,
                    out.size,
                    self.use_bias and i == self.in_splits - 1,
                    **kwargs,
                )
                for i, into in enumerate(self.grid.in_spans)
            )
            for out in self.grid.out_spans
        )
        if init_linear is not None:
            self.copy_params_from(init_linear)
        elif _draws_like_linear(self.tile(0, 0)):
            _draw_like_whole_linear(self)

    def tile(self, row: int, column: int) -> nn.Module:
        """The tile at (row, column)."""
        rows = self.linears._modules  # a ModuleList's own [] makes 20 calls, twice for each tile
        tile: nn.Module = rows[str(row)]._modules[str(column)]  # type: ignore[assignment]  # of ModuleLists
        return tile

    @staticmethod
    def tile_path(row: int, column: int) -> str:
        """The name of the tile at (row, column) below this layer."""
        return f"linears.{row}.{column}"

    def keep_bias(self, bias: nn.Parameter) -> None:
        """Add this bias itself, shared with other modules; for a layer whose tiles have none."""
        self._parameters["bias"] = bias  # not register_parameter, which the property refuses
        self.use_bias = True

    def extra_repr(self) -> str:
        """Features, bias and grid."""
        rows, columns = self.grid.rect(0, 0).shape
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.use_bias}, grid={self.grid}, largest tile {rows}×{columns}"
        )

    def reset_parameters(self) -> None:
        """Draw new starting values: `nn.Linear`'s for the whole layer, or each tile's own.

        Raises:
            TileClassError: the tiles are no plain linears and cannot reset themselves.
        """
        if _draws_like_linear(self.tile(0, 0)):
            _draw_like_whole_linear(self)
            return
        for _, tile in self.tiles():
            reset = getattr(tile, "reset_parameters", None)
            if reset is None:
                raise TileClassError(
                    f"{self.full_name()}: {type(tile).__name__} has no reset_parameters(); give "
                    "linear_cls one, or copy values with copy_params_from(linear)"
                )
            reset()

    @torch.no_grad()
    def copy_params_from(self, other: nn.Module) -> None:
        """Copy the values of a linear of the same shape, tile by tile.

        Args:
            other: has `weight` (out_features, in_features) and, as this layer, `bias` or None. A
                tiled layer of any grid will do. Where an engine keeps this layer's tiles, each
                rank calls this, and only rank 0's `other` needs values (the rest: meta device).

        Raises:
            TileShapeError: a shape differs, or only one of the two has a bias.
            TileDeviceError: the other is on the meta device.
            TileClassError: a tile computes its parameter, so a copy would be lost.

        Nothing is copied then.
        """
        own = {name: self.writable_parameters(name) for name in DENSE_NAMES}
        with gathered(list(own["weight"].values())[:1], write=True) as kept:  # told to all ranks
            self._check_source(other, own, must_have_values=kept)
        for name in filter(own.get, DENSE_NAMES):
            source = getattr(other, name)
            if not isinstance(other, TiledModule):
                with gathered([source]):
                    self.copy_values(name, Values.dense(self.transposed(name, source)))
            elif other.weight_is_transposed == self.weight_is_transposed:
                self.copy_values(name, Values.tiles(other.tile_parameters(name)))
            else:
                dense = self.transposed(name, other.dense_tensor(name))
                self.copy_values(name, Values.dense(dense))

    def _check_source(
        self, other: nn.Module, own: dict[str, dict[Index, nn.Parameter]], must_have_values: bool
    ) -> None:
        for name in DENSE_NAMES:
            source = getattr(other, name, None)
            mine = self.dense_shape(name) if own[name] else None
            theirs = None if source is None else whole_shape(source)
            if mine != theirs:
                raise TileShapeError(
                    f"{self.full_name()}.copy_params_from({type(other).__name__}): its {name} is "
                    f"{theirs or 'missing'}, this layer's {mine or 'missing'}; both must agree"
                )
            empty = source is not None and source.is_meta
            if empty and must_have_values and not all(p.is_meta for p in own[name].values()):
                raise TileDeviceError(
                    f"{self.full_name()}.copy_params_from({type(other).__name__}): its {name} is "
                    "on the meta device, where nothing has values; load or initialise it first"
                )

    @classmethod
    def from_linear(
        cls: type[Self],
        linear: nn.Linear,
        in_splits: int = 1,
        out_splits: int = 1,
        *,
        input_is_already_split: bool = False,
        combine_out_splits: bool = True,
    ) -> Self:
        """A tiled layer with the linear's values, dtype, device, requires_grad, training mode."""
        if not isinstance(linear, nn.Linear):
            raise TileClassError(
                f"from_linear takes an nn.Linear, not a {type(linear).__name__}; "
                "memtile.tile(model, …) knows the other modules that have a tiled form"
            )
        return cls.from_dense(
            linear,
            Grid.uniform(linear.out_features, linear.in_features, out_splits, in_splits),
            input_is_already_split=input_is_already_split,
            combine_out_splits=combine_out_splits,
        )

    @classmethod
    def from_dense(
        cls: type[Self],
        dense: nn.Module,
        grid: Grid,
        tied_to: TiledModule | None = None,
        home: Home | None = None,
        **options: bool,
    ) -> Self:
        """`from_linear` for a given grid; weight tiles may be those of `tied_to`, or in `home`."""
        has_bias = getattr(dense, "bias", None) is not None
        layer = cls(
            grid.in_features,
            grid.out_features,
            bias=has_bias,
            in_splits=grid.in_splits,
            out_splits=grid.out_splits,
            device="meta",
            home=home,
            _grid=grid,
            **options,  # type: ignore[arg-type]  # only the two flags of from_linear
        )
        layer.take_over(dense, tied_to)
        return layer

    def to_linear(self) -> nn.Linear:
        """An untiled `nn.Linear` with the same values, dtype, device, requires_grad, mode.

        Raises:
            CannotTileError: some tiles are frozen and some are not.
        """
        linear = self.to_dense()
        assert isinstance(linear, nn.Linear)
        return linear

    def to_dense(self, weight: nn.Parameter | None = None) -> nn.Module:
        """The untiled module that this layer replaces, with `weight` where it is tied."""
        linear = nn.Linear(self.in_features, self.out_features, self.use_bias, device="meta")
        self.hand_over(linear, weight)
        return linear


def _with_home(
    linear_cls: LinearClass, arguments: dict[str, Any]
) -> tuple[LinearClass, dict[str, Any]]:
    """The class and its arguments; where tiles are to be parked, with one home for all of them."""
    if linear_cls not in (nn.Linear, ParkedLinear):
        return linear_cls, arguments  # a user's own class gets its arguments as they are
    others = {name: value for name, value in arguments.items() if name != "home"}
    home = arguments.get("home")
    if home is None and linear_cls is nn.Linear:
        return linear_cls, others
    return ParkedLinear, {**others, "home": resolve_home(home or "host", others.get("device"))}


def _make_tile(
    linear_cls: LinearClass, in_features: int, out_features: int, bias: bool, **kwargs: Any
) -> nn.Module:
    """One tile, checked to be what a layer can hold; a plain linear comes without values."""
    if linear_cls in (nn.Linear, ParkedLinear):
        return uninitialised(linear_cls, in_features, out_features, bias=bias, **kwargs)
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


def _draws_like_linear(tile: nn.Module) -> bool:
    """Whether a tile draws its starting values as `nn.Linear` does."""
    drawn = getattr(type(tile), "reset_parameters", None)
    return isinstance(tile, nn.Linear) and drawn is nn.Linear.reset_parameters


@torch.no_grad()
def _draw_like_whole_linear(layer: TiledModule) -> None:
    """Draw all tiles from the distribution that `nn.Linear` gives the whole layer."""
    fan_in = layer.grid.in_features
    gain = nn.init.calculate_gain("leaky_relu", math.sqrt(5))
    bounds = {"weight": math.sqrt(3.0) * (gain / math.sqrt(fan_in)), "bias": 1 / math.sqrt(fan_in)}
    parameters = {name: layer.writable_parameters(name) for name in bounds}
    for name, bound in bounds.items():
        for parameter in parameters[name].values():
            with gathered([parameter], write=True):
                parameter.uniform_(-bound, bound)
