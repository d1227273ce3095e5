"""`tile`: a model's linears and embeddings become tiles, in place."""

import warnings
from collections.abc import Collection
from typing import TypeVar

from torch import nn

from memtile.convert.kinds import integrations, kind_of, replace_module
from memtile.convert.parking import home_for, is_parked, settle_down
from memtile.convert.select import Choice, Cut, choose
from memtile.errors import ArgumentError, CannotTileError, TileSizeWarning
from memtile.homes import Home
from memtile.layers import TiledModule

Model = TypeVar("Model", bound=nn.Module)


def tile(
    model: Model,
    *,
    out_splits: int | None = None,
    in_splits: int = 1,
    max_tile_bytes: int | None = None,
    modules: Collection[str] | None = None,
    home: Home | str | None = None,
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
        home: where the tiles' weights are parked: "host", a `DiskHome`, "device"; None: nowhere, as
            ever. With a home, layers that fit in one tile are parked whole, and a size is optional.

    Returns:
        The same model.

    Raises:
        ArgumentError: no size or a wrong one is given, or a name is no module of the model.
        CannotTileError: the model is itself a linear, a module in `modules` cannot be tiled, or
            out_splits and in_splits fit no module at all.
        HomeFullError: the home has no room for all tiles; the model is unchanged.
        SealError: the home was reopened and is not of this model; the model is unchanged.

    Warns:
        TileSizeWarning: parameters stay above `max_tile_bytes`: experts kept as one tensor, rows of
            an embedding that are longer, layers that are tiled already.
    """
    cut = Cut(out_splits, in_splits, max_tile_bytes, parks=home is not None)
    if not cut.is_given:
        raise ArgumentError(
            "tile(model) needs a size: out_splits=…, in_splits=…, or max_tile_bytes=…; with "
            "home=… whole layers can be parked"
        )
    choices = choose(model, cut, modules)
    if kind_of(model) is not None or isinstance(model, TiledModule):
        raise CannotTileError(
            f"the model is itself a {type(model).__name__}, which cannot be replaced in place; use "
            "TiledLinear.from_linear(linear, …) or TiledEmbedding.from_embedding(embedding, …)"
        )
    needs_one = cut.max_tile_bytes is None or home is not None
    if needs_one and not any(choice.tiled for choice in choices):
        why = f"{choices[0].name}: {choices[0].reason}" if choices else "it has no linear"
        raise CannotTileError(
            f"nothing of {type(model).__name__} can be tiled ({why}); "
            "memtile.select_linears(model, …) gives the reason for each module"
        )
    if home is not None and modules is None:
        _refuse_tiled_before(model)
    parked = None if home is None else home_for(model, choices, home)
    done: set[str] = set()
    for choice in choices:
        if choice.tiled and choice.name not in done:
            done.update(_tile_group(model, choice, parked))
    for integration in integrations():
        integration.tiled(model)
    if parked is not None:
        settle_down(model, parked)
    if cut.max_tile_bytes is not None and modules is None:
        _warn_of_larger(model, cut.max_tile_bytes, choices)
    return model


def _refuse_tiled_before(model: nn.Module) -> None:
    """Tiles that would stay where they are, while their model is thought to be at home."""
    for name, layer in model.named_modules():
        if isinstance(layer, TiledModule) and not is_parked(layer):
            raise CannotTileError(
                f"{name} is tiled already, and its tiles would stay in memory; call "
                "memtile.untile(model) first, then memtile.tile(model, …, home=…)"
            )


def _warn_of_larger(model: nn.Module, max_tile_bytes: int, choices: list[Choice]) -> None:
    """Say which parameters stay above the size, and why: a promise is not missed in silence."""
    reasons = {choice.name: choice.reason for choice in choices if not choice.tiled}
    larger = {
        name: parameter.nbytes
        for name, parameter in model.named_parameters()
        if parameter.nbytes > max_tile_bytes
    }
    if not larger:
        return
    name, size = max(larger.items(), key=lambda item: item[1])
    owners = (owner for owner in reasons if name.startswith(f"{owner}."))
    why = reasons.get(next(owners, ""), "it belongs to no linear or embedding")
    warnings.warn(
        f"{len(larger)} parameters stay above max_tile_bytes={max_tile_bytes}; the largest is "
        f"{name} with {size} bytes: {why}",
        TileSizeWarning,
        stacklevel=3,
    )


def _tile_group(model: nn.Module, choice: Choice, home: Home | None) -> tuple[str, ...]:
    """Replace one module, and those tied to it, at every place where they stand."""
    assert choice.grid is not None
    first: TiledModule | None = None
    names = choice.ties or (choice.name,)
    for name in names:
        dense = model.get_submodule(name)
        kind = kind_of(dense)
        assert kind is not None
        layer = kind.tiled.from_dense(dense, choice.grid, first, home)
        layer.name_in_model = name
        first = first or layer
        replace_module(model, dense, layer)
    return names
