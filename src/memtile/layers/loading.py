"""Reading a layer from a checkpoint in any form: dense names, or tiles of any grid.

torch loads a module's children after the module itself, from the same dictionary, so the layer
rewrites its part of the dictionary into its own tiles' names before they look. If that part does
not describe the layer, nothing is loaded into it and the reasons are reported as sentences. The
layer's own tiles beside another form are ignored: torch's `set_model_state_dict` adds them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from memtile.errors import MemtileError
from memtile.layers.values import DENSE_NAMES, Index, Values, gathered

Layer = Any  # a TiledModule, whose file imports this one


def problems_of(
    layer: Layer, state_dict: Mapping[str, Any], strict: bool, assign: bool
) -> list[str]:
    """Every reason, as a sentence, why the dictionary cannot be loaded into the layer."""
    found = _Found(layer, state_dict, "")
    problems = found.problems(assign)
    if strict:
        missing = [name for name in DENSE_NAMES if found.own[name] and not found.has(name)]
        if missing:
            problems.append(
                f"{layer.full_name()}: the checkpoint has no {' and no '.join(missing)}, neither "
                f"dense nor in tiles; it holds {sorted(found.keys)[:6]}"
            )
        if found.extra:
            problems.append(
                f"{layer.full_name()}: the checkpoint has unknown names {found.extra[:6]}"
            )
    return problems


def load_any_form(layer: Layer, state_dict: dict[str, Any], prefix: str, assign: bool) -> list[str]:
    """Rewrite the layer's entries of `state_dict` into names and values of its own tiles, in place.

    With `assign` torch makes the entries the tiles' parameters, so they must be copies. Gives what
    is wrong, as sentences; the tiles keep their values then.
    """
    found = _Found(layer, state_dict, prefix)
    problems = found.problems(assign)
    for name in DENSE_NAMES:
        if found.has(name) and (problems or not found.is_own_form(name) or assign):
            found.rewrite(name, keep=bool(problems), assign=assign)
    return problems


class _Found:
    """What a checkpoint holds for one layer: dense names, tiles of any grid, and other keys."""

    def __init__(self, layer: Layer, state_dict: Mapping[str, Any], prefix: str) -> None:
        self.layer, self.state_dict, self.prefix = layer, state_dict, prefix
        self.own = {name: layer.stored_parameters(name) for name in DENSE_NAMES}  # to be loaded
        self.keys = [key[len(prefix) :] for key in state_dict if key.startswith(prefix)]
        self.dense = {name for name in DENSE_NAMES if name in self.keys}
        self.tiles: dict[str, dict[Index, str]] = {name: {} for name in DENSE_NAMES}
        self.extra: list[str] = []
        for key in self.keys:
            match = layer.tile_pattern.fullmatch(key)
            if match:
                row, column = int(match["row"]), int(match.groupdict().get("column") or 0)
                self.tiles[match["name"]][row, column] = key
            elif key not in DENSE_NAMES and not self._is_known(key):
                self.extra.append(key)
        for name in DENSE_NAMES:
            if not self.is_own_form(name):  # then the layer's own tiles are no part of it
                self.tiles[name] = {
                    index: key
                    for index, key in self.tiles[name].items()
                    if not _same_memory(self.value(key), self.own[name].get(_place(name, index)))
                }

    def value(self, key: str) -> Any:
        """What the checkpoint holds under the layer's name `key`."""
        return self.state_dict[self.prefix + key]

    def _is_known(self, key: str) -> bool:
        """Whether a key belongs to a subclass, or to another parameter of a tile."""
        tiles = (self.layer.tile_path(*index) + "." for index in self.layer.grid.indices())
        return key in self.layer.state_dict() or any(map(key.startswith, tiles))

    def has(self, name: str) -> bool:
        return name in self.dense or bool(self.tiles[name])

    def is_own_form(self, name: str) -> bool:
        """Whether these are this layer's own tiles, which torch can load by itself."""
        if name == "bias" and self.layer.whole_bias is not None:
            return not self.tiles[name]
        found = {key: self.value(key) for key in self.tiles[name].values()}
        own = {self.layer.parameter_path(name, index): p for index, p in self.own[name].items()}
        return (
            name not in self.dense
            and found.keys() == own.keys()
            and all(getattr(v, "shape", None) == own[key].shape for key, v in found.items())
        )

    def problems(self, assign: bool) -> list[str]:
        """Why the weight or the bias cannot be loaded, a sentence each."""
        problems = []
        for name in filter(self.has, DENSE_NAMES):
            try:
                problem = self._unreadable(name, assign) or self._unfitting(name)
            except MemtileError as error:
                problem = str(error)
            if problem:
                problems.append(f"{self.layer.full_name()}.{name}: {problem}")
        return problems or self._of_two_grids()

    def _unreadable(self, name: str, assign: bool) -> str:
        if name in self.dense and self.tiles[name]:
            return "the checkpoint holds it both dense and in tiles; keep one of the two"
        rows = [row for row, _ in self.tiles[name]]
        if name == "bias" and len(set(rows)) < len(rows):
            return f"the checkpoint holds more than one for a row of tiles: {self.tiles[name]}"
        for key in [name] if name in self.dense else self.tiles[name].values():
            value = self.value(key)
            if not isinstance(value, Tensor):
                return f"the checkpoint's {key} is a {type(value).__name__}, not a tensor"
            if value.is_meta and not (assign or all(p.is_meta for p in self.own[name].values())):
                return f"the checkpoint's {key} is on the meta device, where nothing has values"
        return ""

    def _unfitting(self, name: str) -> str:
        present = self.layer.tile_parameters(name)
        if not present:
            return "the checkpoint holds one, but the layer has none; make it with bias=True"
        computed = [index for index in present if index not in self.own[name]]
        if computed and not self.is_own_form(name):
            return (
                f"tile {computed[0]} computes it (a parametrization?), so only this layer's own "
                "state dict can be loaded; load the checkpoint first and parametrize then"
            )
        expected = self.layer.dense_shape(name)
        if name in self.dense:
            found, what = tuple(self.value(name).shape), "is"
        elif self.is_own_form(name):
            tiles = self._tiles_by_place(name)
            if any(tile.dtype != self.own[name][index].dtype for index, tile in tiles.items()):
                Values.tiles(tiles)  # raises where they are of several dtypes
            return ""
        else:
            found, what = self._values(name).shape, "tiles make"
            grid = self.layer.grid
            expected = (grid.out_features, grid.in_features if name == "weight" else 1)
        return (
            "" if found == expected else f"the checkpoint's {what} {found}, the layer's {expected}"
        )

    def _of_two_grids(self) -> list[str]:
        """Tiles of the weight and of the bias that were not cut together."""
        if not all(self.tiles.values()) or all(map(self.is_own_form, DENSE_NAMES)):
            return []
        parts = [self._values(name).grid.out_parts for name in DENSE_NAMES]
        if parts[0] == parts[1]:
            return []
        return [
            f"{self.layer.full_name()}: the checkpoint's weight tiles are cut at rows {parts[0]}, "
            f"its bias tiles at {parts[1]}: they are tiles of two layers; load those of one"
        ]

    def _values(self, name: str) -> Values:
        if name in self.dense:
            return Values.dense(self.layer.transposed(name, self.value(name)))
        return Values.tiles(self._tiles_by_place(name))

    def _tiles_by_place(self, name: str) -> dict[Index, Tensor]:
        return {_place(name, index): self.value(key) for index, key in self.tiles[name].items()}

    def rewrite(self, name: str, *, keep: bool, assign: bool) -> None:
        """Put this layer's tiles into the dictionary, with their old or the found values."""
        assert isinstance(self.state_dict, dict)
        values = None if keep else self._values(name)
        for key in [name, *self.tiles[name].values()]:
            self.state_dict.pop(self.prefix + key, None)
        for index, parameter in self.own[name].items():
            key = self.prefix + self.layer.parameter_path(name, index)
            self.state_dict[key] = self._entry(name, index, parameter, values, assign)

    def _entry(
        self, name: str, index: Index, parameter: nn.Parameter, values: Values | None, assign: bool
    ) -> Tensor:
        """What torch will load into one tile; the parameter itself where it is already written."""
        if values is None:
            return parameter
        rect = self.layer.tile_rect(name, index)
        if assign or parameter.is_meta:
            return values.copy_of(rect, parameter)
        with torch.no_grad(), gathered([parameter], write=True) as kept:
            values.write_to(parameter, rect, kept=kept)
        return parameter


def _place(name: str, index: Index) -> Index:
    """A tile's place in its tensor: biases, which stand in the last column, are one column."""
    return index if name == "weight" else (index[0], 0)


def _same_memory(value: object, own: Tensor | None) -> bool:
    """Whether a value is a tensor itself, or a detached one of the same elements."""
    if own is None or not isinstance(value, Tensor):
        return False
    if value is own:
        return True
    if type(value) not in (Tensor, nn.Parameter) or value.is_meta or own.is_meta:
        return False
    mine, theirs = ((t.data_ptr(), t.shape, t.dtype, t.device) for t in (own, value))
    return mine == theirs
