"""`load_checkpoint`: a model's values from safetensors, streamed into wherever its tiles live."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from memtile.checkpoints import Checkpoint, Paths
from memtile.convert.materializing import fill, to_make, values_made
from memtile.convert.name_matching import checked
from memtile.convert.replaced import replacing
from memtile.convert.sharded import for_sharded
from memtile.errors import ArgumentError


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
        ArgumentError: the model is none, or a device or a process group is given for a model that
            is not sharded.
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
