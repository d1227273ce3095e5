"""Groups of tensors that are moved together, and which is needed after which."""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Final, Generic, TypeVar

from memtile.homes import Allocation

Group = Sequence[Allocation]
Key = tuple["weakref.ref[Allocation]", ...]

_MOST: Final = 64  # groups that are looked for ahead, however small


def key_of(group: Group) -> Key:
    """What tells a group from others without keeping it alive."""
    key = tuple(weakref.ref(allocation) for allocation in group)
    hash(key)  # the references keep it: they cannot compute it once the allocations are gone
    return key


def group_of(key: Key) -> tuple[Allocation, ...] | None:
    """The allocations of a key; None once one of them is gone."""
    found = []
    for reference in key:
        allocation = reference()
        if allocation is None:
            return None
        found.append(allocation)
    return tuple(found)


def nbytes_of(group: Group) -> int:
    """Bytes of a slab that it takes."""
    nbytes = 0
    for allocation in group:
        nbytes += allocation.room
    return nbytes


def next_keys(keys: Iterable[Key], slabs: int, slab_bytes: int) -> list[Key]:
    """The first of these that so many slabs hold; a slab is as large as the largest group."""
    found, size = list[Key](), 0
    for key in islice(keys, _MOST):
        group = group_of(key)
        if group is None or key in found:
            continue
        nbytes = nbytes_of(group)
        size, slab_bytes = size + nbytes, max(slab_bytes, nbytes)
        if size > slab_bytes * slabs:
            break
        found.append(key)
    return found


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
