"""More or fewer tokens, ties and new starting values for the tiled layers of transformers models.

transformers' own code resizes a layer, or draws its values: it gets the one layer dense, and what
it gives is cut again with tiles no larger than before, in the same home. The layer object stays.
Peak, beside the model: the layer before and after, dense, and what transformers makes (two float32
copies with `mean_resizing=True`); its home needs room for the layer before and after.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from memtile.convert import cannot_be_dense, kind_of, replace_module, replacing, tiled_layers
from memtile.errors import CannotTileError, ParkedCopyWarning
from memtile.geometry import Grid
from memtile.homes import Home, allocation_of
from memtile.integrations.saving import loaded_class, with_tiles
from memtile.layers import DENSE_NAMES, DenseHandle, TiledLinear, TiledModule, TiledStack, is_shard

_MARK = "_is_hf_initialized"  # transformers' own: a marked module is not initialised again
_KEPT = frozenset({"training", "name_in_model", "stands_for_dense"})


def patch_resizing() -> None:
    """Have transformers resize, tie and initialise tiled layers."""
    cls = loaded_class("transformers.modeling_utils", "PreTrainedModel")
    if cls == ():
        return
    with_tiles(cls, "_get_resized_embeddings", _get_resized_embeddings)
    with_tiles(cls, "_get_resized_lm_head", _get_resized_lm_head)
    with_tiles(cls, "tie_weights", _tie_weights)
    with_tiles(cls, "get_expanded_tied_weights_keys", _expanded_ties)
    with_tiles(cls, "initialize_weights", _initialize_weights)
    with_tiles(cls, "_initialize_weights", _initialize_layer, applies=_is_tiled)


def _is_tiled(model: nn.Module, module: object, *rest: object) -> bool:
    return isinstance(module, TiledModule)


def _get_resized_embeddings(
    original: Callable[..., Any],
    model: nn.Module,
    old_embeddings: nn.Module,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    mean_resizing: bool = True,
) -> Any:
    """transformers' `_get_resized_embeddings`; tied layers change with the embedding."""
    options = new_num_tokens, pad_to_multiple_of, mean_resizing
    if not isinstance(old_embeddings, TiledModule):
        return original(model, old_embeddings, *options)
    rows = old_embeddings.grid.out_features
    wanted = rows if new_num_tokens is None else new_num_tokens
    if isinstance(pad_to_multiple_of, int):
        wanted += -wanted % pad_to_multiple_of
    if wanted == rows:
        return original(model, old_embeddings, *options)
    return _resized(model, old_embeddings, lambda dense: original(model, dense, *options))


def _get_resized_lm_head(
    original: Callable[..., Any],
    model: Any,  # a PreTrainedModel, which is not imported here
    old_lm_head: nn.Module,
    new_num_tokens: int | None = None,
    transposed: bool = False,
    mean_resizing: bool = True,
) -> Any:
    """transformers' `_get_resized_lm_head`, for a head that may be an embedding too."""
    options = new_num_tokens, transposed, mean_resizing
    if not isinstance(old_lm_head, TiledModule):
        return original(model, old_lm_head, *options)
    if not isinstance(old_lm_head, TiledLinear):
        return model._get_resized_embeddings(
            old_lm_head, new_num_tokens, mean_resizing=mean_resizing
        )
    rows = old_lm_head.weight.shape[1 if transposed else 0]
    if new_num_tokens in (None, rows):
        with replacing(model, "resize_token_embeddings"):
            _whole_bias(old_lm_head)  # some models set it as their own
        return original(model, old_lm_head, *options)
    return _resized(model, old_lm_head, lambda dense: original(model, dense, *options))


def _resized(
    model: nn.Module, layer: TiledModule, resize: Callable[[nn.Module], nn.Module]
) -> TiledModule:
    """The layer, with the tiles of what `resize` makes of it; so have the layers tied to it."""
    _refuse_special_tiles(layer)
    trains, ties = layer.weight.requires_grad, layer.tied_layers()
    dense = layer.to_dense()
    dense.weight.grad = None  # of the old shape
    dense = resize(dense)
    for parameter in dense.parameters():
        parameter.requires_grad_(trains)
    weight = dense._parameters["weight"]
    assert weight is not None
    grid = _like(layer.grid, weight.shape)
    with replacing(model, "resize_token_embeddings"):
        _take(layer, _cut(type(layer), dense, grid, home=_home_of(layer)))
        for tied in ties:
            stand_in = tied.to_dense(weight)
            if (getattr(stand_in, "padding_idx", None) or 0) >= grid.out_features:
                stand_in.padding_idx = None  # type: ignore[assignment]  # as transformers does
            _take(tied, _cut(type(tied), stand_in, grid, tied_to=layer))
    return layer


