"""Tiles as shards of PyTorch's FSDP2: each tile is a unit, gathered for its use and freed after it.

Source: `torch.distributed.fsdp.fully_shard`. Added here, because FSDP2 does not do it for tiles:
prefetching in the layer's order, in both directions, and tied tiles as one unit (`fsdp2_units`);
freeing a tile in backward even where its input needs no gradient (`release`); and an error where
ranks use different modules (`exchange_order`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from memtile.convert import replacing, tiled_layers
from memtile.engines.exchange_order import compare_order
from memtile.engines.fsdp2_units import (
    SharedTile,
    bring_ahead,
    share_tied_tiles,
    units_of,
)
from memtile.engines.ranks import check_agreement, check_process_group
from memtile.engines.release import release_in_backward
from memtile.errors import ArgumentError, EngineError, ParkedError, check_whole_number
from memtile.homes import is_parked
from memtile.layers import TiledLinear, defer_in_engine, register_gatherer

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

    A layer without tiles is a unit too where it has `unit_bytes` of its own. All smaller ones are
    one more unit, gathered from the first layer to the last.

    Make the optimizer afterwards: the parameters are new ones (`DTensor`s).

    Each rank has to use the same modules in the same order. Their names are compared during
    training: for the first 64 exchanges, then for every 32nd (EngineError on each rank).

    Args:
        model: tiled, its tiles resident; the same on each rank. Seed ranks alike, or
            load a checkpoint: values are not exchanged.
        mesh: of one dimension, or of two (replicate, shard); None: all ranks.
        unit_bytes: neighbouring tiles of a layer are one unit up to this size.
        prefetch: units that are gathered ahead of the one in use, in both directions.
        mp_policy: dtypes of gathered parameters and of reduced gradients.
        offload_policy: such as `CPUOffloadPolicy()`: shards, gradients and moments on the CPU.

    Raises:
        EngineError: there is no process group, or ranks differ in models or arguments.
        ArgumentError: nothing is tiled, or a number is out of its range.
        ParkedError: tiles live in a home already.
    """
    _check_kinds(
        model=(model, nn.Module),
        mesh=(mesh, DeviceMesh),
        mp_policy=(mp_policy, MixedPrecisionPolicy),
        offload_policy=(offload_policy, OffloadPolicy),
    )
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
    tiles = {tile for _, layer in tiled_layers(model) for _, tile in layer.tiles()}
    for module in (module for unit in units for module in unit):
        if module in tiles or isinstance(module, nn.Linear | nn.Embedding):
            release_in_backward(module)
        module.register_load_state_dict_pre_hook(_cut_values)
    for head in defer_in_engine(model):  # what the root gathers is another parameter before a step
        head.is_on = isinstance(head, TiledLinear) or any(head in unit for unit in units)
    _load_tied_tiles_by_one_name(model)
    bring_ahead(model, units, prefetch)
    compare_order(model, [unit[0] for unit in units], groups)
    return model


@contextmanager
def _refuse_shards(parameters: Sequence[nn.Parameter], write: bool) -> Iterator[None]:
    """Refuse code that reads or writes whole tiles, of which a rank has shards only."""
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        raise EngineError(
            f"whole tiles are asked for {'to write' if write else 'to read'} them, and they are "
            "shards over ranks: use get_model_state_dict and set_model_state_dict of "
            "torch.distributed.checkpoint.state_dict, with the names of tiles, or do it before "
            "memtile's shard"
        )
    yield


register_gatherer(_refuse_shards)


def _check_kinds(**given: tuple[object, type]) -> None:
    for name, (value, kind) in given.items():
        if not isinstance(value, kind) and not (value is None and name != "model"):
            raise ArgumentError(f"{name}={value!r} must be a {kind.__name__}")


def _check(model: nn.Module, unit_bytes: int, prefetch: int) -> None:
    check_process_group()
    if torch.__version__.startswith("2.6.") and _device_type(model) == "cpu":
        raise EngineError(
            f"torch {torch.__version__} cannot run its FSDP2 on the CPU: install a newer one"
        )
    check_whole_number("unit_bytes", unit_bytes, 0)
    check_whole_number("prefetch", prefetch, 0)
    if not units_of(model, unit_bytes):
        raise ArgumentError(
            f"nothing of {type(model).__name__} is tiled, or as large as unit_bytes={unit_bytes}: "
            "call memtile.tile(model, …) first, or torch's own fully_shard for what needs no tiles"
        )
    for _, layer in tiled_layers(model):
        for _, tile in layer.tiles():
            if isinstance(tile, FSDPModule):
                raise EngineError(f"{layer.full_name()} is sharded already: shard a model once")
            if any(map(is_parked, tile.parameters())):
                raise ParkedError(
                    f"{layer.full_name()} is parked in a home, where shards cannot be: tile the "
                    "model without home=…, and give offload_policy=CPUOffloadPolicy() instead"
                )


def _device_type(model: nn.Module) -> str:
    kind: str = next(model.parameters()).device.type
    return "cuda" if kind == "meta" and torch.cuda.is_available() else kind.replace("meta", "cpu")


def _load_tied_tiles_by_one_name(model: nn.Module) -> None:
    """Let a sharded model load tied tiles that come under one of their names.

    `set_model_state_dict` with `broadcast_from_rank0` sends each module's values under one name: a
    rank raised for the others, and rank 0 waited for it.
    """
    names: dict[int, list[tuple[str, str]]] = {}  # of each tied parameter: a tile's, the dense one
    for layer_name, layer in tiled_layers(model, all_names=True):
        for index, tile in layer.tiles():
            if isinstance(tile, SharedTile):
                for own, parameter in tile.named_parameters():
                    name = f"{layer_name}.{layer.tile_path(*index)}.{own}"
                    names.setdefault(id(parameter), []).append((name, f"{layer_name}.{own}"))

    def fill_in(_: nn.Module, state_dict: dict[str, Any], prefix: str, *__: object) -> None:
        for tied in names.values():
            given = [state_dict[prefix + name] for name, _ in tied if prefix + name in state_dict]
            for name, dense in tied:
                if given and prefix + dense not in state_dict:
                    state_dict.setdefault(prefix + name, given[0])

    model.register_load_state_dict_pre_hook(fill_in)


def _cut_values(tile: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Before a tile loads whole tensors, the same on each rank: take this rank's shard of each.

    torch's own state-dict functions cut each parameter once, under one name: a tied tile has two.
    """
    parameters: dict[str, Any] = tile._parameters  # a DTensor is a Parameter by its metaclass only
    for name, parameter in parameters.items():
        value = state_dict.get(prefix + name)
        if not isinstance(parameter, DTensor) or not isinstance(value, Tensor):
            continue
        # a value of another shape stays as it is: torch says what does not fit
        if not isinstance(value, DTensor) and value.shape == parameter.shape:
            state_dict[prefix + name] = distribute_tensor(
                value.to(parameter.device),
                parameter.device_mesh,
                parameter.placements,
                src_data_rank=None,
            )
