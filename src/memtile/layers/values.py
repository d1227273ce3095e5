"""Reads and writes the values of a weight or bias, in any grid and under any engine.

A bias (out_features,) is treated as a weight with one column, so that both are read by rectangles.

All code that copies, reads, resets, loads or saves values of tiles does so inside `gathered`. Tiles
of one process are whole already. An engine that shards them over ranks registers a gatherer, which
makes the parameters whole inside the context and, where they were written, keeps what rank 0 wrote.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memtile.errors import StateDictError, TileShapeError
from memtile.geometry import Grid, Rect, Span
from memtile.homes import evict
from memtile.transfer import catch_up

Index = tuple[int, int]
DENSE_NAMES = ("weight", "bias")
Gatherer = Callable[[Sequence[nn.Parameter], bool], AbstractContextManager[bool | None]]
ShapeOf = Callable[[Tensor], tuple[int, ...] | None]


def _no_shape(tensor: Tensor) -> None:
    """The `shape_of` of an engine whose parameters have their whole shape."""


class _Engine(NamedTuple):
    gather: Gatherer
    shape_of: ShapeOf
    library: str


_engines: list[_Engine] = []


def register_gatherer(
    gatherer: Gatherer, shape_of: ShapeOf = _no_shape, library: str = "torch"
) -> Callable[[], None]:
    """Let an engine make parameters whole wherever memtile touches their values.

    Args:
        gatherer: called with the parameters and whether they will be written; gives a context, and
            from it False where what this rank writes is dropped for another rank's.
        shape_of: the whole shape of a parameter that the engine stores in another shape, else None.
        library: the engine's; it is asked only in processes that have imported it.

    Returns:
        A function that takes the gatherer away again.
    """
    engine = _Engine(gatherer, shape_of, library)
    _engines.append(engine)
    return lambda: _engines.remove(engine)


def _running_engines() -> list[_Engine]:
    return [engine for engine in _engines if engine.library in sys.modules]


@contextmanager
def gathered(parameters: Sequence[nn.Parameter], *, write: bool = False) -> Iterator[bool]:
    """Inside, the parameters hold their whole values; with `write`, what is written is kept.

    Gives whether what this rank writes is kept: other ranks need not have the values.
    """
    catch_up(parameters)
    try:
        with ExitStack() as stack:
            contexts = [engine.gather(parameters, write) for engine in _running_engines()]
            yield False not in [stack.enter_context(context) for context in contexts]
    finally:
        for parameter in parameters:
            evict(parameter)


def is_shard(tensor: Tensor) -> bool:
    """Whether an engine has the tensor: torch's `DTensor`, or an engine's own, gathered or not."""
    return hasattr(tensor, "device_mesh") or _shape_of_engine(tensor) is not None


def groups_of(tensors: Iterable[Tensor]) -> list[Any]:
    """The groups of ranks (`ProcessGroup`s) that the shards among the tensors are spread over."""
    found: dict[int, Any] = {}
    for tensor in tensors:
        mesh = getattr(tensor, "device_mesh", None)
        alone = getattr(tensor, "ds_process_group", None)
        groups = [alone] if mesh is None else mesh.get_all_groups()
        found |= {id(group): group for group in groups if group is not None}
    return list(found.values())


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape that a tensor has when it is gathered."""
    shape = _shape_of_engine(tensor)
    return tuple(tensor.shape) if shape is None else shape


def _shape_of_engine(tensor: Tensor) -> tuple[int, ...] | None:
    """The whole shape that an engine gives for the tensor; None where none has it."""
    shapes = (engine.shape_of(tensor) for engine in _running_engines())
    return next((shape for shape in shapes if shape is not None), None)


