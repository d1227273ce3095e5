"""`config.json` and `generation_config.json` of a saved transformers model.

The files of the folder that the model was made from are copied, and changed only where the model
differs. If transformers wrote them, keys would move, and older readers would take defaults: 10000
for a `rope_theta` that is in `rope_parameters`.
"""

import copy
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from memtile.convert.kinds import Beside
from memtile.integrations.pretrained import pretrained_models

_CONFIG, _GENERATION = "config.json", "generation_config.json"
_OF_WRITERS: Final = ("_name_or_path", "_commit_hash", "_from_model_config", "transformers_version")
_DTYPES: Final = ("dtype", "torch_dtype")  # the second is what older readers know

Json = dict[str, Any]


def configs_of(model: Any, dtype: torch.dtype | None) -> Beside:
    """The config files beside a `PreTrainedModel`'s weights, for its own dtype or `dtype`."""
    if model not in pretrained_models(model):
        return {}
    config = copy.deepcopy(model.config)  # the model's own stays as it is
    config.dtype = str(dtype or model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    if _was_unpacked(model):
        del config.quantization_config
    source = model.config._name_or_path
    found: Beside = {_CONFIG: _config(config, source, _CONFIG)}
    if model.can_generate():
        found[_GENERATION] = _config(model.generation_config, source, _GENERATION)
    return found


def made_from(model: nn.Module, folder: Path) -> None:
    """Note the folder of a model's values in its config, where the config has none."""
    for found in pretrained_models(model)[:1]:
        if not found.config._name_or_path and (folder / _CONFIG).is_file():
            found.config._name_or_path = str(folder)


def _was_unpacked(model: Any) -> bool:  # a PreTrainedModel
    """Whether the config says that weights are packed as GGUF although they are dense."""
    found = getattr(model.config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else found and found.quant_method
    return method == "gguf" and all(weight.is_floating_point() for weight in model.parameters())


def _config(ours: Any, source: str, name: str) -> bytes:  # a config of transformers
    """One config file: the source's with what differs, or a new one."""
    try:
        raw = (Path(source) / name).read_bytes()
        file: Json = json.loads(raw)
        before = _plain(type(ours).from_pretrained(source, local_files_only=True))
        is_its_kind = file.get("model_type") == before.get("model_type")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        is_its_kind = False
    if not source or not is_its_kind:
        return _written(ours, name)
    after = _plain(ours)
    if not any(word in file for word in _DTYPES) and after.get("dtype") == "float32":
        before["dtype"] = "float32"  # the default of all readers
    changed = _changed(file, before, after)
    if changed == file:
        return raw
    return (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()


def _plain(config: Any) -> Json:
    found: Json = json.loads(config.to_json_string(use_diff=False))
    return found


def _changed(file: Json, before: Mapping[str, Any], after: Mapping[str, Any]) -> Json:
    """The file's content, changed where the configs `before` and `after` differ."""
    changed = dict(file)
    for name in [*after, *(name for name in before if name not in after)]:
        old, new = before.get(name), after.get(name)
        word = "torch_dtype" if name == "dtype" and "dtype" not in file else name
        is_left_out = name == "architectures" and name not in file
        if old == new or is_left_out or name in _OF_WRITERS:
            continue
        if isinstance(old, dict) and isinstance(new, dict) and isinstance(file.get(word), dict):
            changed[word] = _changed(file[word], old, new)
        elif name in after:
            changed[word] = new
        else:
            changed.pop(word, None)
    return changed


def _written(ours: Any, name: str) -> bytes:
    """The file that the config's `save_pretrained` writes."""
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        return (Path(folder) / name).read_bytes()
