"""The model that a plan is for, from whatever describes it; none of its weights is read."""

import os
from pathlib import Path

import torch
from torch import nn

from memtile.convert import integrations
from memtile.errors import ArgumentError, CannotTileError
from memtile.layers import TiledModule


def model_of(source: object, dtype: torch.dtype | None) -> nn.Module:
    """The model itself, or one with nothing in memory that a config or a folder describes.

    Raises:
        ArgumentError: it is neither, or a dtype is given for a model that has one.
        CannotTileError: the model is tiled already, or lies on an accelerator.
    """
    if isinstance(source, nn.Module):
        _check_model(source, dtype)
        return source
    if isinstance(source, str | os.PathLike):
        _check_folder(Path(source))
    for integration in integrations():
        model = integration.empty(source, dtype)
        if model is not None:
            return model
    raise ArgumentError(
        f"{source!r} is no model: give an nn.Module, a transformers config, or a folder with a "
        "config.json (and have transformers installed)"
    )


def _check_model(model: nn.Module, dtype: torch.dtype | None) -> None:
    if dtype is not None:
        raise ArgumentError(
            f"dtype={dtype}: a model has its own; convert it first, with model.to(dtype)"
        )
    for name, module in model.named_modules():
        if isinstance(module, TiledModule):
            raise CannotTileError(
                f"{name or type(model).__name__} is tiled already; plan before tiling, or call "
                "memtile.untile(model) first"
            )
    for name, parameter in model.named_parameters():
        if parameter.device.type not in ("cpu", "meta"):
            raise CannotTileError(
                f"{name} is on {parameter.device}: plans are for work on the CPU so far; choose "
                "the tiles there with memtile.tile(model, max_tile_bytes=…, home=…)"
            )


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ArgumentError(
            f"{str(folder)!r} holds no config.json; give a folder that save_pretrained wrote"
        )
