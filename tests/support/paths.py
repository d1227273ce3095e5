"""The three walks over a grid: each can be forced on a layer, and read off a result's graph."""

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from memtile import TiledLinear

PATHS = ("fused", "composed", "traceable")

# (out_splits, in_splits): one tile, one row, one column, and a ragged grid of both.
GRIDS = [(1, 1), (1, 3), (4, 1), (3, 2)]


class ByHooks(TiledLinear):
    """A subclass as users of the original wrote them: one point is overridden."""

    def _combine_output_splits(self, outputs: Sequence[Tensor]) -> Tensor:
        return super()._combine_output_splits(outputs)


def nothing(*args: object) -> None:
    """A hook that changes nothing."""


def on_path(path: str, layer: TiledLinear) -> TiledLinear:
    """The layer itself, made to take the given path from now on."""
    if path == "composed":
        for _, tile in layer.tiles():
            tile.register_forward_hook(nothing)
    if path == "traceable":
        layer.__class__ = ByHooks
    return layer


def nodes_of(*outputs: Tensor) -> list[str]:
    """The names of all nodes in the graph of the outputs, sorted, leaves left out."""
    seen, waiting = set(), [output.grad_fn for output in outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions)
    return sorted(node.name() for node in seen if "AccumulateGrad" not in node.name())


def path_of(*outputs: Tensor) -> str:
    """Which path gave these outputs of a grid with more than one tile."""
    names = nodes_of(*outputs)
    if "_FusedLinearBackward" in names:
        return "fused"
    return "composed" if "_PlaceBackward" in names else "traceable"


def grid_id(grid: tuple[int, int]) -> str:
    """How a grid is written in the names of tests."""
    return f"{grid[0]}x{grid[1]}"


def pair(
    grid: tuple[int, int],
    shape: tuple[int, int] = (13, 11),
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    seed: int = 0,
    **options: bool,
) -> tuple[nn.Linear, TiledLinear]:
    """A seeded dense linear of shape (in, out), and its tiled form."""
    torch.manual_seed(seed)
    dense = nn.Linear(*shape, bias=bias, dtype=dtype)
    return dense, TiledLinear.from_linear(dense, in_splits=grid[1], out_splits=grid[0], **options)


def dense_gradients(layer: TiledLinear) -> Iterator[Tensor | None]:
    """The gradients of the weight and of the bias, in their dense shapes."""
    yield layer.weight.grad
    if layer.bias is not None:
        yield layer.bias.grad


def assert_same(ours: Tensor | None, theirs: Tensor | None) -> None:
    """Equal to within the rounding of float64: any real difference is far larger."""
    assert ours is not None
    assert theirs is not None
    assert (ours - theirs).norm() <= 1e3 * torch.finfo(torch.float64).eps * theirs.norm()


def shuffled(items: Sequence[object], seed: int) -> list[object]:
    """The items in another order, always the same for one seed."""
    return random.Random(seed).sample(list(items), len(items))
