"""Tied tiles as one module with two uses: engines shard by module, and no parameter twice."""

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional

from memtile.errors import EngineError
from memtile.layers import TiledModule

_Place = tuple[TiledModule, tuple[int, int]]


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


def _tied(model: nn.Module) -> Iterator[list[_Place]]:
    places: dict[int, list[_Place]] = {}
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
