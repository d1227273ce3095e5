"""`load_checkpoint`: a model's values from safetensors, streamed into wherever its tiles live."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from memtile.checkpoints import Checkpoint, Paths
from memtile.convert.kinds import naming_of
from memtile.convert.materializing import fill, to_make, values_made
from memtile.convert.name_matching import checked, meta_tensors_of
from memtile.convert.replaced import replacing
from memtile.convert.sharded import for_sharded
from memtile.errors import ArgumentError, CheckpointError


@dataclass(frozen=True)
class IncompatibleKeys:
    """What a checkpoint and a model did not have in common.

    Args:
        missing: dense names of the model that kept their values, or, where they had none, were
            given some by the model's own initialisation.
        unexpected: names of the checkpoint that were not read.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def load_checkpoint(
    model: nn.Module,
    path: Paths,
    *,
    strict: bool = True,
    device: torch.device | str | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> IncompatibleKeys:
    """Read a checkpoint into a model, a few MiB at a time.

    Every form is read: dense names, tile names of any grid (as the original tiled linear and
    `model.state_dict()` have them), sharded or in one file, in any floating-point dtype, which is
    converted to the model's; any name of a tied tensor; names with or without the prefix of a
    transformers model's base. Names that transformers ignores for the model's class are ignored.
    Pickles are never loaded. A `PeftModel` is given its base's checkpoint or its adapters' or both.

    A model that FSDP2 or ZeRO-3 has sharded is loaded by all ranks together; each calls this and
    reads its own shards. The checkpoint must have all of it, whether strict or not: values that it
    lacks are not made over ranks. For ZeRO-3 without values see
    `memtile.engines.deepspeed_zero3.from_checkpoint`.

    Args:
        model: tiled or not, wherever its tiles live, sharded or not. Parameters on the meta device
            get memory.
        path: a folder, a `.safetensors` file or a `.safetensors.index.json`; or several of them.
        strict: raise on missing or unexpected names; False: return them.
        device: of a sharded model's shards that are on the meta device; None: that of their mesh.
            With an offload policy, "cpu".
        process_group: of a sharded model; None: all ranks.

    Returns:
        What was missing and what was not expected: nothing where it is strict.

    Raises:
        ArgumentError: the model or the path is none, or a device or a process group is given for a
            model that is not sharded.
        CannotTileError: a tile computes its weight.
        CheckpointError: there is no checkpoint, it is damaged, quantized, or not of this model; or
            something would stay without values. The model is unchanged: names, shapes and known
            checksums are verified before anything is written. Only a file that cannot be read
            half-way, or changes meanwhile, leaves a model partly loaded: then load it again.
        HomeIOError: a home could not be written to; likewise.
        EngineError: a rank is gone. Whatever is raised is raised on every rank.

    Examples:
        >>> memtile.save_checkpoint(model, "out")
        >>> keys = memtile.load_checkpoint(model, "out")
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"the model is a {type(model).__name__}; it must be an nn.Module")
    sharded = for_sharded(model, device=device, process_group=process_group)
    if sharded is not None:
        loaded: IncompatibleKeys = sharded.load_checkpoint(
            model, path, device=device, strict=strict, process_group=process_group
        )
        return loaded
    findings = checked(model, Checkpoint.of(path), strict=strict, complete=False)
    made = to_make(model, findings)
    with replacing(model, "memtile.load_checkpoint"), values_made(model, made):
        fill(model, findings)
    return IncompatibleKeys((*findings.missing, *findings.made), tuple(findings.unexpected))


@torch.no_grad()
def in_own_names(model: nn.Module, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state dict with the names and layouts of files, such as lists of experts, in the model's.

    It is given back as it is where at most a base's prefix differs. What is converted, a tensor at
    a time, is in memory beside it.

    Raises:
        CheckpointError: something cannot be converted.
    """
    tensors = {key: _InMemory(v) for key, v in state_dict.items() if isinstance(v, Tensor)}
    found = naming_of(model).renamed(tensors, meta_tensors_of(model))
    moved = {name: found.keys[name] for name in found.sources if found.keys[name] != [name]}
    if all(len(keys) == 1 and _differ_in_prefix(name, *keys) for name, keys in moved.items()):
        return state_dict
    if found.problems:
        raise CheckpointError(f"the state dict cannot be loaded: {'; '.join(found.problems)}")
    read = {key for keys in moved.values() for key in keys}
    kept = {key: value for key, value in state_dict.items() if key not in read}
    made = {}
    for name in moved:
        source = found.sources[name]
        made[name] = source.elements(0, source.shape.numel()).view(source.shape)
    return kept | made


def _differ_in_prefix(name: str, key: str) -> bool:
    return name.endswith(f".{key}") or key.endswith(f".{name}")


class _InMemory:
    """A tensor as a source of values."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.shape, self.dtype = tensor, tensor.shape, tensor.dtype

    def elements(self, start: int, stop: int) -> Tensor:
        """Elements of the flattened tensor."""
        return self.tensor.reshape(-1)[start:stop]

    def rows(self, start: int, stop: int) -> Tensor:
        """Whole rows."""
        return self.tensor[start:stop]
