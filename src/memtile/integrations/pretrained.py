"""What transformers' `from_pretrained` does besides reading values: names, dtypes, new weights."""

import copy
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from memtile.checkpoints import Checkpoint
from memtile.convert import WAY_OUT, empty_model, persistent_buffers
from memtile.errors import CheckpointError
from memtile.integrations.saving import loaded_class

WRITERS = ("AutoModelForSeq2SeqLM", "AutoModelForCausalLM", "AutoModelForImageTextToText")
_MARK = "_is_hf_initialized"  # transformers' own: a marked tensor is not initialised again
_QUANTIZED = ("quantization_config", "compression_config")


def pretrained_models(model: nn.Module) -> list[Any]:
    """All `PreTrainedModel`s in a model, outer ones first."""
    cls = loaded_class("transformers.modeling_utils", "PreTrainedModel")
    return [module for module in model.modules() if isinstance(module, cls)]


def heads_of(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that give the logits of `PreTrainedModel`s in a model, PEFT's copies included."""
    for found in pretrained_models(model):
        head = found.get_output_embeddings()
        copies = getattr(head, "modules_to_save", None)  # of PEFT, which trains them
        yield from copies.values() if isinstance(copies, nn.ModuleDict) else filter(None, [head])


def outermost(model: nn.Module) -> Iterator[Any]:
    """The `PreTrainedModel`s in a model that are in no other one."""
    inner: set[int] = set()
    for found in pretrained_models(model):
        if id(found) not in inner:
            inner.update(map(id, found.modules()))
            yield found


def architecture(config: Any) -> Any:  # a config's; the class, which is not imported here
    """The model class that a config names; None where transformers lacks it."""
    import transformers

    names = getattr(config, "architectures", None) or [""]
    named = getattr(transformers, str(names[0]), None)
    # What `AutoModel.from_config` calls has no public name.
    return named if hasattr(named, "_from_config") else None


def auto_class(config: Any, names: Sequence[str] = WRITERS) -> Any:  # both are transformers'
    """The first of these classes, such as AutoModelForCausalLM, that knows a config, or None."""
    import transformers

    mappings = (
        transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )
    known = dict(zip(WRITERS, mappings, strict=True))
    if not config.is_encoder_decoder:  # BART's decoder alone has the same config
        names = [name for name in names if name != WRITERS[0]]
    found = next((name for name in names if type(config) in known[name]), None)
    return None if found is None else getattr(transformers, found)


def code_of(folder: Path) -> str:
    """The classes that a folder's `auto_map`s name, and the files that they are in; "" for none."""
    classes: dict[str, list[str]] = {}  # by file, which may be in another repository
    for name in ("config.json", "tokenizer_config.json"):
        try:
            named: Any = json.loads((folder / name).read_bytes()).get("auto_map")  # JSON
        except (OSError, ValueError, AttributeError):
            continue
        for value in named.values() if isinstance(named, dict) else (named,):
            for one in value if isinstance(value, list) else [value]:
                place, _, own = one.rpartition(".") if isinstance(one, str) else ("", "", "")
                if place and own not in classes.setdefault(f"{place}.py", []):
                    classes[f"{place}.py"].append(own)
    return ", ".join(f"{' and '.join(own)} of {file}" for file, own in classes.items())


def relevant(model: Any, missing: set[str], unexpected: set[str]) -> tuple[set[str], set[str]]:
    """The missing and the unexpected names without those that the model's class ignores."""
    info = SimpleNamespace(missing_keys=set(missing), unexpected_keys=set(unexpected))
    model._adjust_missing_and_unexpected_keys(info)
    return info.missing_keys, info.unexpected_keys


def new_names(model: Any, missing: set[str]) -> set[str]:  # of a PreTrainedModel
    """Those missing names that the checkpoint's own model class lacks, such as a new head's.

    What that class has was lost from the checkpoint. Where the config names no class, all names
    outside the base model are new.
    """
    named, prefix = architecture(model.config), f"{model.base_model_prefix}."
    if not missing or named is type(model):
        return set()
    if named is None or not isinstance(model.config, named.config_class):
        is_base = model.base_model is model
        return {name for name in missing if not is_base and not name.startswith(prefix)}
    config = copy.deepcopy(model.config)
    theirs = empty_model(lambda: named._from_config(config)).state_dict()
    known = {name.removeprefix(prefix) for name in theirs}
    return {name for name in missing if name.removeprefix(prefix) not in known}


def initialise(model: nn.Module, names: Collection[str]) -> None:
    """Draw these parameters of the model by the rules of their `PreTrainedModel`, and no others."""
    made = {id(model.get_parameter(name)) for name in names}
    for found in outermost(model) if made else ():
        others = [t for t in (*found.parameters(), *found.buffers()) if id(t) not in made]
        marked = [t for t in others if not hasattr(t, _MARK)]
        for tensor in marked:
            setattr(tensor, _MARK, True)
        for name, parameter in found.named_parameters(remove_duplicate=False):
            while name and id(parameter) in made:  # any module around it may have the rule
                name = name.rpartition(".")[0]
                setattr(found.get_submodule(name), _MARK, False)
        found.initialize_weights()
        for tensor in marked:
            delattr(tensor, _MARK)


def refuse_quantized(config: Mapping[str, Any], where: object) -> None:
    """Raise CheckpointError for the content of a `config.json` of quantized weights."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    for found in (part[key] for part in parts for key in _QUANTIZED if part.get(key)):
        method = found.get("quant_method") if isinstance(found, Mapping) else None
        raise CheckpointError(
            f"{where} is of weights quantized by {method or 'a method without a name'} "
            f"(quantization_config in config.json), and memtile applies no scales: {WAY_OUT}"
        )


def check_files(path: Path) -> None:
    """Raise CheckpointError where a folder, or a file's folder, has the config of such weights."""
    folder = path if path.is_dir() else path.parent
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return  # not transformers', or an error where the config is needed
    if isinstance(config, dict):
        refuse_quantized(config, path)


def dtype_of(config: Any, folder: Path | None) -> torch.dtype:  # config: a PretrainedConfig
    """The dtype of a new model: its config's, else that of its files, else float32."""
    named = getattr(config, "dtype", None)
    if isinstance(named, str):
        named = getattr(torch, named, None)
    if named is None and folder is not None:
        with suppress(CheckpointError):  # no weights, or an error that loading reports
            dtypes = (tensor.dtype for tensor in Checkpoint.open(folder).values())
            named = next((dtype for dtype in dtypes if dtype.is_floating_point), None)
    return named or torch.float32


def keep_in_float32(model: nn.Module) -> None:
    """Make float32, in a model without values, what transformers keeps so, such as T5's `wo`."""
    for found in outermost(model):
        dtype = found.config.dtype
        plan = found._get_dtype_plan(dtype) if isinstance(dtype, torch.dtype) else {}
        patterns = {re.compile(glob.replace("*", ".*")): kept for glob, kept in plan.items()}
        parameters = found.named_parameters(remove_duplicate=False)
        for name, tensor in (*parameters, *persistent_buffers(found)):
            kept = next((to for pattern, to in patterns.items() if pattern.search(name)), dtype)
            if tensor.dtype == dtype != kept:
                tensor.data = tensor.data.to(kept)
