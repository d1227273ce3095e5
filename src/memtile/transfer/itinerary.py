"""The itinerary: which cargo is needed after which, learnt while running.

A table (previous, this) → next, updated at every request. A wrong guess costs one wait and corrects
itself, so training, evaluation, generation and recomputation may alternate.
"""

import weakref
from collections.abc import Iterator, Sequence

from memtile.homes import Berth

Key = tuple["weakref.ref[Berth]", ...]


def key_of(cargo: Sequence[Berth]) -> Key:
    """What tells a cargo from others without keeping it alive."""
    key = tuple(weakref.ref(berth) for berth in cargo)
    hash(key)  # kept by the references, which can be asked for it no more once the berths are gone
    return key


def cargo_of(key: Key) -> tuple[Berth, ...] | None:
    """The berths of a key; None once one of them is gone."""
    berths = [reference() for reference in key]
    found = tuple(berth for berth in berths if berth is not None)
    return found if len(found) == len(berths) else None


def _is_alive(*keys: Key | None) -> bool:
    return all(reference() is not None for key in keys if key is not None for reference in key)


class Itinerary:
    """The order in which cargoes were asked for, as transitions between pairs of them."""

    def __init__(self) -> None:
        self._next: dict[tuple[Key | None, Key | None], Key] = {}
        self._before: Key | None = None
        self._last: Key | None = None
        self._swept = 0

    def start(self) -> None:
        """A pass begins: what came before it tells nothing of what comes."""
        self._before = self._last = None
        if len(self._next) > 2 * self._swept:  # gradients are new cargoes in every pass
            self._next = {pair: key for pair, key in self._next.items() if _is_alive(*pair, key)}
            self._swept = len(self._next)

    def note(self, key: Key) -> None:
        """This cargo was asked for now."""
        self._next[self._before, self._last] = key
        self._before, self._last = self._last, key

    def ahead(self) -> Iterator[Key]:
        """What was asked for after this the last time, and after that, and so on."""
        before, last = self._before, self._last
        while (following := self._next.get((before, last))) is not None:
            yield following
            before, last = last, following
