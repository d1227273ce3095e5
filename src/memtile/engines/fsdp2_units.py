"""FSDP2 units: a tile, small neighbouring tiles, a tied tile, or a layer without tiles."""

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
    units: list[FsdpUnit] = []
    for layer in _layers(model, unit_bytes):
        unit: FsdpUnit = []
        for module in _modules(layer):
            if module in seen:
                continue
            seen.add(module)
            if isinstance(module, SharedTile):
                units.append([module])
            elif unit and _nbytes([*unit, module]) <= unit_bytes:
                unit.append(module)
            else:
                unit = [module]
                units.append(unit)
    return units


def tiled_layers(model: nn.Module) -> list[TiledModule]:
    """The tiled layers of a model."""
    return [module for module in model.modules() if isinstance(module, TiledModule)]


def _nbytes(modules: Sequence[nn.Module]) -> int:
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())


def _layers(model: nn.Module, unit_bytes: int) -> Iterator[nn.Module]:
    """Tiled layers, and modules with enough parameters of their own that no other one shares."""
    inside = {inner for layer in tiled_layers(model) for inner in layer.modules()}
    own = {
        module: [parameter for parameter in module._parameters.values() if parameter is not None]
        for module in model.modules()
    }
    uses = Counter(parameter for parameters in own.values() for parameter in parameters)
    for module, parameters in own.items():
        if isinstance(module, TiledModule):
            yield module
        elif module not in inside and module is not model and not list(module.children()):
            alone = all(uses[parameter] == 1 for parameter in parameters)
            if parameters and alone and _nbytes([module]) >= max(unit_bytes, 1):
                yield module


def _modules(layer: nn.Module) -> list[nn.Module]:
    return [tile for _, tile in layer.tiles()] if isinstance(layer, TiledModule) else [layer]


class SharedTile(nn.Linear):
    """A tile of a tied head and embedding: an embedding of integers, a linear of anything else."""

    padding_idx: int | None = None
    scale_grad_by_freq: bool = False

    def forward(self, input: Tensor) -> Tensor:
        """The rows of integers (…) as (…, in_features), or the product (…, out_features)."""
        if input.is_floating_point():
            return super().forward(input)
        return functional.embedding(
            input, self.weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq
        )


def share_tied_tiles(model: nn.Module) -> None:
    """Put one module in the places of all tiles that share a weight: FSDP2 shards by module."""
    places: dict[object, list[tuple[TiledModule, tuple[int, int]]]] = {}
    for layer in tiled_layers(model):
        for index, tile in layer.tiles():
            places.setdefault(tile.weight, []).append((layer, index))
    for tied in places.values():
        if len(tied) < 2:
            continue
        shared = _shared([layer.tile(*index) for layer, index in tied], tied[0][0])
        for layer, index in tied:
            path, _, name = layer.tile_path(*index).rpartition(".")
            setattr(layer.get_submodule(path), name, shared)


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
