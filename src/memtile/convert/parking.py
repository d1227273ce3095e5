"""The home of a whole model: room for all of it first, then names for its tiles, and passes."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from memtile.checkpoints import CheckpointHome
from memtile.convert.select import Choice
from memtile.homes import Home, Reservation, berth_of, is_parked, resolve_home, whole_pages
from memtile.layers import TiledModule
from memtile.transfer import watch_model


def home_for(model: nn.Module, choices: Sequence[Choice], home: Home | str) -> Reservation:
    """Room for every tile that was chosen in the home that is meant; nothing is parked yet.

    Raises:
        ArgumentError: it is neither a home nor the name of one.
        HomeFullError: there is no room.
    """
    if home == "checkpoint":
        return Reservation(CheckpointHome())
    device = next(model.parameters(), torch.empty(0)).device
    found = resolve_home(home, "cpu" if device.type == "meta" else device)
    tiles = [*_tiles(model, choices), *_gradients(model, choices)]
    return found.hold([whole_pages(shape.numel() * dtype.itemsize) for shape, dtype in tiles])


def _gradients(
    model: nn.Module, choices: Sequence[Choice]
) -> Iterator[tuple[torch.Size, torch.dtype]]:
    """Shapes and dtypes of the weight tiles' gradients that exist already: they move home too."""
    for choice in choices:
        weight = getattr(model.get_submodule(choice.name), "weight", None)
        if getattr(weight, "grad", None) is not None:
            yield from _tiles(model, [choice])


def _tiles(model: nn.Module, choices: Sequence[Choice]) -> Iterator[tuple[torch.Size, torch.dtype]]:
    """Shapes and dtypes of all weight tiles that there will be, shared ones once."""
    for choice in choices:
        if choice.tiled and choice.grid is not None and choice.ties[:1] in ((), (choice.name,)):
            weight = model.get_submodule(choice.name).weight
            assert isinstance(weight, nn.Parameter)
            for index in choice.grid.indices():
                yield torch.Size(choice.grid.rect(*index).shape), weight.dtype


def has_parked_weight(layer: TiledModule) -> bool:
    """Whether a tiled layer's weight lives in a home."""
    return any(map(is_parked, layer.tile_parameters("weight").values()))


def settle_down(model: nn.Module, home: Home) -> None:
    """Name the tiles at their home, and watch the model's iterations."""
    for name, parameter in model.named_parameters():
        berth = berth_of(parameter)
        if berth is not None and berth.home is home:
            berth.label = name
    watch_model(model)
