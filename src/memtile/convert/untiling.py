"""`untile`: every tiled layer of a model becomes the dense module that it stands for, in place."""

from typing import TypeVar

from torch import nn

from memtile.convert.deferring import set_deferring_of
from memtile.convert.kinds import lost_on_replacing, replace_module, tiled_classes, tiled_layers
from memtile.convert.replaced import Replaced, replacing
from memtile.convert.select import Owners
from memtile.errors import ArgumentError, CannotTileError
from memtile.layers import (
    ParkedEmbedding,
    ParkedLinear,
    ParkedStackTile,
    StackOwner,
    StackTile,
    TiledModule,
    TiledStack,
    class_of,
    is_plain,
    take_out_of_tiles,
    take_pairs_out_of_tiles,
    untile_rows,
)
from memtile.transfer import unwatch_model

Model = TypeVar("Model", bound=nn.Module)
Layers = dict[str, TiledModule]
RESIDENT_TILES = nn.Linear, nn.Embedding, StackTile
PLAIN_TILES = *RESIDENT_TILES, ParkedLinear, ParkedEmbedding, ParkedStackTile


def untile(model: Model) -> Model:
    """Turn every tiled layer of a model back into the dense module that it stands for, in place.

    Values are bit-identical; ties, frozen parameters, mode, dtype, device, gradients stay. Each
    tiled layer is freed before the next dense one is made. Modules that run over row tiles
    (`tile_rows`) run as a whole again, and
    so do MLPs (`tile_mlps`).

    Raises:
        ArgumentError: the model is no module.
        CannotTileError: the model is itself a tiled layer, or a dense module could not do what a
            layer does: it is frozen in part, its tiles are more than plain linears, it has hooks,
            it takes or gives split tensors, it shares some of its tiles. Nothing was changed.

    Warns:
        ReplacedModuleWarning: a module still holds a tiled layer in an attribute or a list.

    Examples:
        >>> model = memtile.untile(memtile.tile(model, out_splits=4))
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"the model is a {type(model).__name__}; it must be an nn.Module")
    if isinstance(model, TiledModule):
        raise CannotTileError(
            f"the model is itself a {type(model).__name__}, which cannot be replaced in place; use "
            "layer.to_linear() or layer.to_embedding()"
        )
    ids = _checked_tile_ids(model)
    with replacing(model, "memtile.untile"):
        replaced = _replace_all(model, ids)
    for module in model.modules():
        untile_rows(module)
        take_out_of_tiles(module)
        take_pairs_out_of_tiles(module)
    set_deferring_of(model, False)
    unwatch_model(model)
    replaced.warn(model, stacklevel=2)
    return model


def _replace_all(model: nn.Module, ids: dict[str, tuple[int, ...]]) -> Replaced:
    weights: dict[tuple[int, ...], tuple[nn.Parameter, TiledModule]] = {}
    names, replaced = list(ids), Replaced()
    for number, name in enumerate(names, 1):
        layer = model.get_submodule(name)
        assert isinstance(layer, TiledModule)
        replaced.add(name, layer)
        known = weights.get(ids[name])
        weight = _replace(model, name, layer, known[0] if known else None)
        if ids[name] in [ids[other] for other in names[number:]]:
            # The layer is kept until its last tie is dense: a freed tile's id could be used again.
            weights[ids[name]] = weight, layer
        else:
            weights.pop(ids[name], None)
        del layer, weight
    return replaced


def _replace(
    model: nn.Module, name: str, layer: TiledModule, weight: nn.Parameter | None
) -> nn.Parameter:
    """Put the dense form of a layer in its place, with `weight` where it is tied; its weight."""
    if isinstance(layer, TiledStack):
        path, _, own = name.rpartition(".")
        owner = model.get_submodule(path)
        assert isinstance(owner, StackOwner)
        weight = weight if weight is not None else layer.dense_parameter("weight")
        assert weight is not None
        owner.restore_stack(own, weight)
        return weight
    dense = layer.to_dense(weight)
    replace_module(model, layer, dense)
    made = dense.weight
    assert isinstance(made, nn.Parameter)
    return made


def _checked_tile_ids(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The ids of each layer's weight tiles, by its name, once all can be turned back."""
    layers: Layers = dict(tiled_layers(model))
    ids = {
        name: tuple(id(tile) for tile in layer.tile_parameters("weight").values())
        for name, layer in layers.items()
    }
    owners = Owners(model)
    for name, layer in layers.items():
        lost = lost_on_replacing(layer)
        reason = cannot_be_dense(layer) or lost or _shared_reason(name, layers, ids, owners)
        if reason:
            raise CannotTileError(f"{name} cannot be untiled: {reason}")
    return ids


def cannot_be_dense(layer: TiledModule) -> str:
    """What a dense module would not do that this layer's tiles do; "" for nothing."""
    if getattr(layer, "whole_class", class_of(layer)) not in tiled_classes():
        return f"{type(layer).__name__} is a class of its own, which no dense module stands for"
    if getattr(layer, "input_is_already_split", False):
        return "it takes an input that is already split, which a dense linear does not"
    if not getattr(layer, "combine_out_splits", True):
        return "it gives its rows uncombined, which a dense linear does not"
    for index, tile in layer.tiles():
        if not is_plain(tile, type(tile)) or type(tile) not in PLAIN_TILES:
            return f"its tile {index} is more than a plain linear ({type(tile).__name__}, hooks?)"
    for name in ("weight", "bias"):
        if len({tile.requires_grad for tile in layer.tile_parameters(name).values()}) > 1:
            return (
                f"some tiles of its {name} require grad and some do not, which one dense "
                "parameter cannot; call layer.requires_grad_(True or False) first"
            )
    return ""


def _shared_reason(
    name: str,
    layers: Layers,
    ids: dict[str, tuple[int, ...]],
    owners: Owners,
) -> str:
    """Why dense modules, which share whole weights only, could not share as tiles do; or ""."""
    tied = [other for other in layers if ids[other] == ids[name]]
    for own in ("weight",) if layers[name].whole_bias is not None else ("weight", "bias"):
        among = tied if own == "weight" else [name]
        for index, parameter in layers[name].tile_parameters(own).items():
            expected = {f"{other}.{layers[other].parameter_path(own, index)}" for other in among}
            others = [path for path, o in owners.of(parameter) if f"{path}.{o}" not in expected]
            if others:
                return f"its tile {index} shares its {own} with {others[0]}, and not all of it"
    return ""
