"""The one way to whole tile values: copying, reading, resetting, loading and saving go through it.

Resident tiles are whole already. An engine that shards them over ranks registers a gatherer, which
makes the parameters whole inside the context and, where they were written, keeps what rank 0 wrote.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

from torch import nn

Gatherer = Callable[[Sequence[nn.Parameter], bool], AbstractContextManager[None]]

_gatherers: list[Gatherer] = []


def register_gatherer(gatherer: Gatherer) -> Callable[[], None]:
    """Let an engine make parameters whole wherever memtile touches their values.

    Args:
        gatherer: called with the parameters and whether they will be written; gives a context.

    Returns:
        A function that takes the gatherer away again.
    """
    _gatherers.append(gatherer)
    return lambda: _gatherers.remove(gatherer)


@contextmanager
def gathered(parameters: Sequence[nn.Parameter], *, write: bool = False) -> Iterator[None]:
    """Inside, the parameters hold their whole values; with `write`, what is written is kept."""
    with ExitStack() as stack:
        for gatherer in _gatherers:
            stack.enter_context(gatherer(parameters, write))
        yield
