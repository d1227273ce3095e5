"""PEFT: the frozen base linears are tiled; adapters stay dense and are saved as they are."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from memtile.convert import (
    Integration,
    Naming,
    dense_items,
    naming_of,
    persistent_buffers,
    tiled_layers,
)
from memtile.integrations.saving import loaded_class, with_tiles
from memtile.layers import (
    LowRank,
    class_of,
    has_hooks,
    has_only_hooks_of_engines,
    is_gathered_when_called,
    is_plain,
)

_MERGING = "_unload_and_optionally_merge"
_ADAPTER = "it is part of a PEFT adapter, small and trained"
_COPY = "it is PEFT's own copy, trained and saved with the adapter under its dense names"
_STACK = "PEFT adapts it, and reads it from the parameter itself"
_ROWS = "PEFT trains some of its rows, and reads them from the embedding itself"


def _keeps(model: nn.Module) -> dict[str, str]:
    return {
        f"{name}.{child}" if name else child: reason
        for name, module in model.named_modules()
        for child, reason in _kept_children(module)
    }


def _kept_children(module: nn.Module) -> Iterator[tuple[str, str]]:
    """The children, and stacks of experts below it, that stay dense, each with the reason."""
    if isinstance(
        module, loaded_class("peft.tuners.trainable_tokens.layer", "TrainableTokensLayer")
    ):
        yield "base_layer", _ROWS
    if isinstance(module, loaded_class("peft.tuners.lora.layer", "ParamWrapper")):
        wrapped, path = module, ""
        while hasattr(wrapped, "base_layer"):  # wrappers of several parameters are nested
            wrapped, path = wrapped.base_layer, f"{path}base_layer."
        yield f"{path}{module.parameter_name}", _STACK
    if isinstance(module, loaded_class("peft.tuners.tuners_utils", "BaseTunerLayer")):
        yield from ((name, _ADAPTER) for name, _ in module.named_children() if name != "base_layer")
    if isinstance(module, loaded_class("peft.utils.other", "ModulesToSaveWrapper")):
        yield "modules_to_save", _COPY


def low_rank(module: nn.Module) -> LowRank | None:
    """The base and the one active adapter of a LoRA linear; None for all other forms."""
    if class_of(module) is not loaded_class("peft.tuners.lora.layer", "Linear"):
        return None
    lora: Any = module  # which is not imported here
    active = [name for name in lora.active_adapters if name in lora.lora_A]
    if lora.disable_adapters or lora.merged or len(active) != 1 or active[0] in lora.lora_variant:
        return None
    (name,) = active
    a, b = lora.lora_A[name], lora.lora_B[name]
    plain = all(
        (is_plain(each) or is_gathered_when_called(each)) and each.bias is None for each in (a, b)
    )
    if not plain or lora.fan_in_fan_out or not has_only_hooks_of_engines(module):
        return None
    if has_hooks(module) and not all(map(has_hooks, (a, b))):
        return None  # an engine gathers them with the whole
    return LowRank(lora.base_layer, a, b, lora.scaling[name], lora.lora_dropout[name])


def patch_peft() -> None:
    """Have PEFT models with tiles in their base save dense names, and merge adapters into tiles."""
    cls = loaded_class("peft.peft_model", "PeftModel")
    if cls != ():
        with_tiles(cls, "save_pretrained", _save_pretrained)
    tuner = loaded_class("peft.tuners.tuners_utils", "BaseTuner")
    if hasattr(tuner, _MERGING):
        with_tiles(tuner, _MERGING, _merge)


def _merge(original: Callable[..., Any], tuner: Any, *args: Any, **kwargs: Any) -> Any:
    """Merge and unload, without PEFT's look at the addresses of tied weights: tiles stay tied."""
    config = getattr(tuner.model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return original(tuner, *args, **kwargs)
    assert config is not None
    config.tie_word_embeddings = False
    try:
        return original(tuner, *args, **kwargs)
    finally:
        config.tie_word_embeddings = True


def _save_pretrained(
    original: Callable[..., Any], model: Any, save_directory: str, *args: Any, **kwargs: Any
) -> Any:
    """Write the folder; no weight of the base comes into memory that is not written.

    Beside adapters PEFT may save biases of the base (`bias="all"`, `"lora_only"`), and embeddings
    where `save_embedding_layers=True`. CannotTileError where such a tile computes its weight.
    """
    given = kwargs.pop("state_dict", None)
    tiles = model.state_dict() if given is None else given
    unsaved = _names_of_weights(model, kwargs.get("save_embedding_layers") is True)
    dense = dict(dense_items(model, {k: v for k, v in tiles.items() if k not in unsaved}))
    return original(model, save_directory, *args, state_dict=dense, **kwargs)


def _names_of_weights(model: Any, saves_embeddings: bool) -> set[str]:
    """Names of those weight tiles that PEFT does not save."""
    base = model.get_base_model()
    ends = (base.get_input_embeddings(), base.get_output_embeddings()) if saves_embeddings else ()
    return {
        f"{name}.{layer.tile_path(*index)}.weight"
        for name, layer in tiled_layers(model, all_names=True)
        if not any(layer is end for end in ends)
        for index in layer.tile_parameters("weight")
    }


def _naming(model: nn.Module) -> Naming | None:
    """Names in checkpoints: the base's own, and PEFT's for adapters."""
    if not isinstance(model, loaded_class("peft.peft_model", "PeftModel")):
        return None
    wrapped: Any = model  # a PeftModel, which is not imported here
    base = naming_of(wrapped.get_base_model())
    pattern = re.compile(rf"\.({'|'.join(sorted(_adapter_children(model)))})\.")
    adapters = _names_of_adapters(wrapped, pattern)
    return replace(
        base,
        written=Naming().written,
        stored=lambda name: adapters.get(name) or _name_in_base(name),
        apart=lambda name: pattern.search(name) is not None,
    )


def _name_in_base(name: str) -> str:
    name = name.removeprefix("base_model.model.").replace(".original_module.", ".")
    return name.replace(".base_layer.", ".")


def _names_of_adapters(model: Any, pattern: re.Pattern[str]) -> dict[str, str]:
    """PEFT's names of the active adapter's saved tensors, by their names in the model."""
    tensors = [*model.named_parameters(remove_duplicate=False), *persistent_buffers(model)]
    state = {name: tensor for name, tensor in tensors if pattern.search(name)}
    if not state:
        return {}
    saved = loaded_class("peft.utils.save_and_load", "get_peft_model_state_dict")(
        model, state, model.active_adapter, save_embedding_layers=False
    )
    stored = {id(tensor): name for name, tensor in saved.items()}
    return {name: stored[id(t)] for name, t in state.items() if id(t) in stored}


def _adapter_children(model: nn.Module) -> set[str]:
    """Names of the modules that adapters are made of."""
    kept = (child for module in model.modules() for child, _ in _kept_children(module))
    return {child for child in kept if child != "base_layer"}


def _filled(model: nn.Module) -> None:
    """Fill PEFT's copies of whole modules with the values of the originals."""
    for module in model.modules():
        if isinstance(module, loaded_class("peft.utils.other", "ModulesToSaveWrapper")):
            for copied in module.modules_to_save.values():
                _take_values(copied, module.original_module)


def _take_values(copied: nn.Module, original: Any) -> None:
    for name, parameter in list(copied.named_parameters()):
        path, _, own = name.rpartition(".")
        source = getattr(original.get_submodule(path), own)
        if parameter.is_meta and not source.is_meta:
            values = nn.Parameter(source.detach().clone(), parameter.requires_grad)
            copied.get_submodule(path)._parameters[own] = values


PEFT = Integration("peft", keeps=_keeps, naming=_naming, filled=_filled)
