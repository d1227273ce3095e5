"""`TiledModule`: a grid, tiles with parameters of their own, and the dense forms of both."""

import re
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memtile.errors import (
    CannotTileError,
    HandleError,
    StateDictError,
    TileClassError,
    TileShapeError,
)
from memtile.geometry import Grid, Rect, Span
from memtile.homes import Home, allocate_copy, page_out
from memtile.layers.handle import DenseHandle
from memtile.layers.loading import load_any_form, problems_of
from memtile.layers.parked import ParkedModule, parameter_of
from memtile.layers.values import (
    DENSE_NAMES,
    Index,
    Values,
    as_matrix,
    bias_rect,
    dense_copy,
    gathered,
)
from memtile.transfer import catch_up

_alive: "weakref.WeakSet[TiledModule]" = weakref.WeakSet()
_watchers: list[tuple[str, Callable[[], None]]] = []


def watch_tiles(library: str, watcher: Callable[[], None]) -> None:
    """Call `watcher` whenever a tiled layer is made or unpickled, and before its state is saved.

    Only in processes that have imported `library`.
    """
    _watchers.append((library, watcher))


class TiledModule(nn.Module):
    """The base of tiled layers. Subclasses hold their tiles and say under which names."""

    weight_is_transposed: ClassVar[bool] = False  # whether the dense module's weight is (in, out)
    is_routed: ClassVar[bool] = False  # whether a forward needs only some of the tiles
    tile_pattern: ClassVar[re.Pattern[str]]  # of state dict names: groups row, column and name
    grid: Grid  # how the weight is cut
    name_in_model: str = ""  # for messages
    stands_for_dense: bool = False  # whether it was made from a dense module, to replace it

    def __init__(self) -> None:
        super().__init__()
        _announce(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        _announce(self)

    def tile(self, row: int, column: int) -> nn.Module:
        """The tile at (row, column)."""
        raise NotImplementedError

    @staticmethod
    def tile_path(row: int, column: int) -> str:
        """The name of the tile at (row, column) below this layer."""
        raise NotImplementedError

    def tiles(self) -> Iterator[tuple[Index, nn.Module]]:
        """((row, column), tile) of every tile, row by row."""
        return ((index, self.tile(*index)) for index in self.grid.indices())

    @staticmethod
    def dense_name(path: str, own: str) -> str:
        """The name of the dense "weight" or "bias" of a layer that stands at `path`."""
        return f"{path}.{own}" if path else own

    def full_name(self) -> str:
        """The layer's name in its model where it is known, or its class: for messages."""
        return self.name_in_model or type(self).__name__

    @property
    def whole_bias(self) -> nn.Parameter | None:
        """The bias where the layer keeps it whole, since others share it: no tile has one then."""
        return self._parameters.get("bias")

    def tile_parameters(self, name: str) -> dict[Index, nn.Parameter]:
        """The tiles' parameters called `name` by their place; biases are one column.

        A bias that is kept whole is the only entry, at (0, 0).
        """
        if name == "bias" and self.whole_bias is not None:
            return {(0, 0): self.whole_bias}
        found: dict[Index, Any] = {}  # a computed one is a Tensor only
        for index, tile in self.tiles():
            parameter = getattr(tile, name, None)
            if isinstance(parameter, Tensor):  # a quantized linear has a method of this name
                found[index if name == "weight" else (index[0], 0)] = parameter
        return found

    def stored_parameters(self, name: str) -> dict[Index, nn.Parameter]:
        """Those that tiles, and so state dicts, hold under this name: not the computed ones."""
        return {
            index: parameter
            for index, parameter in self.tile_parameters(name).items()
            if name in self.owner(name, index)._parameters
        }

    def writable_parameters(self, name: str) -> dict[Index, nn.Parameter]:
        """All of them, to be written to; TileClassError where a tile computes its parameter."""
        parameters = self.tile_parameters(name)
        for index, parameter in parameters.items():
            if not isinstance(parameter, nn.Parameter):
                raise TileClassError(
                    f"{self.full_name()}: tile {index} computes its {name} (a parametrization?), "
                    "so what is written to it would be lost; remove the parametrization first, or "
                    "write to the parameters that it is computed from"
                )
        return parameters

    def owner(self, name: str, index: Index) -> nn.Module:
        """The tile that has the parameter called `name` at this place, or this layer itself."""
        tile = self._owning_tile(name, index)
        return self if tile is None else self.tile(*tile)

    def parameter_path(self, name: str, index: Index) -> str:
        """The name below this layer of the parameter called `name` at this place."""
        tile = self._owning_tile(name, index)
        return name if tile is None else f"{self.tile_path(*tile)}.{name}"

    def _owning_tile(self, name: str, index: Index) -> Index | None:
        if name == "weight":
            return index
        return (index[0], self.grid.in_splits - 1) if self.whole_bias is None else None

    def tile_rect(self, name: str, index: Index) -> Rect:
        """The rectangle of the dense weight, or of the bias as one column, that a tile holds."""
        if name == "weight":
            return self.grid.rect(*index)
        if self.whole_bias is not None:
            return bias_rect(Span(0, self.grid.out_features))
        return bias_rect(self.grid.out_spans[index[0]])

    def dense_shape(self, name: str) -> tuple[int, ...]:
        """The shape of the dense parameter, as the dense module keeps it."""
        if name == "bias":
            return (self.grid.out_features,)
        shape = (self.grid.out_features, self.grid.in_features)
        return shape[::-1] if self.weight_is_transposed else shape

    def dense_tensor(self, name: str) -> Tensor:
        """The dense parameter assembled from the tiles, as the dense module keeps it.

        Differentiable with respect to the tiles where gradients are on.
        """
        return self.assemble(name, self.tile_parameters(name))

    def dense_gradient(self, name: str) -> Tensor | None:
        """The dense gradient assembled from the tiles' gradients; None while one has none."""
        gradients = {index: tile.grad for index, tile in self.tile_parameters(name).items()}
        missing = any(gradient is None for gradient in gradients.values())
        return None if missing else self.assemble(name, gradients)

    def assemble(self, name: str, tensors: Mapping[Index, Any]) -> Tensor:
        """The dense tensor that tensors by their place make, as the dense module keeps it."""
        shape = (self.grid.out_features, self.grid.in_features)
        return self.transposed(name, dense_copy(tensors, shape if name == "weight" else shape[:1]))

    def transposed(self, name: str, tensor: Tensor) -> Tensor:
        """The dense tensor as the tiles have it, or back: transposed where the weight is."""
        return tensor.t() if name == "weight" and self.weight_is_transposed else tensor

    @property
    def weight(self) -> Tensor:
        """A handle of the dense weight, assembled when used; its shape and dtype cost nothing."""
        weight = self._read("weight")
        if weight is None:
            raise AttributeError("the tiles have no weight")  # so that hasattr is False
        return weight

    @property
    def bias(self) -> Tensor | None:
        """A handle of the dense bias, the bias itself where it is kept whole, or None."""
        return self._read("bias") if self.whole_bias is None else self.whole_bias

    def _read(self, name: str) -> Tensor | None:
        if not self.tile_parameters(name):
            return None
        if torch.compiler.is_compiling():
            return self.dense_tensor(name)  # handles cannot be traced; unused tensors are dropped
        return DenseHandle(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in DENSE_NAMES or (name == "bias" and self.whole_bias is not None):
            super().__setattr__(name, value)
        elif not self._is_own(name, value):
            raise HandleError(
                f"{self.full_name()}.{name} = … would not reach the tiles, so nothing would "
                "change: write values with layer.copy_params_from(linear); to tie two tiled "
                "layers of the same grid, call layer.share_tiles_with(other); to tie layers of "
                "a model, tie them first and call memtile.tile(model), which keeps ties"
            )

    def _is_own(self, name: str, value: Any) -> bool:
        own = list(self.tile_parameters(name).values())
        if value is None:
            return not own
        return isinstance(value, DenseHandle) and value.is_of_tiles(own)

    @torch.no_grad()
    def share_tiles_with(self, other: "TiledModule") -> None:
        """Use the other layer's tile weights from now on; TileShapeError where the grids differ."""
        if self.grid != other.grid or self.weight_is_transposed != other.weight_is_transposed:
            raise TileShapeError(
                f"{self.full_name()} has grid {self.grid.out_parts} × {self.grid.in_parts}, "
                f"{other.full_name()} {other.grid.out_parts} × {other.grid.in_parts}: only layers "
                "of the same grid can share tiles; make both with the same splits"
            )
        for index, tile in self.tiles():
            tile.weight = other.tile(*index).weight

    def tied_layers(self) -> "list[TiledModule]":
        """All other layers, of any model, that have the same weight tiles."""
        own = [*map(id, self.tile_parameters("weight").values())]
        others = [layer for layer in list(_alive) if layer is not self]
        return [x for x in others if own == [*map(id, x.tile_parameters("weight").values())]]

    @torch.no_grad()
    def copy_values(self, name: str, values: Values) -> None:
        """Copy values of any grid into the tiles, one tile at a time."""
        for index, parameter in self.writable_parameters(name).items():
            with gathered([parameter], write=True) as kept:
                values.write_to(parameter, self.tile_rect(name, index), kept=kept)

    @torch.no_grad()
    def adopt(self, name: str, dense: Tensor) -> None:
        """Give every tile a new parameter: its piece of the dense weight or bias, copied.

        dtype, device, requires_grad, a gradient and attributes set on the parameter are kept.
        """
        for index, old in self.tile_parameters(name).items():
            values = self._piece(name, index, dense, old.shape)
            parameter = parameter_of(values, dense.requires_grad)
            parameter.__dict__.update(dense.__dict__)
            if dense.grad is not None:
                parameter.grad = self._piece(name, index, dense.grad, old.shape)
            setattr(self.owner(name, index), name, parameter)
        page_out(dense)

    def _piece(self, name: str, index: Index, dense: Tensor, shape: torch.Size) -> Tensor:
        """A copy of a tile's part of the dense tensor, in the tile's home where it has one."""
        matrix, owner = as_matrix(self.transposed(name, dense.detach())), self.owner(name, index)
        piece = matrix[self.tile_rect(name, index).index]
        piece = piece.view(shape) if name == "bias" else piece
        if isinstance(owner, ParkedModule) and name == "weight" and not piece.is_meta:
            return allocate_copy(owner.home, piece)
        return piece.clone(memory_format=torch.contiguous_format)

    def dense_parameter(self, name: str) -> nn.Parameter | None:
        """The dense parameter as a new leaf with the tiles' dtype, device, requires_grad, gradient.

        CannotTileError where some tiles are frozen and some are not.
        """
        tiles = list(self.tile_parameters(name).values())
        if not tiles:
            return None
        if len({tile.requires_grad for tile in tiles}) > 1:
            raise CannotTileError(
                f"{self.full_name()}: some tiles of its {name} require grad and some do not, which "
                "one dense parameter cannot; call layer.requires_grad_(True or False) first"
            )
        with torch.no_grad():
            dense = self.dense_tensor(name).contiguous()
            parameter = nn.Parameter(dense, requires_grad=tiles[0].requires_grad)
            gradient = self.dense_gradient(name)
        parameter.__dict__.update(tiles[0].__dict__)
        parameter.grad = None if gradient is None else gradient.contiguous()
        return parameter

    def take_over(self, dense: nn.Module, tied_to: "TiledModule | None" = None) -> None:
        """Take the parameters and the mode of a dense module, or a tied layer's weight tiles."""
        for name in DENSE_NAMES:
            if getattr(dense, name, None) is None:
                continue
            if name == "weight" and tied_to is not None:
                self.share_tiles_with(tied_to)
            else:
                self.adopt(name, getattr(dense, name))
        self.train(dense.training)
        self.stands_for_dense = True

    def hand_over(self, dense: nn.Module, weight: nn.Parameter | None = None) -> None:
        """Give parameters and mode to a dense module, or `weight` where it is tied to another."""
        weight = self.dense_parameter("weight") if weight is None else weight
        bias = self.dense_parameter("bias") if self.whole_bias is None else self.whole_bias
        for name, parameter in zip(DENSE_NAMES, (weight, bias), strict=True):
            if parameter is not None:
                setattr(dense, name, parameter)
        dense.train(self.training)

    @classmethod
    def from_dense(
        cls,
        dense: nn.Module,
        grid: Grid,
        tied_to: "TiledModule | None" = None,
        home: Home | None = None,
    ) -> "TiledModule":
        """The tiled layer for a dense module; a `home` is where its weight is parked."""
        raise NotImplementedError

    def to_dense(self, weight: nn.Parameter | None = None) -> nn.Module:
        """The untiled module that this layer stands for, with `weight` where it is tied."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load dense names, this grid's or any other grid's tile names.

        StateDictError, and nothing is loaded, where tensors are missing, extra or misshapen.
        """
        problems = problems_of(self, state_dict, strict, assign)
        if problems:
            raise StateDictError("; ".join(problems))
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _save_to_state_dict(self, *given: Any) -> None:
        """torch's own hook for one module's part of a state dict."""
        _announce(self)
        catch_up(self.parameters())
        super()._save_to_state_dict(*given)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        """torch's own hook for one module's part of a checkpoint; `rest` ends with `error_msgs`."""
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        rest[-1].extend(load_any_form(self, state_dict, prefix, assign))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def _announce(layer: TiledModule) -> None:
    _alive.add(layer)
    for library, watcher in _watchers:
        if library in sys.modules:
            watcher()
