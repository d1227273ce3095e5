"""A ring of slabs for the tiles of one home.

A group is one tile, or the few tensors that are used together (a weight, its gradient and its
moments). `acquire` gives a group in memory and starts reading the groups expected next.
"""

import os
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from itertools import chain, count

from memtile.errors import HomeError
from memtile.homes import Allocation, renew_in_child
from memtile.observing import recording
from memtile.observing.recording import (
    SHORTEST_WAIT_NS,
    SLABS,
    WAIT_FOR_READ,
    WAIT_FOR_SLAB,
    clock,
)
from memtile.transfer.leases import Lease, MappedLease, SlabLease
from memtile.transfer.prefetch_order import Group, Key, PrefetchOrder, group_of, key_of, next_keys
from memtile.transfer.slabs import Holder, Slab, SlabPart, Slabs


class SlabRing:
    """A fixed number of slabs, each as large as the largest group so far.

    The executor runs reads and writes; the rings of one home share it.
    """

    def __init__(self, executor: Executor, slabs: int) -> None:
        self._executor = executor
        self._slabs = Slabs(slabs)
        self._last: Slab | None = None  # that was used
        self._clock = count(1)
        self._prefetch_order = PrefetchOrder[Key]()
        self._delayed: list[Key] = []  # to be read as soon as a slab is free
        self._needed: set[Slab] = set()  # that hold some of these
        self._abandoned: deque[Allocation] = deque()
        self._process = os.getpid()
        self._renew_lock()
        renew_in_child(self, SlabRing._renew_lock)

    @property
    def slab_bytes(self) -> int:
        """Bytes of memory that the slabs hold now."""
        return sum(slab.memory.numel() for slab in self._slabs)

    @property
    def holders(self) -> list[Holder]:
        """Who holds each slab now."""
        with self._changing():
            return [slab.holder for slab in self._slabs]

    def acquire(
        self,
        group: Group = (),
        *,
        made: Group = (),
        written: bool = False,
        ahead: Iterable[Group] | None = None,
        experts: Iterable[Group] | None = None,
    ) -> AbstractContextManager[Lease]:
        """The group in memory; its slabs go back to the ring after the block, also after an error.

        Args:
            group: allocations of one home.
            made: allocations whose content is computed in the block, in a slab of their own with
                undefined content. Their tensors come after the group's.
            written: the group may be written to, and stored, in the block.
            ahead: what will be needed next, where the caller knows; by default what was needed
                after this the last time.
            experts: the group is of experts, and so are these, which come next, before what was
                needed the last time after the experts of this layer.

        Raises:
            HomeIOError: it could not be read, or no slab is free since none could be written.
            HomeError: the process was forked inside the block.
        """
        first = (group or made)[:1]
        if first and first[0].home.is_mapped:
            return MappedLease(group, made, written)
        return self._in_slabs(group, made, written, ahead, experts)

    @contextmanager
    def _in_slabs(
        self,
        group: Group,
        made: Group,
        written: bool,
        ahead: Iterable[Group] | None,
        experts: Iterable[Group] | None,
    ) -> Iterator[Lease]:
        groups, parts = [part for part in (group, made) if part], list[SlabPart]()
        try:
            before = self._last
            self._acquire(groups, parts, made, learn=ahead is None, is_expert=experts is not None)
            learnt = self._prefetch_order.ahead() if ahead is None else map(key_of, ahead)
            keys = chain(map(key_of, experts or ()), learnt)
            # No memory for a slab, say: reported when that group itself is asked for.
            with self._changing(), suppress(OSError, MemoryError):
                self._fetch_ahead(keys, before)
            begun = clock()
            for part in parts:
                part.wait_until_read()
                if written:  # otherwise what is half changed when an error comes would go home
                    part.wait_until_written()
            waited = clock() - begun
            recording.totals.waited_ns += waited
            if recording.active and waited > SHORTEST_WAIT_NS:
                recording.add(WAIT_FOR_READ, begun, groups[0][0])
            yield SlabLease(self.write_home, parts, groups)
            self._check_process()
        except BaseException:
            self._release(parts, half_changed=True)
            raise
        else:
            self._release(parts)
            if recording.active and groups:
                recording.add(SLABS, begun, groups[0][0], len(parts))

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise HomeError(
                f"process {os.getpid()} was forked while a tile was worked on, and slabs are empty "
                "in a child: fork between two calls of the model"
            )

    def _renew_lock(self) -> None:
        """Make the lock; again in a forked child, where the thread that held it does not exist.

        What a child finds in a slab is still to be released there.
        """
        self._depth = 0  # of changes that are under way, in the thread that holds the lock
        self._changed = threading.Condition()
        # Futures keep it: a bound method would keep the ring alive.
        self._notify = partial(_notify, weakref.ref(self), self._changed)

    def write_home(self, part: SlabPart, allocations: Sequence[tuple[int, Allocation]]) -> None:
        """Start writing these tensors of what was acquired home."""
        self._check_process()
        part.wait_until_written()
        changed, reference = self._changed, weakref.ref(self)

        def wrote() -> None:
            with changed:
                part.discard_written()
                _notify(reference, changed)

        with self._changing():
            part.store(allocations, self._executor, wrote)
            # Newest values; others that hold these tensors are stale.
            part.is_stale = False
            own = set(part.key or ())
            for other in self._slabs.parts():
                if other is part or other.key is None or own.isdisjoint(other.key):
                    continue
                if other.users:
                    other.is_stale = True
                elif not other.is_unwritten:
                    other.discard()
            part.discard_written()  # where the writers were faster than `store`

    def flush(self) -> None:
        """Return once everything that was stored is at home.

        What could not be written stays in its slab, is tried again, and raises HomeIOError.
        """
        problems = []
        for part in self._slabs.parts():
            part.wait_until_written()
            with self._changing():
                try:
                    if part.failed_to_write and not part.users:
                        part.write_again()
                except OSError as error:
                    problems.append(error)
        if problems:
            raise problems[0]

    def abandon(self, allocation: Allocation) -> None:
        """Hold nothing of an allocation, the only one of its group, that nobody needs any more.

        It is not written any more. Finalizers may call it: where the ring is being changed, in this
        thread or another, the work is left to the end of that.
        """
        if os.getpid() != self._process:
            return
        self._abandoned.append(allocation)
        if self._changed.acquire(blocking=False):
            try:
                with self._changing():
                    self._changed.notify_all()
            finally:
                self._changed.release()

    def start(self) -> None:
        """Begin an iteration: write what is unwritten, as `flush`, and discard the rest.

        Nothing is read before its first request, since it may be one of another home.
        """
        self.flush()
        with self._changing():
            self.clear()
            self._prefetch_order.start()

    def clear(self) -> None:
        """Discard everything that was read; what is still to be written stays."""
        with self._changing():
            self._delayed = []
            for part in self._slabs.parts():
                if part.users:  # emptied when it is released, unless it was stored
                    part.is_stale = not part.is_unwritten
                elif not part.is_unwritten:
                    part.discard()

    def _acquire(
        self,
        groups: Sequence[Group],
        parts: list[SlabPart],
        made: Group,
        learn: bool,
        is_expert: bool,
    ) -> None:
        """Put a part of a slab for each group into the list, all at once.

        Two threads that each hold one and wait for another would wait for ever.
        """
        keys = [key_of(group) for group in groups]
        with self._changing():
            if is_expert:
                self._prefetch_order.note_experts()
            for key in keys if learn and not is_expert else ():
                self._prefetch_order.note(key)
            if not learn:
                self._prefetch_order.interrupt()
            while (places := self._slabs.places(groups, keys)) is None:
                self._wait_for_a_slab(groups[0])
            for (_, part), group in zip(places, groups, strict=True):
                if part.key is not None:
                    continue
                if group is made:
                    part.claim(group)
                else:
                    part.load(group, self._executor, self._notify)
            for slab, part in places:
                part.users += 1
                parts.append(part)  # at once: a Ctrl-C in between would lose the slab
                slab.last_use = next(self._clock)
                self._last = slab

    def _wait_for_a_slab(self, group: Group) -> None:
        """For this group: wait until a user, a reader or a writer has ended.

        A slab that could not be written is written again: HomeIOError where that fails too.
        """
        failed = [part for part in self._slabs.parts() if part.failed_to_write and not part.users]
        if failed:
            failed[0].write_again()
        else:
            depth, self._depth = self._depth, 0  # others change the ring meanwhile
            begun = clock()
            try:
                self._changed.wait()
            finally:
                self._depth = depth
            recording.totals.waited_ns += clock() - begun
            if recording.active:
                recording.add(WAIT_FOR_SLAB, begun, group[0])

    def _fetch_ahead(self, keys: Iterator[Key], before: Slab | None) -> None:
        """Start reading what comes next, as much as the slabs hold that are not in use.

        Nothing becomes free before all parts of a slab were used: in between is nothing to do.
        """
        first = next(keys, None)
        if first is None:
            self._delayed = []
            return
        if self._last is before and (found := self._slabs.find(first)) and found[0] is before:
            return
        window = next_keys(chain((first,), keys), len(self._slabs) - 1, self._slabs.largest)
        self._fetch(window, set() if self._last is None else {self._last})

    def _fetch(self, window: list[Key], needed: set[Slab]) -> None:
        """Start reading these, in slabs that hold none of them and are not needed."""
        self._delayed, missing = [], list[Key]()
        for key in window:
            place = self._slabs.find(key)
            if place is None:
                missing.append(key)
            else:
                needed.add(place[0])
        for key in missing:
            group = group_of(key)
            if group is None:
                continue
            place = self._slabs.room_for(group, needed)
            if place is None:
                self._delayed, self._needed = window, needed
                return
            needed.add(place[0])
            place[1].load(group, self._executor, self._notify)

    def fetch_delayed(self) -> None:
        """Start reading what there was no slab for.

        Not inside another change of the ring: a future that is already done calls back at once, in
        the thread that is making the change.
        """
        with self._changing():
            if self._delayed and self._depth == 1:
                for slab in self._slabs:
                    if slab not in self._needed and slab.is_free:
                        self._fetch(self._delayed, set())
                        break

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Inside, only this thread changes the ring."""
        with self._changed:
            self._depth += 1
            try:
                yield
            finally:
                while self._abandoned and self._depth == 1:
                    abandoned = self._abandoned.popleft()
                    for part in self._slabs.parts():
                        part.abandon(abandoned)
                self._depth -= 1

    def _release(self, parts: Sequence[SlabPart], half_changed: bool = False) -> None:
        with self._changing():
            for part in parts:
                part.users -= 1
                if half_changed:
                    part.is_stale = not part.is_unwritten
                if part.is_stale and not part.users and not part.is_unwritten:
                    part.discard()
            self._changed.notify_all()


def _notify(reference: "weakref.ref[SlabRing]", changed: threading.Condition) -> None:
    """A read or a write has ended: wake threads that wait, and use a slab that became idle."""
    with changed:
        changed.notify_all()
        ring = reference()
        if ring is not None:
            ring.fetch_delayed()
