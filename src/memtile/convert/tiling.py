"""`tile`: a model's linears and embeddings become tiles, in place."""

from collections.abc import Collection
from typing import TypeVar

from torch import nn

from memtile.convert.kinds import integrations, kind_of, replace_module
from memtile.convert.select import Choice, Cut, choose
from memtile.errors import ArgumentError, CannotTileError
from memtile.layers import TiledModule

Model = TypeVar("Model", bound=nn.Module)


def tile(
    model: Model,
    *,
    out_splits: int | None = None,
    in_splits: int = 1,
    max_tile_bytes: int | None = None,
    modules: Collection[str] | None = None,
) -> Model:
    """Cut the linears and embeddings of a model into tiles, in place.

    Values are bit-identical; frozen stays frozen, tied stays tied; training mode, dtype, device,
    gradients stay. Each replaced layer is freed before the next is made, so the peak is the model
    and one layer. Make the optimizer afterwards, and look modules up anew: the parameters are new
    ones, and what holds a replaced module elsewhere (a plain list of modules) keeps the old one.

    Args:
        model: any module that holds linears.
        out_splits: rows of tiles for every module.
        in_splits: columns of tiles for every linear (embeddings, and what is tied to them, keep 1).
        max_tile_bytes: the largest weight tile; weights that fit stay dense.
        modules: names to tile; all that can be by default (`select_linears` lists them).

    Returns:
        The same model.

    Raises:
        ArgumentError: no size or a wrong one is given, or a name is no module of the model.
        CannotTileError: the model is itself a linear, or a module in `modules` cannot be tiled.
    """
    cut = Cut(out_splits, in_splits, max_tile_bytes)
    if not cut.is_given:
        raise ArgumentError(
            "tile(model) needs a size: out_splits=…, in_splits=…, or max_tile_bytes=…"
        )
    if kind_of(model) is not None or isinstance(model, TiledModule):
        raise CannotTileError(
            f"the model is itself a {type(model).__name__}, which cannot be replaced in place; use "
            "TiledLinear.from_linear(linear, …) or TiledEmbedding.from_embedding(embedding, …)"
        )
    done: set[str] = set()
    for choice in choose(model, cut, modules):
        if choice.tiled and choice.name not in done:
            done.update(_tile_group(model, choice))
    for integration in integrations():
        integration.tiled(model)
    return model


def _tile_group(model: nn.Module, choice: Choice) -> tuple[str, ...]:
    """Replace one module, and those tied to it, at every place where they stand."""
    assert choice.grid is not None
    first: TiledModule | None = None
    names = choice.ties or (choice.name,)
    for name in names:
        dense = model.get_submodule(name)
        kind = kind_of(dense)
        assert kind is not None
        layer = kind.tiled.from_dense(dense, choice.grid, first)
        layer.name_in_model = name
        first = first or layer
        replace_module(model, dense, layer)
    return names
