"""DeepSpeed's ZeRO-3 holds the tiles: each is gathered, used and let go of, one more on its way.

Source: `deepspeed.initialize` with ZeRO stage 3 (arXiv 2104.07857), whose own tiled linear this one
stands for. `config` says what DeepSpeed must be told, `check` what a config of one's own does
against tiles, `hold` does what no key can.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from memtile.engines.release import release_in_backward
from memtile.engines.zero3_check import Finding, check
from memtile.engines.zero3_config import check_installed, config
from memtile.engines.zero3_empty import from_checkpoint
from memtile.engines.zero3_sizes import tiles_of
from memtile.engines.zero3_values import is_partitioned
from memtile.errors import EngineConfigWarning, EngineError

__all__ = ["Finding", "check", "config", "from_checkpoint", "hold"]

Engine = TypeVar("Engine")  # DeepSpeed's, which is untyped
_HELD = "_memtile_holds_tiles"


def hold(engine: Engine, *, prefetch: int = 1) -> Engine:
    """Let go of tiles where DeepSpeed by itself would not; call it once, on each rank.

    In backward tiles are let go of whatever the layer's input is: DeepSpeed does so only where it
    requires grad. And what an evaluation leaves gathered is let go of before the next forward.

    Args:
        engine: what `deepspeed.initialize` gave for a tiled model under ZeRO-3.
        prefetch: what `config` was made with.

    Returns:
        The engine.

    Raises:
        EngineError: it is none of ZeRO-3, or held already, or its parts on a disk are rounded.
        ArgumentError: nothing of its model is tiled.

    Warns:
        EngineConfigWarning: what `check` finds in its config.
    """
    check_installed()
    model = getattr(engine, "module", engine)
    tiles = tiles_of(model) if isinstance(model, nn.Module) else []
    parameters = [parameter for tile in tiles for parameter in tile.parameters()]
    if not isinstance(model, nn.Module) or not all(map(is_partitioned, parameters)):
        raise EngineError(
            f"hold({type(engine).__name__}) takes the engine that deepspeed.initialize gives with "
            "ZeRO stage 3: engine, *_ = deepspeed.initialize(model=model, config=config(model), …)"
        )
    _check_files(model)
    if hasattr(model, _HELD):
        raise EngineError("the engine's tiles are held already: call hold(engine) once")
    setattr(model, _HELD, True)
    for tile in tiles:
        release_in_backward(tile)
    _Leftovers(model, tiles)
    _read_once(model)
    _warn(getattr(engine, "config", None), model, prefetch)
    return engine


def _check_files(model: nn.Module) -> None:
    """Refuse parts on a disk that are rounded: DeepSpeed 0.19 takes bfloat16 on most CPUs."""
    for name, parameter in model.named_parameters():
        files = getattr(parameter, "nvme_swapper", None)
        if files is not None and files.dtype != parameter.dtype:
            raise EngineError(
                f"parts of {name}, of {parameter.dtype}, are on the disk as {files.dtype}: "
                "DeepSpeed takes that for the dtype of what is handed to deepspeed.initialize on "
                "this device; before it, partition the model by the same config: "
                "deepspeed.zero.Init(module=model, config_dict_or_path=config(model, …))"
            )


def _read_once(model: nn.Module) -> None:
    """Ask for a tile on a disk once where forward's last and backward's first are the same.

    DeepSpeed 0.19 reads ahead along both, and fails: "param … already assigned swap buffer".
    """
    found = [getattr(parameter, "nvme_swapper", None) for parameter in model.parameters()]
    for files in {id(each): each for each in found if each is not None}.values():
        files.swap_in = _once(files.swap_in)


def _once(read: Callable[..., None]) -> Callable[..., None]:
    def swap_in(params: Sequence[nn.Parameter], *arguments: Any, **options: Any) -> None:  # its own
        read(list(dict.fromkeys(params)), *arguments, **options)

    return swap_in


class _Leftovers:
    """Tiles that are gathered, or on their way, and nothing uses: an evaluation has no backward.

    DeepSpeed counts what is live from nothing in each forward, so they would come on top: 3 tiles
    for 2. And it refuses to read what is on its way.
    """

    def __init__(self, model: Any, tiles: list[nn.Module]) -> None:  # with DeepSpeed's attributes
        self._parameters: list[Any] = [p for tile in tiles for p in tile.parameters()]
        self._on_the_way = model.ds_inflight_param_registry
        model.register_forward_pre_hook(self._let_go, prepend=True)
        model.register_forward_hook(self._let_go_unless_trained)

    def _let_go_unless_trained(self, *_: object) -> None:
        if not torch.is_grad_enabled():
            self._let_go()

    @torch.no_grad()
    def _let_go(self, *_: object) -> None:
        for parameter in self._parameters:
            if parameter in self._on_the_way:
                self._on_the_way.pop(parameter).wait()
            gathered = parameter.ds_status.name == "AVAILABLE"
            if gathered and not parameter.ds_persist and not parameter.ds_active_sub_modules:
                parameter.partition()


def _warn(given: object, model: nn.Module, prefetch: int) -> None:
    if not isinstance(given, Mapping | str) or (
        isinstance(given, str) and not Path(given).is_file()
    ):
        return  # in base64, or none: DeepSpeed takes that too
    for finding in check(given, model, prefetch=prefetch):
        warnings.warn(str(finding), EngineConfigWarning, stacklevel=3)
