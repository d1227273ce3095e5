"""The one way to whole tile values: copying, reading, resetting, loading and saving go through it.

Resident tiles are whole already. An engine that shards them over ranks registers a gatherer, which
makes the parameters whole inside the context and, where they were written, keeps what rank 0 wrote.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

from torch import Tensor, nn

Gatherer = Callable[[Sequence[nn.Parameter], bool], AbstractContextManager[bool | None]]
ShapeOf = Callable[[Tensor], tuple[int, ...] | None]

_gatherers: list[tuple[Gatherer, ShapeOf | None]] = []


def register_gatherer(gatherer: Gatherer, shape_of: ShapeOf | None = None) -> Callable[[], None]:
    """Let an engine make parameters whole wherever memtile touches their values.

    Args:
        gatherer: called with the parameters and whether they will be written; gives a context, and
            from it False where what this rank writes is dropped for another rank's.
        shape_of: the whole shape of a parameter that the engine keeps in another; None: not its.

    Returns:
        A function that takes the gatherer away again.
    """
    entry = (gatherer, shape_of)
    _gatherers.append(entry)
    return lambda: _gatherers.remove(entry)


@contextmanager
def gathered(parameters: Sequence[nn.Parameter], *, write: bool = False) -> Iterator[bool]:
    """Inside, the parameters hold their whole values; with `write`, what is written is kept.

    Gives whether it is this rank's writing that is kept: no other needs to have the values.
    """
    with ExitStack() as stack:
        answers = [stack.enter_context(gatherer(parameters, write)) for gatherer, _ in _gatherers]
        yield False not in answers


def is_shard(tensor: Tensor) -> bool:
    """Whether an engine has the tensor: torch's `DTensor`, or an engine's own, gathered or not."""
    return hasattr(tensor, "device_mesh") or any(
        shape_of is not None and shape_of(tensor) is not None for _, shape_of in _gatherers
    )


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape that a tensor has when it is gathered."""
    for _, shape_of in _gatherers:
        shape = None if shape_of is None else shape_of(tensor)
        if shape is not None:
            return shape
    return tuple(tensor.shape)
