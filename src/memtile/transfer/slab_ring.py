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
from itertools import chain, count, islice

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
from memtile.transfer.prefetch_order import PrefetchOrder
from memtile.transfer.slabs import Group, Holder, Key, Slab, group_of, key_of


class SlabRing:
    """A fixed number of slabs, each as large as the largest group that it ever held.

    The executor runs reads and writes; the rings of one home share it.
    """

    def __init__(self, executor: Executor, slabs: int) -> None:
        self._executor = executor
        self._slabs = [Slab() for _ in range(slabs)]
        self._last_use: dict[Slab, int] = dict.fromkeys(self._slabs, 0)
        self._clock = count(1)
        self._prefetch_order = PrefetchOrder[Key]()
        self._delayed: list[Key] = []  # to be read as soon as a slab is idle
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
        return self._in_slabs(group, made, ahead, experts)

    @contextmanager
    def _in_slabs(
        self,
        group: Group,
        made: Group,
        ahead: Iterable[Group] | None,
        experts: Iterable[Group] | None,
    ) -> Iterator[Lease]:
        groups, slabs = [part for part in (group, made) if part], list[Slab]()
        try:
            self._acquire(groups, slabs, made, learn=ahead is None, is_expert=experts is not None)
            learnt = self._prefetch_order.ahead() if ahead is None else map(key_of, ahead)
            keys = chain(map(key_of, experts or ()), learnt)
            # No memory for a slab, say: reported when that group itself is asked for.
            with self._changing(), suppress(OSError, MemoryError):
                self._fetch(islice(keys, len(self._slabs) - 1), {key_of(part) for part in groups})
            begun = clock()
            for slab in slabs:
                slab.wait_until_read()
            waited = clock() - begun
            recording.totals.waited_ns += waited
            if recording.active and waited > SHORTEST_WAIT_NS:
                recording.add(WAIT_FOR_READ, begun, groups[0][0])
            yield SlabLease(self.write_home, slabs, groups)
            self._check_process()
        except BaseException:
            self._release(slabs, half_changed=True)
            raise
        else:
            self._release(slabs)
            if recording.active and groups:
                recording.add(SLABS, begun, groups[0][0], len(slabs))

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

    def write_home(self, slab: Slab, allocations: Sequence[tuple[int, Allocation]]) -> None:
        """Start writing these tensors of an acquired slab home."""
        self._check_process()
        slab.wait_until_written()
        changed, reference = self._changed, weakref.ref(self)

        def wrote() -> None:
            with changed:
                slab.discard_written()
                _notify(reference, changed)

        with self._changing():
            slab.store(allocations, self._executor, wrote)
            # Newest values; other slabs that hold these tensors are stale.
            slab.is_stale = False
            for other in self._slabs:
                if other is not slab and not set(other.key or ()).isdisjoint(slab.key or ()):
                    if other.users:
                        other.is_stale = True
                    elif not other.is_unwritten:
                        other.discard()
            slab.discard_written()  # where the writers were faster than `store`

    def flush(self) -> None:
        """Return once everything that was stored is at home.

        What could not be written stays in its slab, is tried again, and raises HomeIOError.
        """
        problems = []
        for slab in self._slabs:
            slab.wait_until_written()
            with self._changing():
                try:
                    if slab.failed_to_write and not slab.users:
                        slab.write_again()
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
            for slab in self._slabs:
                if slab.users:  # emptied when it is released, unless it was stored
                    slab.is_stale = not slab.is_unwritten
                elif not slab.is_unwritten:
                    slab.discard()

    def _acquire(
        self,
        groups: Sequence[Group],
        slabs: list[Slab],
        made: Group,
        learn: bool,
        is_expert: bool,
    ) -> None:
        """Put a slab for each group into the list, all at once.

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
            while (chosen := self._choose(keys)) is None:
                self._wait_for_a_slab(groups[0])
            for slab, key, group in zip(chosen, keys, groups, strict=True):
                if self._holding(key) is slab:
                    continue
                if group is made:
                    slab.claim(group)
                else:
                    slab.load(group, self._executor, self._notify)
            for slab in chosen:
                slab.users += 1
                slabs.append(slab)  # at once: a Ctrl-C in between would lose the slab
                self._last_use[slab] = next(self._clock)

    def _choose(self, keys: Sequence[Key]) -> list[Slab] | None:
        """For each key the slab that holds it, or one that may be overwritten; None: too few."""
        chosen: list[Slab] = []
        for key in keys:  # no slab holds what is made now, and it comes last
            slab = self._holding(key) or self._idle(set(keys), chosen)
            if slab is None:
                return None
            chosen.append(slab)
        return chosen

    def _wait_for_a_slab(self, group: Group) -> None:
        """For this group: wait until a user, a reader or a writer has ended.

        A slab that could not be written is written again: HomeIOError where that fails too.
        """
        failed = [slab for slab in self._slabs if slab.failed_to_write and not slab.users]
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

    def _fetch(self, keys: Iterable[Key], protected: set[Key]) -> None:
        """Start reading these, as far as slabs are idle that hold none of them."""
        wanted, self._delayed = list(keys), []
        protected = protected.union(wanted)
        for key in wanted:
            group = group_of(key)
            if group is None or self._holding(key) is not None:
                continue
            slab = self._idle(protected)
            if slab is None or slab.key in protected:
                self._delayed = wanted
                return
            slab.load(group, self._executor, self._notify)

    def fetch_delayed(self) -> None:
        """Start reading what there was no slab for.

        Not inside another change of the ring: a future that is already done calls back at once, in
        the thread that is making the change.
        """
        with self._changing():
            if self._delayed and self._depth == 1:
                self._fetch(self._delayed, set())

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
                    for slab in self._slabs:
                        slab.abandon(abandoned)
                self._depth -= 1

    def _holding(self, key: Key) -> Slab | None:
        """The slab that holds the group, alone or among others that were read with it."""
        good = (s for s in self._slabs if s.holds(key) and not s.is_stale and not s.failed_to_read)
        return next(good, None)

    def _idle(self, protected: set[Key], taken: Sequence[Slab] = ()) -> Slab | None:
        """A slab that may be overwritten: an empty one, one not needed soon, the oldest."""
        idle = (Holder.NOBODY, Holder.IDLE)
        free = [slab for slab in self._slabs if slab not in taken and slab.holder in idle]

        def cost(slab: Slab) -> tuple[bool, bool, int]:
            return slab.key is not None, slab.key in protected, self._last_use[slab]

        return min(free, key=cost, default=None)

    def _release(self, slabs: Sequence[Slab], half_changed: bool = False) -> None:
        with self._changing():
            for slab in slabs:
                slab.users -= 1
                if half_changed:
                    slab.is_stale = not slab.is_unwritten
                if slab.is_stale and not slab.users and not slab.is_unwritten:
                    slab.discard()
            self._changed.notify_all()


def _notify(reference: "weakref.ref[SlabRing]", changed: threading.Condition) -> None:
    """A read or a write has ended: wake threads that wait, and use a slab that became idle."""
    with changed:
        changed.notify_all()
        ring = reference()
        if ring is not None:
            ring.fetch_delayed()
