"""Finds values of a ZeRO-3 config that defeat the tiling: most keep tiles gathered."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
from torch import nn

from memtile.engines.zero3_config import (
    LEAVES,
    SWAPPED_BYTES,
    Sizes,
    leaves_of,
    part_of,
    ranks_of_launcher,
    sizes_of,
)
from memtile.errors import ArgumentError

Given: TypeAlias = Mapping[str, Any]  # whatever JSON can hold

_DEFAULTS: Final[Mapping[str, float]] = {  # of DeepSpeed 0.19
    "stage": 0,
    "stage3_prefetch_bucket_size": 5e7,
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_param_persistence_threshold": 1e5,
    "reduce_bucket_size": 5e8,
    "buffer_size": 1e8,
    "max_in_cpu": 1e9,
    "sub_group_size": 1e9,
}


@dataclass(frozen=True)
class Finding:
    """A value that defeats the tiling."""

    key: str  # its path in the config, with dots
    value: object  # given, or DeepSpeed's default
    is_default: bool
    reason: str  # what it does to tiles
    instead: object  # a value that does not

    def __str__(self) -> str:
        source = " (DeepSpeed's default)" if self.is_default else ""
        return f"{self.key} is {self.value}{source}: {self.reason}; {self.instead} would do"


def check(
    config: Given | str | os.PathLike[str],
    model: nn.Module,
    *,
    prefetch: int = 1,
    world_size: int | None = None,
) -> list[Finding]:
    """Values of your own DeepSpeed config that defeat the tiling; none for what `config` gives.

    Args:
        config: as a dictionary, or the file that holds it.
        model: tiled; on the meta device, partitioned, or ordinary.
        prefetch: tiles that may be gathered ahead.
        world_size: ranks; None: those of the process group or of the launcher, or one.

    Raises:
        ArgumentError: nothing is tiled, or the file holds no config.
    """
    given = config if isinstance(config, Mapping) else _read(Path(config))
    sizes = sizes_of(model)
    zero = _Section("zero_optimization", given.get("zero_optimization", {}))
    ranks = world_size or ranks_of_launcher()
    found = [
        *_of_gathering(zero, sizes, prefetch),
        *_of_sizes(zero, sizes),
        *_of_leaves(zero, model),
        *_of_disk(zero, sizes, ranks, _itemsize(given, model)),
    ]
    if "gradient_clipping" not in given:
        reason = "gradients are clipped although nobody asked for it"
        instead = "0.0, or the norm that is meant,"
        found.append(Finding("gradient_clipping", 1.0, True, reason, instead))
    return found


@dataclass(frozen=True)
class _Section:
    """A part of a config, and its path in it."""

    path: str
    given: Given

    def value(self, key: str) -> float:
        """The value in force: the given number, or DeepSpeed's default."""
        value = self.given.get(key)
        return value if isinstance(value, int | float) else _DEFAULTS.get(key, 0)

    def exceeds(self, key: str, most: int) -> bool:
        """Whether a value is larger, or accelerate fills it in from the width of the model."""
        return self.given.get(key) == "auto" or self.value(key) > most

    def finding(self, key: str, reason: str, instead: object) -> Finding:
        """A finding about a key of this section."""
        given = self.given.get(key)
        if given == "auto":
            reason = f"accelerate fills that in from the width of the model, and then {reason}"
        in_force = given if key in self.given else _DEFAULTS.get(key)
        shown = int(in_force) if isinstance(in_force, float) else in_force
        return Finding(f"{self.path}.{key}", shown, key not in self.given, reason, instead)