def _refuse_special_tiles(layer: TiledModule) -> None:
    """CannotTileError where the layer cannot be made dense and cut again."""
    reason = cannot_be_dense(layer)
    if any(map(is_shard, layer.parameters())):
        reason = "an engine has sharded it over ranks; resize the model before it gets the model"
    if reason:
        raise CannotTileError(f"{layer.full_name()} cannot be resized: {reason}")


def _like(old: Grid, shape: tuple[int, ...]) -> Grid:
    """The grid of another shape whose tiles are no longer and no wider than the old ones."""
    rows, columns = old.rect(0, 0).shape  # the largest
    return Grid.uniform(shape[0], shape[1], -(-shape[0] // rows), -(-shape[1] // columns))


def _home_of(layer: TiledModule) -> Home | None:
    """Where new tiles of the layer are parked; None: in memory."""
    home: Home | None = getattr(layer.tile(0, 0), "home", None)
    if home is None or not home.is_read_only:
        return home
    warnings.warn(
        f"{layer.full_name()} was in the files of a checkpoint, which are only read: resized, it "
        'is in memory; to park it, tile the model with home="disk" before it is resized',
        ParkedCopyWarning,
        stacklevel=2,
    )
    return None


def _cut(
    cls: type[TiledModule],
    dense: nn.Module,
    grid: Grid,
    tied_to: TiledModule | None = None,
    home: Home | None = None,
) -> TiledModule:
    """The dense module in tiles; a bias is kept whole, for others may share it.

    A bias that is too short gets zeros, as in transformers' `tie_weights`.
    """
    bias = dense._parameters.get("bias")
    if bias is not None:
        dense._parameters["bias"] = None
        missing = grid.out_features - len(bias)
        if missing:
            bias.data, bias.grad = nn.functional.pad(bias.data, (0, missing)), None
    new = cls.from_dense(dense, grid, tied_to, home)
    if bias is not None:
        assert isinstance(new, TiledLinear)  # nothing else has a bias
        new.keep_bias(bias)
    return new


def _take(layer: TiledModule, new: TiledModule) -> None:
    """Make the layer what the new one is; its name, mode and hooks stay."""
    for name, value in vars(new).items():
        if name not in _KEPT and "_hook" not in name:
            layer.__dict__[name] = value
    layer.train(layer.training)
    for module in layer.modules():
        setattr(module, _MARK, True)
    for name, parameter in layer.named_parameters():
        allocation = allocation_of(parameter)
        if allocation is not None:
            allocation.label = f"{layer.full_name()}.{name}"


def _tie_weights(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Tie what is in tiles, and leave the rest to transformers.

    transformers would look for dense names among the parameters, and pad a tied head's bias.
    """
    ties = [*_ties_of(model).items()]
    for target, source in ties:
        if not _is_tied(model, target, source):
            _tie(model, target, source)
    if not ties or not all(_is_tied(model, *names) for names in ties):
        original(model, *args, **kwargs)


def _ties_of(model: Any) -> dict[str, str]:
    """Source by target of the weights that the config ties now, or else did."""
    expand = getattr(model, "get_expanded_tied_weights_keys", None)  # newer than tie_weights
    found: dict[str, str] = {} if expand is None else expand(all_submodels=True)
    return found or getattr(model, "all_tied_weights_keys", None) or {}


def _expanded_ties(original: Callable[..., Any], model: Any, all_submodels: bool = False) -> Any:
    """transformers' method, which looks for dense names among the model's parameters."""
    if all_submodels:  # it asks each of them
        return original(model, all_submodels=True)
    names = [*_dense_names(model)]
    model.named_parameters = lambda **options: ((name, None) for name in names)
    try:
        return original(model, all_submodels=False)
    finally:
        del model.named_parameters


def _dense_names(model: nn.Module) -> Iterator[str]:
    inside: tuple[str, ...] = ()
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, TiledModule):
            inside = (*inside, f"{name}.")
            yield from (
                layer.dense_name(name, own) for own in DENSE_NAMES if layer.tile_parameters(own)
            )
    for name, _ in model.named_parameters(remove_duplicate=False):
        if not name.startswith(inside):
            yield name


def _is_tied(model: nn.Module, *names: str) -> bool:
    try:
        found: list[Any] = [model.get_parameter(name) for name in names]  # or handles
    except AttributeError:
        return False
    if all(isinstance(each, DenseHandle) for each in found):
        return bool(found[0].stands_for_same(found[1]))
    return found[0] is found[1]


def _tie(model: nn.Module, target: str, source: str) -> None:
    """Tie two parameters of which at least one is in tiles; else do nothing."""
    try:
        (layer, own), (other, _) = _owner(model, target), _owner(model, source)
        given = other._parameters.get(own) if not isinstance(other, TiledModule) else None
    except AttributeError:
        return
    if not isinstance(layer, TiledModule) and not isinstance(other, TiledModule):
        return
    with replacing(model, "tie_weights"):
        if own == "bias":
            _share_bias(layer, other)
        elif isinstance(layer, TiledModule) and isinstance(other, TiledModule):
            unread = nn.Parameter(torch.empty(0, device="meta"))
            stand_in = layer.to_dense(unread)
            _take(layer, _cut(type(layer), stand_in, other.grid, tied_to=other))
        elif isinstance(layer, TiledModule):
            replace_module(model, layer, layer.to_dense(given))
        elif isinstance(other, TiledModule):
            kind = kind_of(layer)
            if kind is None or not kind.matches(layer):
                raise CannotTileError(
                    f"{target} is to be tied to {source}, which is in tiles, and "
                    f"{type(layer).__name__} has no tiled form; call memtile.untile(model) first"
                )
            tiled = _cut(kind.tiled, layer, other.grid, tied_to=other)
            tiled.name_in_model = target.rpartition(".")[0]
            replace_module(model, layer, tiled)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, own = name.rpartition(".")
    return model.get_submodule(path), own


def _share_bias(layer: nn.Module, other: nn.Module) -> None:
    """Give the layer the other's bias itself."""
    bias = _whole_bias(other) if isinstance(other, TiledLinear) else other._parameters["bias"]
    if isinstance(layer, TiledLinear):
        _keep_whole(layer, bias)
    else:
        layer.bias = bias  # type: ignore[assignment]  # a parameter


def _whole_bias(layer: TiledLinear) -> nn.Parameter | None:
    """The layer's bias, which it keeps whole from now on."""
    bias = layer.dense_parameter("bias") if layer.whole_bias is None else layer.whole_bias
    if bias is not layer.whole_bias:
        _keep_whole(layer, bias)
    return bias


def _keep_whole(layer: TiledLinear, bias: nn.Parameter | None) -> None:
    assert bias is not None
    for _, tile in layer.tiles():
        tile.bias = None  # type: ignore[assignment]  # as torch's own linears without one
    layer.keep_bias(bias)


def _initialize_weights(original: Callable[..., Any], model: nn.Module) -> Any:
    """Draw new values of the layers, and not of each tile by itself."""
    for _, layer in tiled_layers(model):
        for module in layer.modules():
            if module is not layer:
                setattr(module, _MARK, True)
    return original(model)


@torch.no_grad()
def _initialize_layer(
    original: Callable[..., Any], model: nn.Module, layer: TiledModule, *args: Any
) -> None:
    """Draw a layer's values by the model's rule for the dense module, and copy them to the tiles.

    One layer is in memory whole meanwhile. A stack of experts is drawn as its owner's parameter.
    """
    if isinstance(layer, TiledStack):
        setattr(layer, _MARK, getattr(layer.weight, _MARK))  # as of the parameter
        return
    if getattr(layer, _MARK, False):
        return
    dense = layer.to_dense()
    original(model, dense, *args)
    for name, parameter in dense.named_parameters():
        getattr(layer, name).data = parameter.data
    setattr(layer, _MARK, True)
