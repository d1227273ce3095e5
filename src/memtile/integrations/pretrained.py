"""What transformers' `from_pretrained` does besides reading values, by transformers' own rules."""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memtile.checkpoints import Checkpoint
from memtile.convert import WAY_OUT, persistent_buffers
from memtile.errors import CheckpointError


_QUANTIZED = ("quantization_config", "compression_config")


def pretrained_models(model: nn.Module) -> list[Any]:
    """The `PreTrainedModel`s of a model, those in others too, outer ones first."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return [m for m in model.modules() if modeling and isinstance(m, modeling.PreTrainedModel)]


def outermost(model: nn.Module) -> Iterator[Any]:
    """The `PreTrainedModel`s of a model that are in no other."""
    inner: set[int] = set()
    for found in pretrained_models(model):
        if id(found) not in inner:
            inner.update(map(id, found.modules()))
            yield found


def refuse_quantized(config: Mapping[str, Any], where: object) -> None:
    """Refuse the config of quantized weights, whose scales nothing here applies.

    Args:
        config: what a `config.json` holds.
        where: it was found.

    Raises:
        CheckpointError: it is one.
    """
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    for found in (part[key] for part in parts for key in _QUANTIZED if part.get(key)):
        method = found.get("quant_method") if isinstance(found, Mapping) else None
        raise CheckpointError(
            f"{where} is of weights quantized by {method or 'a method without a name'} "
            f"(quantization_config in config.json), and memtile applies no scales: {WAY_OUT}"
        )


def check_files(path: Path) -> None:
    """Refuse a folder, or a file in one, whose config says that its weights are quantized.

    Raises:
        CheckpointError: it does.
    """
    folder = path if path.is_dir() else path.parent
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return  # no folder of transformers, or one that is refused where its config is needed
    if isinstance(config, dict):
        refuse_quantized(config, path)


def dtype_of(config: Any, folder: Path | None) -> torch.dtype:  # config: a PretrainedConfig
    """The dtype that a model is made in: its config's; without one, its files'; or float32."""
    named = getattr(config, "dtype", None)
    if isinstance(named, str):
        named = getattr(torch, named, None)
    if named is None and folder is not None:
        try:
            dtypes = (tensor.dtype for tensor in Checkpoint.open(folder).values())
            named = next((dtype for dtype in dtypes if dtype.is_floating_point), None)
        except CheckpointError:  # there is a config alone; loading says what is wrong
            pass
    return named or torch.float32


def keep_in_float32(model: nn.Module) -> None:
    """Make float32 what transformers keeps so in a model of 16 bits, T5's `wo` say.

    Args:
        model: its parameters without values.
    """
    for found in outermost(model):
        dtype = found.config.dtype
        plan = found._get_dtype_plan(dtype) if isinstance(dtype, torch.dtype) else {}
        patterns = {re.compile(glob.replace("*", ".*")): kept for glob, kept in plan.items()}
        tensors: list[tuple[str, Tensor]] = [
            *found.named_parameters(remove_duplicate=False),
            *persistent_buffers(found),
        ]
        for name, tensor in tensors:
            kept = next((to for pattern, to in patterns.items() if pattern.search(name)), dtype)
            if tensor.dtype == dtype != kept:
                tensor.data = tensor.data.to(kept)
