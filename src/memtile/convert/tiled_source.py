"""Reading a dense tensor from a checkpoint that holds it in tiles, of any grid."""

from collections.abc import Mapping

import torch
from torch import Tensor

from memtile.checkpoints import StoredTensor
from memtile.errors import CheckpointError
from memtile.geometry import Grid, Rect, Span

Index = tuple[int, int]


class TiledSource:
    """The dense matrix, or bias, that stored tiles make; their spans are read from their shapes.

    Args:
        tiles: by their place; those of a bias are one column.

    Attributes:
        grid: how they make the whole.
        shape: (out, in), or (out,) of a bias.
        dtype: of them all.

    Raises:
        TileShapeError: they make no grid.
        CheckpointError: their dtypes differ, or they are neither matrices nor vectors.
    """

    def __init__(self, tiles: Mapping[Index, StoredTensor]) -> None:
        self.tiles = tiles
        dtypes = {tile.dtype for tile in tiles.values()}
        ranks = {len(tile.shape) for tile in tiles.values()}
        if len(dtypes) > 1:
            raise CheckpointError(f"the tiles are {' and '.join(sorted(map(str, dtypes)))}")
        if ranks not in ({1}, {2}):
            raise CheckpointError("the tiles are neither matrices nor vectors")
        (self.dtype,), (rank,) = dtypes, ranks
        self.grid = Grid.of_shapes(
            {i: (tile.shape[0], tile.shape[1] if rank == 2 else 1) for i, tile in tiles.items()}
        )
        whole = (self.grid.out_features, self.grid.in_features)
        self.shape = torch.Size(whole[:rank])

    def elements(self, start: int, stop: int) -> Tensor:
        """Elements of the flattened tensor, in new memory."""
        width = self.grid.in_features
        first, last = start // width, -(-stop // width)
        return self.rows(first, last).view(-1)[start - first * width : stop - first * width]

    def rows(self, start: int, stop: int) -> Tensor:
        """Whole rows, in new memory."""
        place = Rect(Span(start, stop), Span(0, self.grid.in_features))
        out = torch.empty(place.shape, dtype=self.dtype)
        for index, common in self.grid.overlapping(place):
            rows = common.since(self.grid.rect(*index)).out
            part = self.tiles[index].rows(rows.start, rows.stop)
            out[common.since(place).index] = part.view(rows.size, -1)
        return out.view(stop - start, *self.shape[1:])