@dataclass(frozen=True)
class Values:
    """The tensors of one weight or bias, and the grid that they stand in."""

    grid: Grid
    tensors: Mapping[Index, Tensor]  # gathered one by one, when they are read

    @classmethod
    def dense(cls, tensor: Tensor) -> "Values":
        """The values of one dense weight (out, in) or bias (out,)."""
        matrix = as_matrix(tensor.detach())
        return cls(Grid((0, matrix.shape[0]), (0, matrix.shape[1])), {(0, 0): matrix})

    @classmethod
    def tiles(cls, tensors: Mapping[Index, Tensor]) -> "Values":
        """The values of tiles, of one dtype; their spans are read from their shapes."""
        dtypes = sorted({str(tensor.dtype) for tensor in tensors.values()})
        if len(dtypes) > 1:
            raise StateDictError(
                f"the tiles have different dtypes ({', '.join(dtypes)}); save them in one"
            )
        shapes = {index: (*whole_shape(tensor), 1) for index, tensor in tensors.items()}
        return cls(
            Grid.of_shapes({i: (shape[0], shape[1]) for i, shape in shapes.items()}), tensors
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the whole."""
        return self.grid.out_features, self.grid.in_features

    def write_to(self, target: Tensor, rect: Rect, *, kept: bool = True) -> None:
        """Copy the values inside `rect` into `target`, in place, converting dtype and device.

        Without `kept` they are only gathered, since all ranks must, and nothing is written.
        """
        matrix = as_matrix(target)
        for place, part in self._pieces(rect):
            if kept:
                matrix[place.index].copy_(part)

    def _pieces(self, rect: Rect) -> Iterator[tuple[Rect, Tensor]]:
        """(rectangle within `rect`, values) of each tensor; one is gathered at a time."""
        for index, shared in self.grid.overlapping(rect):
            tensor = self.tensors[index]
            with gathered([tensor] if isinstance(tensor, nn.Parameter) else []):
                part = as_matrix(tensor.detach())[shared.since(self.grid.rect(*index)).index]
                yield shared.since(rect), part

    def copy_of(self, rect: Rect, like: Tensor) -> Tensor:
        """A new tensor with the values inside `rect`, in the source's dtype and on its device."""
        first = next(iter(self.tensors.values()))
        tensor = torch.empty(like.shape, dtype=first.dtype, device=first.device)
        self.write_to(tensor, rect)
        return tensor


def as_matrix(tensor: Tensor) -> Tensor:
    """A weight as it is; a bias as a matrix with one column, sharing memory."""
    return tensor.unsqueeze(1) if tensor.dim() == 1 else tensor


def bias_rect(rows: Span) -> Rect:
    """The rectangle of a bias that covers these rows."""
    return Rect(rows, Span(0, 1))


def dense_copy(parameters: Mapping[Index, nn.Parameter], shape: tuple[int, ...]) -> Tensor:
    """The dense tensor that the tiles' parameters make: differentiable where gradients are on.

    TileShapeError where they add up to another shape (tensor-parallel shards, say).
    """
    if torch.compiler.is_compiling():  # cannot trace engines or the writes below
        return _cat(parameters)
    values = Values.tiles(parameters)
    if values.shape != (shape if len(shape) == 2 else (*shape, 1)):
        raise TileShapeError(
            f"the tiles hold {values.shape}, not the whole {shape}: they are shards of a "
            "parallel linear; read each tile's own weight instead"
        )
    if torch.is_grad_enabled() and any(p.requires_grad for p in parameters.values()):
        with gathered(list(parameters.values())):
            return _cat(parameters)
    first = next(iter(parameters.values()))
    out = torch.empty(shape, dtype=first.dtype, device=first.device)
    values.write_to(out, Rect(Span(0, values.shape[0]), Span(0, values.shape[1])))
    return out


def _cat(parameters: Mapping[Index, Tensor]) -> Tensor:
    rows: dict[int, list[Tensor]] = {}
    for (row, _), tile in parameters.items():  # row by row
        rows.setdefault(row, []).append(tile)
    return torch.cat(
        [tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=-1) for tiles in rows.values()]
    )