def _of_gathering(zero: _Section, sizes: Sizes, prefetch: int) -> Iterator[Finding]:
    if zero.value("stage") != 3:
        yield zero.finding("stage", "only stage 3 partitions parameters", 3)
    if zero.value("stage3_max_reuse_distance") > 2 * sizes.smallest:
        reason = "a tile that is used again within so many elements, in backward say, is kept"
        yield zero.finding("stage3_max_reuse_distance", reason, 0)
    threshold = min(int(zero.value("stage3_param_persistence_threshold")), sizes.smallest - 1)
    live = sizes.live(prefetch, threshold)
    most = max(
        (prefetch + 1) * sizes.smallest,
        prefetch * sizes.largest + 1 + sizes.persistent(threshold),
    )
    if zero.value("stage3_max_live_parameters") > most:
        reason = f"tiles of {sizes.largest} elements are gathered ahead until so many are live"
        yield zero.finding("stage3_max_live_parameters", reason, live)
    key = "stage3_prefetch_bucket_size"
    if zero.exceeds(key, sizes.smallest):
        yield zero.finding(key, "so many elements of tiles are gathered ahead at once", 1)


def _of_sizes(zero: _Section, sizes: Sizes) -> Iterator[Finding]:
    key, instead = "stage3_param_persistence_threshold", sizes.persistent_up_to
    if zero.exceeds(key, sizes.smallest - 1):
        reason = f"parameters up to it are never freed, tiles of {sizes.smallest} among them"
        yield zero.finding(key, reason, instead)
    elif zero.value(key) < instead:
        reason = (
            f"biases of {sizes.beside} elements are gathered together with their tile, which "
            "copies it once more"
        )
        yield zero.finding(key, reason, instead)
    key = "reduce_bucket_size"
    if zero.exceeds(key, max(sizes.largest, *sizes.others, 0)):
        reason = f"a buffer of so many elements is allocated, and a tile has {sizes.largest}"
        yield zero.finding(key, reason, sizes.largest)


def _of_leaves(zero: _Section, model: nn.Module) -> Iterator[Finding]:
    section = _Section(f"{zero.path}.leaf_module", zero.given.get("leaf_module") or {})
    classes = section.given.get("classes", LEAVES)
    classes = [classes] if isinstance(classes, str) else classes
    leaves = leaves_of(model, classes)
    if leaves:
        reason = f"all tiles of {leaves[0]} are gathered at once, experts without tokens too"
        is_default = "classes" not in section.given
        yield Finding(f"{section.path}.classes", list(classes), is_default, reason, [])


def _of_disk(zero: _Section, sizes: Sizes, ranks: int, itemsize: int) -> Iterator[Finding]:
    if (zero.given.get("offload_optimizer") or {}).get("device") == "nvme":
        numels = (sizes.smallest, sizes.beside, *sizes.others)
        if zero.value("sub_group_size") > min(part_of(numel, ranks) for numel in numels if numel):
            reason = "gradients of parameters that share a group may come back from the disk wrong"
            yield zero.finding("sub_group_size", reason, 1)

    section = _Section(f"{zero.path}.offload_param", zero.given.get("offload_param") or {})
    if section.given.get("device") != "nvme":
        return
    largest, smallest = part_of(sizes.largest, ranks), part_of(sizes.smallest, ranks)
    if section.value("buffer_size") < largest:
        reason = f"a rank's part of a tile has {largest} elements and is read into one buffer"
        yield section.finding("buffer_size", reason, largest)
    if section.value("max_in_cpu") > 0:
        reason = (
            "so many elements of a rank's parts stay in memory, before any is on the disk alone"
        )
        yield section.finding("max_in_cpu", reason, 0)
    if smallest * itemsize < SWAPPED_BYTES:
        reason = (
            f"a rank's part of the smallest tile has {smallest * itemsize} bytes, and parts below "
            f"{SWAPPED_BYTES} stay in memory"
        )
        least = SWAPPED_BYTES // itemsize * ranks
        yield section.finding("device", reason, f'"cpu", or tiles of {least} elements,')


def _itemsize(given: Given, model: nn.Module) -> int:
    sixteen = (given.get(key) or {} for key in ("bf16", "fp16"))
    if any(section.get("enabled") is True for section in sixteen):
        return torch.bfloat16.itemsize
    return next(model.parameters()).dtype.itemsize


def _read(path: Path) -> Given:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{path} holds no DeepSpeed config: {error}") from error
    if not isinstance(found, dict):
        raise ArgumentError(f"{path} holds no DeepSpeed config, which is a JSON object")
    return found
