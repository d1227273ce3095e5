"""PyTorch's FSDP2 holds the tiles: each is a unit of its own, gathered, used and let go of.

Source: `torch.distributed.fsdp.fully_shard`. What it does not do for tiles by itself is done here:
tiles are gathered along the layer's order, one ahead in both directions (`ahead`); they are let go
of in backward whatever the input is (`release`); a tied tile is one unit with two uses (`ties`);
ranks that use other modules than the others are told so (`exchange_order`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from memtile.convert import replacing
from memtile.engines.agreement import check_agreement, check_process_group
from memtile.engines.ahead import bring_ahead
from memtile.engines.exchange_order import compare_order
from memtile.engines.release import release_in_backward
from memtile.engines.ties import share_tied_tiles
from memtile.engines.units import tiled_layers, units_of
from memtile.engines.whole_values import take_ties_once, take_whole_values
from memtile.errors import ArgumentError, EngineError, ParkedError
from memtile.homes import is_parked
from memtile.layers import register_gatherer

Model = TypeVar("Model", bound=nn.Module)
SMALLEST_UNIT: Final = 1 << 20
"""Bytes below which neighbouring tiles of a layer are gathered together: a collective costs more
than it moves."""


def shard(
    model: Model,
    mesh: DeviceMesh | None = None,
    *,
    unit_bytes: int = SMALLEST_UNIT,
    prefetch: int = 1,
    mp_policy: MixedPrecisionPolicy | None = None,
    offload_policy: OffloadPolicy | None = None,
) -> Model:
    """Shard a tiled model over ranks, tile by tile.

    A layer without tiles is gathered by itself too where it has `unit_bytes` of its own; whatever
    is smaller is one more unit, which is there from the first layer to the last.

    Make the optimizer afterwards: the parameters are new ones (`DTensor`s).

    Each rank has to use the same modules in the same order. The names of what ranks exchange are
    compared while they run, at first always, later every few exchanges: EngineError on each rank.

    Args:
        model: tiled, its tiles resident; the same on each rank. Seed ranks alike, or
            load a checkpoint: values are not exchanged.
        mesh: of one dimension, or of two (replicate, shard); None: all ranks.
        unit_bytes: neighbouring tiles of a layer are one unit up to this size.
        prefetch: units that are gathered ahead of the one that works, in both directions.
        mp_policy: dtypes of gathered parameters and of reduced gradients.
        offload_policy: such as `CPUOffloadPolicy()`: shards, gradients and moments on the CPU.

    Raises:
        EngineError: there is no process group, or ranks have other models or arguments.
        ArgumentError: nothing is tiled, or a number is out of its range.
        ParkedError: tiles live in a home already.
    """
    kinds = {
        "model": (model, nn.Module),
        "mesh": (mesh, DeviceMesh),
        "mp_policy": (mp_policy, MixedPrecisionPolicy),
        "offload_policy": (offload_policy, OffloadPolicy),
    }
    _check_kinds(kinds)
    _check(model, unit_bytes, prefetch)
    mesh = mesh or init_device_mesh(_device_type(model), (dist.get_world_size(),))
    groups = [mesh.get_group(dimension) for dimension in range(mesh.ndim)]
    check_agreement(model, (unit_bytes, prefetch, mp_policy, offload_policy), groups)
    options: dict[str, Any] = {  # two keywords of fully_shard
        "mp_policy": mp_policy or MixedPrecisionPolicy(),
        "offload_policy": offload_policy or OffloadPolicy(),
    }
    with replacing(model, "shard(model)"):
        share_tied_tiles(model)
        units = units_of(model, unit_bytes)
        for unit in units:
            fully_shard(unit if len(unit) > 1 else unit[0], mesh=mesh, **options)
        fully_shard(model, mesh=mesh, **options)
    tiles = {tile for layer in tiled_layers(model) for _, tile in layer.tiles()}
    for module in (module for unit in units for module in unit):
        if module in tiles or isinstance(module, nn.Linear | nn.Embedding):  # of one input
            release_in_backward(module)
        take_whole_values(module)
    take_ties_once(model)
    bring_ahead(model, units, prefetch)
    compare_order(model, [unit[0] for unit in units], groups)
    return model


@contextmanager
def _refuse_shards(parameters: Sequence[nn.Parameter], write: bool) -> Iterator[None]:
    """The gatherer: a shard is no tile, and what is read or written here would be wrong.

    Raises:
        EngineError: a parameter is sharded.
    """
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        raise EngineError(
            f"whole tiles are asked for {'to write' if write else 'to read'} them, and they are "
            "shards over ranks: use get_model_state_dict and set_model_state_dict of "
            "torch.distributed.checkpoint.state_dict, with the names of tiles, or do it before "
            "memtile's shard"
        )
    yield


register_gatherer(_refuse_shards)


def _check_kinds(given: Mapping[str, tuple[object, type]]) -> None:
    for name, (value, kind) in given.items():
        if not isinstance(value, kind) and not (value is None and name != "model"):
            raise ArgumentError(f"{name}={value!r} must be a {kind.__name__}")


def _check(model: nn.Module, unit_bytes: int, prefetch: int) -> None:
    check_process_group()
    if torch.__version__.startswith("2.6.") and _device_type(model) == "cpu":
        raise EngineError(
            f"torch {torch.__version__} cannot run its FSDP2 on the CPU: install a newer one"
        )
    numbers: dict[str, object] = {"unit_bytes": unit_bytes, "prefetch": prefetch}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ArgumentError(f"{name}={value!r} must be a whole number of at least 0")
    if not units_of(model, unit_bytes):
        raise ArgumentError(
            f"nothing of {type(model).__name__} is tiled, or as large as unit_bytes={unit_bytes}: "
            "call memtile.tile(model, …) first, or torch's own fully_shard for what needs no tiles"
        )
    for layer in tiled_layers(model):
        for _, tile in layer.tiles():
            if isinstance(tile, FSDPModule):
                raise EngineError(f"{layer.full_name()} is sharded already: shard a model once")
            if any(map(is_parked, tile.parameters())):
                raise ParkedError(
                    f"{layer.full_name()} is parked in a home, and shards have no other: tile the "
                    "model without home=…, and give offload_policy=CPUOffloadPolicy() instead"
                )


def _device_type(model: nn.Module) -> str:
    kind: str = next(model.parameters()).device.type
    return "cuda" if kind == "meta" and torch.cuda.is_available() else kind.replace("meta", "cpu")
