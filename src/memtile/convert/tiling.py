"""`tile` and `untile`: a model's linears and embeddings become tiles, and back, in place."""

from collections.abc import Collection
from typing import TypeVar

from torch import nn

from memtile.convert.kinds import integrations, kind_of
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
    and one layer. Make the optimizer afterwards: the parameters are new ones.

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


def untile(model: Model) -> Model:
    """Turn every tiled layer of a model back into the dense module that it stands for, in place.

    Values are bit-identical; ties, frozen parameters, mode, dtype, device, gradients stay. Each
    tiled layer is freed before the next dense one is made.

    Raises:
        CannotTileError: the model is itself a tiled layer, or a layer is frozen in part. Layers
            before it are dense by then; every layer is whole.
    """
    if isinstance(model, TiledModule):
        raise CannotTileError(
            f"the model is itself a {type(model).__name__}, which cannot be replaced in place; use "
            "layer.to_linear() or layer.to_embedding()"
        )
    names = [name for name, module in model.named_modules() if isinstance(module, TiledModule)]
    homes = {name: _tile_ids(model.get_submodule(name)) for name in names}
    weights: dict[tuple[int, ...], tuple[nn.Parameter, TiledModule]] = {}
    while names:
        name = names.pop(0)
        layer = model.get_submodule(name)
        assert isinstance(layer, TiledModule)
        known = weights.get(homes[name])
        dense = layer.to_dense(known[0] if known else None)
        if homes[name] in [homes[other] for other in names]:
            # The layer is kept until its last tie is dense: a freed tile's id could come again.
            weights[homes[name]] = dense.weight, layer  # type: ignore[assignment]  # a parameter
        else:
            weights.pop(homes[name], None)
        replace_module(model, layer, dense)
    for integration in integrations():
        integration.untiled(model)
    return model


def _tile_ids(layer: nn.Module) -> tuple[int, ...]:
    assert isinstance(layer, TiledModule)
    return tuple(id(parameter) for parameter in layer.tile_parameters("weight").values())


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` stands in the model."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
    for integration in integrations():
        integration.replaced(old, new)
