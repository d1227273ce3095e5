"""What a ring reads before it is asked for: as much as its slabs hold that are not in use."""

import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice
from typing import Final

from memtile.transfer.groups import Group, Key, group_of, key_of, nbytes_of
from memtile.transfer.prefetch_order import PrefetchOrder
from memtile.transfer.slabs import Slab, SlabPart, Slabs

_MOST: Final = 64  # groups that are looked for ahead, however small
_IN_A_ROW: Final = 3  # requests of a thread: with fewer it takes turns with another


Load = Callable[[SlabPart, Group], None]
"""Starts reading a group into a part of a slab."""


class _Turns:
    """Whether threads take turns to ask for groups, or one asks for many before another does.

    The latter is what autograd's thread of a device does: it goes on where the forward ended.
    """

    def __init__(self) -> None:
        self.are_short = False
        self._thread, self._length = threading.get_ident(), _IN_A_ROW

    def note(self) -> bool:
        """This thread asks now; whether turns are short."""
        thread = threading.get_ident()
        if thread != self._thread:
            self.are_short = self._length < _IN_A_ROW
            self._thread, self._length = thread, 0
        self._length += 1
        self.are_short &= self._length < _IN_A_ROW
        return self.are_short


class Prefetching:
    """Starts reading what comes next, into these slabs. Their ring's lock guards every call."""

    def __init__(self, slabs: Slabs) -> None:
        self._slabs = slabs
        self._order = PrefetchOrder[Key]()
        self._delayed: list[Key] = []  # to be read as soon as a slab is free
        self._needed: set[Slab] = set()  # that hold some of these
        self._turns = _Turns()

    @property
    def is_delayed(self) -> bool:
        """Whether there is something to be read as soon as a slab is free."""
        return bool(self._delayed)

    def start(self) -> None:
        """An iteration begins, and another order with it."""
        self._turns = _Turns()
        self._order.start()

    def clear(self) -> None:
        """Read nothing of what was delayed."""
        self._delayed = []

    def note(self, keys: Sequence[Key], *, learn: bool, are_experts: bool) -> None:
        """These groups were asked for now; not to `learn`: they are no part of an order."""
        learn = not self._turns.note() and learn
        if are_experts:
            self._order.note_experts()
        for key in keys if learn and not are_experts else ():
            self._order.note(key)
        if not learn:
            self._order.interrupt()

    def begin(
        self,
        ahead: Iterable[Group] | None,
        experts: Iterable[Group] | None,
        before: Slab | None,
        last: Slab | None,
        load: Load,
    ) -> None:
        """Start reading what comes next: the experts, and then what is `ahead`, or was learnt.

        Nothing while threads take turns: they use all slabs, and what one of them read ahead would
        make room for what another needs before it is used, to be read again.
        Nothing becomes free until all parts of a slab were used, that is, until another one than
        `before` was used `last`, or is to be used next.
        """
        if self._turns.are_short:
            self._delayed = []
            return
        learnt = self._order.ahead() if ahead is None else map(key_of, ahead)
        keys = chain(map(key_of, experts or ()), learnt)
        first = next(keys, None)
        if first is None:
            self._delayed = []
            return
        if last is before and (found := self._slabs.find(first)) and found[0] is before:
            return
        window = self._window(chain((first,), keys))
        self._fetch(window, set() if last is None else {last}, load)

    def resume(self, load: Load) -> None:
        """A slab may have become free for what was delayed."""
        for slab in self._slabs:
            if slab not in self._needed and slab.is_free:
                groups = ((key, group_of(key)) for key in self._delayed)
                found: dict[Key, Group] = {key: group for key, group in groups if group is not None}
                self._fetch(found, set(), load)
                break

    def _window(self, keys: Iterable[Key]) -> dict[Key, Group]:
        """The first of these that all slabs but one hold."""
        found, size, largest = dict[Key, Group](), 0, self._slabs.nbytes
        seen = set[object]()  # the parts of a group come with it
        for key in islice(keys, _MOST):
            group = group_of(key)
            if group is None or key in found:
                continue
            nbytes = nbytes_of(group)
            size, largest = size + nbytes, max(largest, nbytes)
            if size > largest * (len(self._slabs) - 1):
                break
            if not seen.issuperset(key):
                found[key] = group
                seen.update(key)
        return found

    def _fetch(self, window: dict[Key, Group], needed: set[Slab], load: Load) -> None:
        """Start reading these, in slabs that hold none of them and are not needed."""
        self._delayed, missing = [], list[Group]()
        for key, group in window.items():
            place = self._slabs.find(key)
            if place is None:
                missing.append(group)
            else:
                needed.add(place[0])
        for group in missing:
            place = self._slabs.room_for(group, needed)
            if place is None:
                self._delayed, self._needed = list(window), needed
                return
            needed.add(place[0])
            load(place[1], group)
