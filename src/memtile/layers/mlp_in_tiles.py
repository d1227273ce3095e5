"""MLPs of a model that `tiled_mlp` computes: changed in place, their layers stay where they are.

At each call the module's own forward is run on shapes (`mlp_structure`), so what the module is now
is what is computed: another activation or dropout, evaluation mode, adapters around its linears.
Where it is no MLP any more, its own forward runs.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from memtile import ops
from memtile.errors import ArgumentError, TileShapeError
from memtile.layers import checks
from memtile.layers.derived_class import ChangedModule, apply_change, undo_change
from memtile.layers.gathered_calls import has_only_hooks_of_engines, has_shards
from memtile.layers.mlp_layers import Half, MlpLayers
from memtile.layers.mlp_structure import (
    MlpStructure,
    NoMlpError,
    structure_of,
)
from memtile.layers.tiled_mlp import tiled_mlp

# A block: in inference, so large an intermediate activation is computed whole.
FEWEST_BYTES: Final = ops.MLP_BLOCK_BYTES


class MlpInTiles(ChangedModule):
    """An MLP in a model, whose intermediate activation does not exist."""

    mlp_sizes: dict[str, int]  # the features that each of its linears gives, by its name

    def run(self, forward: partial[Any], args: Any, kwargs: Any) -> Any:
        """By `tiled_mlp`, or by the module's own forward where that does anything else."""
        x, *others = (*args, *kwargs.values()) or (None,)
        found = None if others else self._structure(forward, x)
        if found is None:
            return forward(*args, **kwargs)
        structure, layers = found
        y = tiled_mlp(x, *layers, activation=structure.activation, dropout=structure.dropout)
        return structure.after(y)

    def _structure(self, forward: partial[Any], x: Any) -> tuple[MlpStructure, MlpLayers] | None:
        """That of this call, and its layers; None where its own forward is called."""
        children = [*self.children()]
        if checks.hooked_globally() or not all(map(has_only_hooks_of_engines, children)):
            return None
        # all ranks gather the same, however many tokens each has
        gathers = any(map(has_shards, children))
        if not can_be_in_tiles(x) or not (
            gathers or is_worth_tiles(x, max(self.mlp_sizes.values()))
        ):
            return None
        try:
            found = checked_structure(self, forward.func, self.mlp_sizes, x)
            layers = layers_of(self, found)
            layers.check()
        except (NoMlpError, TileShapeError):  # the second: untiled since, or cut otherwise
            return None
        # what is called is called twice: one that is gate and up, and one that is gathered
        is_once = found.gate_half is None and not gathers
        is_called = not is_once and layers.weights() is None and layers.gathered() is None
        return None if is_called else (found, layers)


def can_be_in_tiles(x: Any) -> bool:
    """Whether an MLP of this input may be computed by tiles."""
    is_input = type(x) is Tensor and x.dim() > 0 and x.is_floating_point()
    return is_input and not ops.transformed()


def is_worth_tiles(x: Tensor, features: int) -> bool:
    """Whether an MLP of so many intermediate features gains by it."""
    return torch.is_grad_enabled() or x[..., 0].nbytes * features > FEWEST_BYTES


def layers_of(module: nn.Module, structure: MlpStructure) -> MlpLayers:
    """The layers of a module that is an MLP."""
    children: Mapping[str, Any] = module._modules
    up, down, half = children[structure.up], children[structure.down], structure.gate_half
    if half is None:
        gate = None if structure.gate is None else children[structure.gate]
        return MlpLayers(gate, up, down)
    halves = Half.both(up)
    return MlpLayers(halves[half], halves[1 - half], down)


def checked_structure(
    module: nn.Module, forward: Any, sizes: Mapping[str, int], x: Tensor
) -> MlpStructure:
    """`structure_of`; NoMlpError also where the activation is not element-wise."""
    found = structure_of(module, forward, sizes, x)
    try:
        inner = sizes[found.up] // (1 if found.gate_half is None else 2)
        ops.check_element_wise(found.activation, inner, dims=x.dim())
    except ArgumentError as error:
        raise NoMlpError("its activation is not element-wise") from error
    return found


def put_in_tiles(module: nn.Module, sizes: Mapping[str, int]) -> None:
    """Have `tiled_mlp` compute the module."""
    apply_change(module, MlpInTiles)
    module.__dict__["mlp_sizes"] = dict(sizes)


def take_out_of_tiles(module: nn.Module) -> bool:
    """Have the module's own forward compute it again; False where it did already."""
    undone = undo_change(module, MlpInTiles)
    if undone:
        del module.__dict__["mlp_sizes"]
    return undone
