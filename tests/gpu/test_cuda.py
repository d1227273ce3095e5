"""The tiled layers on a CUDA device: where 16-bit products are written in float32."""

import copy

import pytest
import torch
from paths import on_path
from torch import Tensor, nn

from memtile import TiledEmbedding, TiledLinear
from memtile.ops.products import writes_float32
from memtile.testing import assert_as_accurate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GRIDS = [(1, 1), (1, 7), (7, 1), (5, 3), (16, 16)]
TOKENS, IN_FEATURES, OUT_FEATURES = 67, 392, 520


def step(layer: nn.Module, x: Tensor, gradient: Tensor) -> list[Tensor]:
    """Output, input gradient, weight gradient of one call."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(gradient)
    assert x.grad is not None
    return [y.detach(), x.grad, layer.weight.grad]


@pytest.mark.parametrize("path", ["fused", "composed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", GRIDS)
def test_accuracy_on_the_device(grid: tuple[int, int], dtype: torch.dtype, path: str) -> None:
    """At most 1.1 × the dense error where products are written in float32, 1.5 × elsewhere."""
    torch.manual_seed(0)
    dense = nn.Linear(IN_FEATURES, OUT_FEATURES, device="cuda", dtype=dtype)
    tiled = TiledLinear.from_linear(dense, in_splits=grid[1], out_splits=grid[0])
    x = torch.randn(TOKENS, IN_FEATURES, device="cuda", dtype=dtype)
    gradient = torch.randn(TOKENS, OUT_FEATURES, device="cuda", dtype=dtype)
    truth = step(copy.deepcopy(dense).double(), x.double(), gradient.double())
    wide = dtype == torch.float32 or (path == "fused" and writes_float32("cuda", dtype))

    ours, theirs = step(on_path(path, tiled), x, gradient), step(dense, x, gradient)

    for one, other, exact in zip(ours, theirs, truth, strict=True):
        assert_as_accurate(one, other, exact, 1.1 if wide else 1.5)


@pytest.mark.parametrize("grid", [(4, 1), (1, 4), (4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_memory_on_the_device(grid: tuple[int, int], dtype: torch.dtype) -> None:
    """Forward holds the output, a tile's result, and two float32 rows where columns are summed."""
    layer = TiledLinear(
        1024, 4096, in_splits=grid[1], out_splits=grid[0], device="cuda", dtype=dtype
    )
    x = torch.randn(512, 1024, device="cuda", dtype=dtype)
    with torch.no_grad():
        layer(x)  # cuBLAS takes its workspace at the first call
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        y = layer(x)
        peak = torch.cuda.max_memory_allocated() - before

    row = 512 * layer.grid.out_spans[0].size
    allowed = y.nbytes + row * dtype.itemsize
    if grid[1] > 1 and dtype != torch.float32:
        allowed += 2 * 4 * row  # the sum, and a product written in float32
    assert peak <= allowed + 1024


def test_autocast_on_the_device() -> None:
    """float32 weights under CUDA autocast: a bf16 output, float32 gradients."""
    tiled = TiledLinear(64, 96, in_splits=2, out_splits=3, device="cuda")
    x = torch.randn(8, 64, device="cuda", requires_grad=True)

    with torch.autocast("cuda", torch.bfloat16):
        y = tiled(x)
    y.float().square().mean().backward()

    assert y.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == tiled.weight.grad.dtype == torch.float32


def test_the_embedding_on_the_device() -> None:
    """Lookups and gradients are the dense ones; ids are checked there too."""
    torch.manual_seed(0)
    dense = nn.Embedding(23, 6, padding_idx=2, device="cuda")
    tiled = TiledEmbedding.from_embedding(dense, out_splits=5)
    ids = torch.tensor([[0, 22, 5, 2], [7, 7, 11, 2]], device="cuda")

    for layer in (dense, tiled):
        layer(ids).square().sum().backward()

    assert torch.equal(tiled(ids), dense(ids))
    torch.testing.assert_close(tiled.weight.grad, dense.weight.grad)
    with pytest.raises(IndexError):
        tiled(ids + 20)


def test_inputs_on_another_device_are_refused() -> None:
    """A CPU input for tiles on the device is named as such."""
    with pytest.raises(RuntimeError, match="the input is on cpu, the tiles are on cuda"):
        TiledLinear(6, 4, out_splits=2, device="cuda")(torch.randn(2, 6))
