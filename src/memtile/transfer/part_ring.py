"""Who has which part of a ring's slabs: users, readers, writers, or nobody."""

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial, wraps
from itertools import count
from typing import Any, Concatenate, ParamSpec, TypeVar

from memtile.errors import HomeError
from memtile.homes import Allocation, Gates, WorkerThreads, renew_in_child
from memtile.observing import recording
from memtile.observing.recording import WAIT_FOR_SLAB, clock
from memtile.transfer.groups import Group, Key, key_of
from memtile.transfer.prefetching import Prefetching
from memtile.transfer.slabs import Holder, Slab, SlabPart, Slabs, User

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _change(
    method: "Callable[Concatenate[PartRing, _P], _R]",
) -> "Callable[Concatenate[PartRing, _P], _R]":
    """Have only one thread change the ring, and in that thread no callback before it is done."""

    @wraps(method)
    def change(self: "PartRing", /, *args: _P.args, **options: _P.kwargs) -> _R:
        with self._lock:
            before, self._is_changing = self._is_changing, True
            try:
                return method(self, *args, **options)
            finally:
                self._is_changing = before
                if self._abandoned and not before:
                    self._drop_abandoned()

    return change


class PartRing:
    """A fixed number of slabs, each as large as the largest group so far, and their parts.

    The threads read and write; the rings of one home share them.
    """

    def __init__(self, workers: WorkerThreads, slabs: int, least_bytes: int = 0) -> None:
        self._workers = workers
        self._slabs = Slabs(slabs, least_bytes)
        self.last: Slab | None = None  # that was used
        self._clock = count(1)
        self._prefetching = Prefetching(self._slabs)
        self._abandoned: deque[Allocation] = deque()
        self._process = os.getpid()
        self._renew_lock()
        renew_in_child(self, PartRing._renew_lock)

    @property
    def held_bytes(self) -> int:
        """Bytes of memory that the slabs hold now."""
        return sum(slab.memory.numel() for slab in self._slabs)

    @property
    def holders(self) -> list[Holder]:
        """Who holds each slab now."""
        with self._lock:
            return [slab.holder for slab in self._slabs]

    def check_process(self) -> None:
        """HomeError in the child of a fork."""
        if os.getpid() != self._process:
            raise HomeError(
                f"process {os.getpid()} was forked while a tile was worked on, and slabs are empty "
                "in a child: fork between two calls of the model"
            )

    def _renew_lock(self) -> None:
        """Make the lock; again in a forked child, where the thread that held it does not exist.

        What a child finds in a slab is still to be released there.
        """
        self._lock, self._gates = threading.RLock(), Gates()
        self._is_changing = False
        # What is under way keeps it: a bound method would keep the ring alive.
        self._notify = partial(_notify, weakref.ref(self), self._lock)

    def write_home(self, part: SlabPart, allocations: Sequence[tuple[int, Allocation]]) -> None:
        """Start writing these tensors of what was acquired home."""
        self.check_process()
        part.wait_until_written()
        lock, reference = self._lock, weakref.ref(self)

        def wrote() -> None:
            with lock:
                part.discard_written()
                _notify(reference, lock)

        self._store(part, allocations, wrote)

    @_change
    def _store(
        self,
        part: SlabPart,
        allocations: Sequence[tuple[int, Allocation]],
        wrote: Callable[[], None],
    ) -> None:
        part.store(allocations, self._workers, wrote)
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
            if part.writes is None:
                continue
            part.wait_until_written()
            with self._lock:
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
        lock: Any = self._lock  # typeshed has no `_is_owned`, which `threading.Condition` asks
        if lock._is_owned():
            return
        try:
            if lock.acquire(blocking=False):
                self._drop_abandoned()
        finally:  # asked, since what `acquire` says may be lost
            if lock._is_owned():
                lock.release()

    def _drop_abandoned(self) -> None:
        while self._abandoned:
            abandoned = self._abandoned.popleft()
            for part in self._slabs.parts():
                part.abandon(abandoned)
        self._gates.open_all()

    def start(self) -> None:
        """Begin an iteration: write what is unwritten, as `flush`, and discard the rest.

        Nothing is read before its first request, since it may be one of another home.
        """
        self.flush()
        with self._lock:
            self.clear()
            self._prefetching.start()

    @_change
    def clear(self) -> None:
        """Discard everything that was read; what is still to be written stays."""
        self._prefetching.clear()
        for part in self._slabs.parts():
            if part.users:  # emptied when it is released, unless it was stored
                part.is_stale = not part.is_unwritten
            elif not part.is_unwritten:
                part.discard()

    def acquire_parts(
        self,
        user: User,
        groups: Sequence[Group],
        parts: list[SlabPart],
        made: Group,
        *,
        learn: bool,
        is_expert: bool,
    ) -> None:
        """Put a part of a slab for each group into the list, all at once, for this user.

        Two threads that each hold one and wait for another would wait for ever.
        """
        keys = [key_of(group) for group in groups]
        with self._lock:
            self._prefetching.note(keys, learn=learn, are_experts=is_expert)
        while (gate := self._try_to_acquire(user, groups, keys, parts, made)) is not None:
            begun = clock()
            with gate:
                recording.totals.waited_ns += clock() - begun
                if recording.active:
                    recording.add(WAIT_FOR_SLAB, begun, groups[0][0])

    @_change
    def _try_to_acquire(
        self,
        user: User,
        groups: Sequence[Group],
        keys: Sequence[Key],
        parts: list[SlabPart],
        made: Group,
    ) -> "threading.Lock | None":
        """None, or what opens once a user, a reader or a writer has ended."""
        while (places := self._slabs.places(groups, keys)) is None:
            if self._slabs.release_lost():
                continue
            every = self._slabs.parts()
            failed = [part for part in every if part.failed_to_write and not part.users]
            if not failed:
                return self._gates.close_one()
            failed[0].write_again()  # HomeIOError where that fails too
        for (_, part), group in zip(places, groups, strict=True):
            if part.key is not None:
                continue
            if group is made:
                part.claim(group)
            else:
                self._load(part, group)
        for slab, part in places:
            part.users.append(user)
            parts.append(part)
            slab.last_use = next(self._clock)
            self.last = slab
        return None

    @_change
    def fetch_ahead(
        self, ahead: Iterable[Group] | None, experts: Iterable[Group] | None, before: Slab | None
    ) -> None:
        """Start reading what comes after what was acquired; `before` is the slab before that."""
        self._prefetching.begin(ahead, experts, before, self.last, self._load)

    def _load(self, part: SlabPart, group: Group) -> None:
        part.load(group, self._workers, self._notify)

    def note_end(self) -> None:
        """A read or a write has ended, and the lock is held: a slab may have become free.

        Nothing is read inside another change of the ring: what has ended at once calls back in the
        thread that is making the change.
        """
        self._gates.open_all()
        if self._prefetching.is_delayed and not self._is_changing:
            self._resume()

    @_change
    def _resume(self) -> None:
        self._prefetching.resume(self._load)

    @_change
    def release(self, user: User, parts: list[SlabPart], half_changed: bool = False) -> None:
        """Give acquired parts back."""
        for part in parts:
            part.release(user, half_changed)
        self._gates.open_all()


def _notify(reference: "weakref.ref[PartRing]", lock: threading.RLock) -> None:
    """A read or a write has ended: wake threads that wait, and use a slab that became free."""
    with lock:
        ring = reference()
        if ring is not None:
            ring.note_end()
