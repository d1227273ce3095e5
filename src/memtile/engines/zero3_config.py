"""Makes a ZeRO-3 config under which one tile is gathered, and the next ones while it is used.

Comments beside the values say what was measured without them (16 tiles, two ranks, DeepSpeed
0.19.8).
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
import torch.distributed as dist
from torch import nn

from memtile.convert import tiled_layers
from memtile.engines.ranks import check_agreement
from memtile.engines.zero3_values import whole_numel
from memtile.errors import ArgumentError, EngineError, check_whole_number
from memtile.layers import TiledStack

OLDEST: Final = (0, 19)
"""The first release with what `attach` needs: older ones keep what they recompute in backward."""
SWAPPED_BYTES: Final = 1 << 20
"""The smallest part of a parameter, on one rank, that DeepSpeed swaps to a disk."""
LEAVES: Final = (
    "transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock",
    "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock",
    "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock",
)
"""Classes whose modules DeepSpeed 0.19 gathers at once, as their experts would be used by chance.

All ranks call all experts of a stack in tiles, in order: they are gathered one by one.
"""
Place: TypeAlias = str | os.PathLike[str]
Json: TypeAlias = dict[str, Any]  # a config is whatever JSON can hold

_SIXTEEN_BITS: Final[Mapping[torch.dtype, str]] = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Sizes:
    """Numbers of elements in a tiled model, counted before partitioning."""

    largest: int  # of the largest tile
    smallest: int
    beside: int  # of the largest parameter that a tile has beside its weight, or 0
    others: tuple[int, ...]  # of every other parameter of the model, each once
    most_at_once: int  # the most parameters that one module has itself

    @property
    def persistent_up_to(self) -> int:
        """The threshold under which biases of tiles stay gathered, and no tile does."""
        return min(self.beside, self.smallest - 1)

    def persistent(self, threshold: int) -> int:
        """Elements that stay gathered on every rank under a threshold, tiles not counted."""
        return sum(numel for numel in self.others if numel <= threshold)

    def live(self, prefetch: int, threshold: int) -> int:
        """The `stage3_max_live_parameters` under which `prefetch` tiles are gathered ahead.

        DeepSpeed gathers ahead while fewer elements are live: so it is more than `prefetch` of the
        largest tiles and what is persistent, and at most `prefetch + 1` of the smallest. Where
        tiles differ so much that no number is both, the elements of tiles, not their number, stay
        within `prefetch + 1` of the largest.
        """
        enough = prefetch * self.largest + 1
        return max(enough, min(enough + self.persistent(threshold), (prefetch + 1) * self.smallest))


def config(
    model: nn.Module,
    *,
    micro_batch: int = 1,
    accumulation: int = 1,
    clip: float | None = None,
    prefetch: int = 1,
    offload_param: Place | None = None,
    offload_optimizer: Place | None = None,
    dtype: torch.dtype | None = None,
    world_size: int | None = None,
) -> Json:
    """A config for `deepspeed.initialize`: one tile is in use, and `prefetch` are gathered ahead.

    Under DeepSpeed's own defaults every tile of a model stays gathered. Add what else you want
    (`{**config(model), "optimizer": …}`), and use `check` on what you change. Where there is a
    process group, each rank calls this, and models are compared.

    Args:
        model: tiled; on the meta device, made inside `deepspeed.zero.Init`, or ordinary.
        micro_batch: samples of one forward on one rank.
        accumulation: backward passes of one step.
        clip: the norm that gradients are clipped to; None: not at all.
        prefetch: tiles that are gathered ahead of the one in use.
        offload_param: where parts of parameters live: None for the rank's device, "cpu", or a
            folder on a disk.
        offload_optimizer: the same for masters and moments.
        dtype: to train in, with float32 masters; None: the model's own.
        world_size: ranks; None: those of the process group or of the launcher, or one.

    Raises:
        ArgumentError: nothing is tiled, a number is out of its range, or tiles are too small for a
            disk.
        EngineError: DeepSpeed is missing or too old, ranks have other models, or a disk is asked
            for and libaio is missing. On every rank.
    """
    check_installed()
    numbers = {"micro_batch": micro_batch, "accumulation": accumulation, "prefetch": prefetch}
    for name, value in numbers.items():
        check_whole_number(name, value, 0 if name == "prefetch" else 1)
    if world_size is not None:
        check_whole_number("world_size", world_size, 1)
    dtype = dtype or next(model.parameters()).dtype
    offloads = {"offload_param": offload_param, "offload_optimizer": offload_optimizer}
    if dist.is_initialized():
        kinds = [None if place is None else place != "cpu" for place in offloads.values()]
        check_agreement(model, (numbers, clip, kinds, dtype))
    sizes = sizes_of(model)
    zero = _tiled(sizes, prefetch)
    for key, place in offloads.items():
        if place is not None:
            zero[key] = _offload(place)
    if leaves_of(model, LEAVES):
        zero["leaf_module"] = {"classes": []}
    _fit_to_disk(zero, sizes, prefetch, world_size or ranks_of_launcher(), dtype)
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip or 0.0,  # stated: DeepSpeed clips to 1.0 where it is not
        "zero_force_ds_cpu_optimizer": False,  # else offloading takes no optimizer but DeepSpeed's
        "zero_optimization": zero,
        **({_SIXTEEN_BITS[dtype]: {"enabled": True}} if dtype in _SIXTEEN_BITS else {}),
    }


def _tiled(sizes: Sizes, prefetch: int) -> Json:
    threshold = sizes.persistent_up_to
    return {
        "stage": 3,
        # A prefetch takes a whole parameter: more than one element would take several.
        "stage3_prefetch_bucket_size": 1 if prefetch else 0,
        # This bounds the depth: modules without parameters prefetch too. 2T to 3T: 3 tiles live.
        "stage3_max_live_parameters": sizes.live(prefetch, threshold),
        # A tile used again within so many elements is kept: 8T: 4 tiles, the default: all.
        "stage3_max_reuse_distance": 0,
        # Biases stay gathered, tiles do not: one gathered with its bias is copied once more.
        "stage3_param_persistence_threshold": threshold,
        # Allocated at once: the default takes 2 GB in float32, however small the tiles are.
        "reduce_bucket_size": sizes.largest,
    }


def part_of(numel: int, ranks: int) -> int:
    """Elements of one rank's part of a parameter, padding included."""
    return -(-numel // ranks)


def ranks_of_launcher() -> int:
    """How many ranks there are, or will be when the launcher's script makes its group."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def _offload(place: Place) -> Json:
    pinned = {"pin_memory": torch.cuda.is_available()}
    if place == "cpu":
        return {"device": "cpu", **pinned}
    _check_libaio(place)
    return {"device": "nvme", "nvme_path": str(Path(place)), **pinned}


def _fit_to_disk(zero: Json, sizes: Sizes, prefetch: int, ranks: int, dtype: torch.dtype) -> None:
    """Buffers that hold a tile, and one parameter's masters and moments in memory at a time."""
    part = part_of(sizes.largest, ranks)
    if zero.get("offload_param", {}).get("device") == "nvme":
        if part * dtype.itemsize < SWAPPED_BYTES:
            raise ArgumentError(
                f"offload_param={zero['offload_param']['nvme_path']!r}: a rank's part of the "
                f"largest tile has {part * dtype.itemsize} bytes, and DeepSpeed swaps no less than "
                f"{SWAPPED_BYTES}: cut tiles of at least {SWAPPED_BYTES // dtype.itemsize * ranks} "
                'elements, or give offload_param="cpu"'
            )
        largest = max(sizes.largest, *sizes.others, 0)
        zero["offload_param"]["buffer_size"] = part_of(largest, ranks)
        # Buffers of what is gathered, as many for what is being read, and one that is written.
        # The default keeps parts of 10⁹ elements in memory, and writes them nevertheless.
        zero["offload_param"]["max_in_cpu"] = 0
        zero["offload_param"]["buffer_count"] = 2 * max(prefetch + 1, sizes.most_at_once) + 1
    if zero.get("offload_optimizer", {}).get("device") == "nvme":
        # One parameter a group: gradients of the second came back wrong where its part began at an
        # odd place, and after six steps a float32 run's error was 60 000 times as big.
        zero["sub_group_size"] = 1


def check_installed() -> None:
    """Raise EngineError where DeepSpeed is missing or too old; imports nothing."""
    needed = ".".join(map(str, OLDEST))
    way_out = f'pip install "memtile[deepspeed]", which takes deepspeed>={needed}'
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        raise EngineError(f"DeepSpeed is not installed here: {way_out}") from None
    if tuple(int(number) for number in found.split("+")[0].split(".")[:2]) < OLDEST:
        raise EngineError(f"DeepSpeed {found} is installed, which is too old: {way_out}")


def _check_libaio(place: Place) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise EngineError(
            f"offloading to the folder {str(place)!r} takes libaio, which is not installed here "
            "with its headers (Debian: libaio-dev, Fedora: libaio-devel); install it on every "
            'host, or offload to "cpu"'
        )


def sizes_of(model: nn.Module) -> Sizes:
    """The sizes of a tiled model: on the meta device, partitioned or ordinary."""
    weights: dict[nn.Parameter, int] = {}
    beside: list[int] = []
    for tile in tiles_of(model):
        first, *rest = sorted(tile.parameters(), key=whole_numel, reverse=True)
        weights[first] = whole_numel(first)
        beside += map(whole_numel, rest)
    others = [whole_numel(p) for p in model.parameters() if p not in weights]
    most = max(len(module._parameters) for module in model.modules())
    return Sizes(
        max(weights.values()), min(weights.values()), max(beside, default=0), tuple(others), most
    )


def leaves_of(model: nn.Module, classes: Iterable[str]) -> list[str]:
    """Names of modules of these classes, as DeepSpeed knows them, that have experts in tiles."""
    named = set(classes)
    return [
        name
        for name, module in model.named_modules()
        if not named.isdisjoint({type(module).__name__, _class_path(module)})
        and any(isinstance(inner, TiledStack) for inner in module.modules())
    ]


def _class_path(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def tiles_of(model: nn.Module) -> list[nn.Module]:
    """Every tile of a model, each once."""
    layers = [layer for _, layer in tiled_layers(model)]
    if not layers:
        raise ArgumentError(
            f"nothing of {type(model).__name__} is tiled: call memtile.tile(model, …) first, or "
            "use DeepSpeed as it is for what needs no tiles"
        )
    return list(dict.fromkeys(tile for layer in layers for _, tile in layer.tiles()))
