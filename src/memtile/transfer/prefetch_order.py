"""Which group of tiles is needed after which, learnt while running."""

from collections.abc import Iterator
from typing import Final, Generic, TypeVar

from memtile.transfer.groups import Key

_K = TypeVar("_K", Key, int)

EXPERTS: Final[Key] = ()
"""Stands for all experts of a layer in the prefetch order."""


class PrefetchOrder(Generic[_K]):
    """Which group is needed after which, learnt while running; a group by key, or by number.

    A table (previous, this) → next, updated at every request. A wrong guess costs one wait and
    corrects itself, so training, evaluation, generation and recomputation may alternate.
    """

    def __init__(self) -> None:
        self._next: dict[tuple[_K | None, _K | None], _K] = {}
        self._before: _K | None = None
        self._last: _K | None = None
        self._swept = 0

    def start(self) -> None:
        """An iteration begins: what came before it does not predict what comes."""
        self.interrupt()
        if len(self._next) > 2 * self._swept:  # gradients are new groups in every iteration
            self._next = {pair: key for pair, key in self._next.items() if _is_alive(*pair, key)}
            self._swept = len(self._next)

    def interrupt(self) -> None:
        """What comes now is no part of an order: it neither predicts nor is predicted."""
        self._before = self._last = None

    def note(self, key: _K) -> None:
        """This group was asked for now."""
        self._next[self._before, self._last] = key
        self._before, self._last = self._last, key

    def note_experts(self: "PrefetchOrder[Key]") -> None:
        """Experts were asked for: which ones says nothing of the next iteration, but for where."""
        if self._last != EXPERTS:
            self.note(EXPERTS)

    def ahead(self) -> Iterator[_K]:
        """What was asked for after this the last time, and after that, and so on up to experts."""
        before, last = self._before, self._last
        while following := self._next.get((before, last)):
            yield following
            before, last = last, following


def _is_alive(*keys: Key | int | None) -> bool:
    groups = (key for key in keys if isinstance(key, tuple))
    return all(reference() is not None for group in groups for reference in group)
