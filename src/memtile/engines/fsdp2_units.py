"""What is gathered together: a tile, small neighbours of a layer, or a layer without tiles."""

from collections import Counter
from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from torch.nn import functional

from memtile.errors import EngineError
from memtile.layers import TiledModule

FsdpUnit = list[nn.Module]


def units_of(model: nn.Module, unit_bytes: int) -> list[FsdpUnit]:
    """The units of a model, in the order of its modules.

    Neighbouring tiles of a layer are one unit up to `unit_bytes`; a tied tile is one alone. So is a
    module without tiles whose own parameters have as many bytes; what is smaller is in no unit.
    """
    seen: set[nn.Module] = set()
    return [unit for layer in _layers(model, unit_bytes) for unit in _cut(layer, unit_bytes, seen)]


def tiled_layers(model: nn.Module) -> list[TiledModule]:
    """The tiled layers of a model."""
    return [module for module in model.modules() if isinstance(module, TiledModule)]


def nbytes_of(modules: Sequence[nn.Module]) -> int:
    """Bytes of their parameters."""
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())


def _cut(layer: nn.Module, unit_bytes: int, seen: set[nn.Module]) -> Iterator[FsdpUnit]:
    unit: FsdpUnit = []
    for module in (module for module in _modules(layer) if module not in seen):
        seen.add(module)
        if isinstance(module, SharedTile):
            yield [module]
            continue
        if unit and nbytes_of([*unit, module]) > unit_bytes:
            yield unit
            unit = []
        unit = [*unit, module]
    if unit:
        yield unit


def _layers(model: nn.Module, unit_bytes: int) -> Iterator[nn.Module]:
    """Tiled layers, and modules with enough parameters of their own that no other one shares."""
    inside = {inner for layer in tiled_layers(model) for inner in layer.modules()}
    places = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    for module in model.modules():
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        if isinstance(module, TiledModule):
            yield module
        elif own and module not in inside and module is not model and not list(module.children()):
            alone = all(places[id(parameter)] == 1 for parameter in own)
            if alone and nbytes_of([module]) >= max(unit_bytes, 1):
                yield module


def _modules(layer: nn.Module) -> list[nn.Module]:
    return [tile for _, tile in layer.tiles()] if isinstance(layer, TiledModule) else [layer]


_TileOf = tuple[TiledModule, tuple[int, int]]


class SharedTile(nn.Linear):
    """A tile of a head and of an embedding: rows for ids, a product for everything else."""

    padding_idx: int | None = None
    scale_grad_by_freq: bool = False

    def forward(self, input: Tensor) -> Tensor:
        """The rows of whole numbers (…) as (…, in_features), or the product (…, out_features)."""
        if input.is_floating_point():
            return super().forward(input)
        return functional.embedding(
            input, self.weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq
        )


def share_tied_tiles(model: nn.Module) -> None:
    """Put one module in the places of all tiles that share a weight.

    Raises:
        EngineError: several of them have biases.
    """
    for places in list(_tied(model)):
        shared = _shared([layer.tile(*index) for layer, index in places], places[0][0])
        for layer, index in places:
            path, _, name = layer.tile_path(*index).rpartition(".")
            setattr(layer.get_submodule(path), name, shared)


def _tied(model: nn.Module) -> Iterator[list[_TileOf]]:
    places: dict[int, list[_TileOf]] = {}
    for layer in model.modules():
        if isinstance(layer, TiledModule):
            for index, tile in layer.tiles():
                places.setdefault(id(tile.weight), []).append((layer, index))
    return (found for found in places.values() if len(found) > 1)


def _shared(tiles: list[nn.Module], layer: TiledModule) -> nn.Module:
    if len({id(tile) for tile in tiles}) == 1:
        return tiles[0]
    biases = [bias for tile in tiles if (bias := tile._parameters.get("bias")) is not None]
    weight = tiles[0]._parameters["weight"]
    assert weight is not None
    if len(biases) > 1 or any(type(tile) not in (nn.Linear, nn.Embedding) for tile in tiles):
        raise EngineError(
            f"{layer.full_name()}: its tiles are tied to others in a way that one module cannot "
            "stand for (several biases, or tiles of a class of their own); untie them, or leave "
            "them untiled"
        )
    rows, columns = weight.shape
    shared = SharedTile(columns, rows, bias=False, device="meta")
    shared.register_parameter("weight", weight)
    shared.register_parameter("bias", biases[0] if biases else None)
    for tile in tiles:
        if isinstance(tile, nn.Embedding):
            shared.padding_idx = tile.padding_idx
            shared.scale_grad_by_freq = tile.scale_grad_by_freq
    return shared.train(tiles[0].training)
