"""What forward holds at its peak, by PyTorch's own account of allocations."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from memtile import TiledLinear
from memtile.testing import peak_allocated_bytes


def tiles_of(layer: TiledLinear) -> Iterator[nn.Linear]:
    """Dense layers of the sizes and the memory layout of the tiles."""
    for _, tile in layer.tiles():
        yield nn.Linear(tile.in_features, tile.out_features, dtype=tile.weight.dtype)


def scratch_bytes(dense: nn.Linear, x: torch.Tensor) -> int:
    """What a dense layer's forward takes besides its result."""
    part = x[:, : dense.in_features]
    result_bytes = len(x) * dense.out_features * x.element_size()
    return peak_allocated_bytes(lambda: dense(part)) - result_bytes


@pytest.mark.parametrize("path", ["fused", "composed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", [(1, 1), (5, 1), (1, 3), (5, 3)])
def test_forward_holds_one_output_and_one_tiles_result(
    grid: tuple[int, int], dtype: torch.dtype, path: str
) -> None:
    """Forward's peak is the output, a tile's result, and a float32 row where sums need one.

    Where 16-bit tiles are joined (the fused path, this many tokens), it is the output and a copy of
    the weight, which is smaller than a block here.

    What the library's own products take as scratch is allowed too, as dense layers of the same
    sizes take it on this CPU: a smaller product may take more than a larger one.
    """
    rows, columns = grid
    dense = nn.Linear(192, 640, dtype=dtype)
    layer = TiledLinear(192, 640, in_splits=columns, out_splits=rows, dtype=dtype)
    if path == "composed":
        for _, tile in layer.tiles():
            tile.register_forward_hook(lambda *_: None)
    x = torch.randn(512, 192, dtype=dtype)
    joined = path == "fused" and dtype != torch.float32 and grid != (1, 1)
    sums_in_float32 = columns > 1 and dtype != torch.float32 and not joined
    tile_elements = 512 * layer.grid.out_spans[0].size

    if dtype != torch.float32 and torch.__version__ < "2.13":
        pytest.skip("torch 2.6 copies a 16-bit product that is written into a slice")
    scratch = max(scratch_bytes(dense, x), *(scratch_bytes(each, x) for each in tiles_of(layer)))

    peak = peak_allocated_bytes(lambda: layer(x))

    allowed = scratch + 512 * 640 * dtype.itemsize
    allowed += dtype.itemsize * (640 * 192 if joined else tile_elements)
    allowed += 4 * tile_elements if sums_in_float32 else 0
    small = 1 << 20 if sums_in_float32 else 4096  # the block in which a sum is converted; biases
    assert peak <= allowed + small
