"""Slabs: a fixed number of buffers for tiles, filled and written while others are worked on."""

import enum
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from concurrent.futures import wait as wait_for

import torch
from torch import Tensor

from memtile.homes import Allocation, aligned_buffer
from memtile.observing import recording
from memtile.observing.recording import SHORTEST_WAIT_NS, WAIT_FOR_WRITE, clock

Group = Sequence[Allocation]
Key = tuple["weakref.ref[Allocation]", ...]


def key_of(group: Group) -> Key:
    """What tells a group from others without keeping it alive."""
    key = tuple(weakref.ref(allocation) for allocation in group)
    hash(key)  # the references keep it: they cannot compute it once the allocations are gone
    return key


def group_of(key: Key) -> tuple[Allocation, ...] | None:
    """The allocations of a key; None once one of them is gone."""
    allocations = [reference() for reference in key]
    found = tuple(allocation for allocation in allocations if allocation is not None)
    return found if len(found) == len(allocations) else None


class Holder(enum.Enum):
    """Who holds the memory of a slab."""

    NOBODY = "it may be filled with anything"
    READERS = "it is being filled"
    IDLE = "it holds tiles that are not in use"
    WORKERS = "its tiles are in use"
    WRITERS = "it is being written home, or could not be: until then it has the only newest values"


class Slab:
    """One buffer, and what it holds. Its ring's lock guards every change of `key` and `users`."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.key: Key | None = None
        self.tensors: list[Tensor] = []
        self.users = 0
        self.is_stale = False  # what it holds must not be used again
        self._rooms: list[Tensor] = []  # the bytes of each tensor, whole pages
        self._kinds: tuple[tuple[int, torch.dtype, torch.Size], ...] = ()  # of the tensors
        self._reads: list[Future[None]] = []
        self._writes: list[Future[None]] = []
        self._unwritten: list[tuple[Allocation, Tensor]] = []

    @property
    def holder(self) -> Holder:
        """Who holds its memory now."""
        if self.users:
            return Holder.WORKERS
        if self.is_unwritten:
            return Holder.WRITERS
        if not all(read.done() for read in self._reads):
            return Holder.READERS
        return Holder.NOBODY if self.key is None else Holder.IDLE

    def holds(self, key: Key) -> bool:
        """Whether all of a group are in it, perhaps among others."""
        return self.key is not None and (self.key == key or set(key) <= set(self.key))

    def number_of(self, allocation: Allocation) -> int:
        """Which of its tensors is that of an allocation that it holds."""
        assert self.key is not None
        return self.key.index(weakref.ref(allocation))

    @property
    def is_unwritten(self) -> bool:
        """Whether it holds what its home does not have yet."""
        self.discard_written()
        return bool(self._unwritten)

    def discard_written(self) -> None:
        """Drop the references to allocations, and so to their home, where all of it is written."""
        if self._unwritten and all(_succeeded(write) for write in self._writes):
            self._unwritten, self._writes = [], []

    @property
    def failed_to_read(self) -> bool:
        """Whether a read of its content ended with an error."""
        # To ask a future takes three locks: those that have succeeded are not asked again.
        self._reads = [read for read in self._reads if not _succeeded(read)]
        return any(read.done() and not _succeeded(read) for read in self._reads)

    @property
    def failed_to_write(self) -> bool:
        """Whether its writers have ended and it holds what its home does not have."""
        return self.is_unwritten and all(write.done() for write in self._writes)

    def load(self, group: Group, executor: Executor, notify: Callable[[], None]) -> None:
        """Take a group in; its readers start now."""
        self.claim(group)
        try:
            rooms = list(zip(group, self._rooms, strict=True))
            _start(executor, notify, rooms, writes=False, started=self._reads)
        except BaseException:
            self.key = None  # otherwise it would count as read
            raise

    def claim(self, group: Group) -> None:
        """Take a group in whose content is still to be computed; no reader is at work."""
        self.key, self.is_stale = None, False
        self._reads = []
        needed = sum(allocation.room for allocation in group)
        if self.memory.numel() < needed:
            self.tensors, self._rooms, self._kinds = [], [], ()
            self.memory = torch.empty(0, dtype=torch.uint8)  # free the old before the new is made
            self.memory = aligned_buffer(needed)
        kinds = tuple((each.room, each.dtype, each.shape) for each in group)
        if kinds != self._kinds:  # to make tensors takes longer than to start a read
            with torch.inference_mode(False):  # a step may write to them later
                rooms = list(self.memory[:needed].split([room for room, _, _ in kinds]))
                tensors = [
                    room[: allocation.nbytes].view(allocation.dtype).view(allocation.shape)
                    for room, allocation in zip(rooms, group, strict=True)
                ]
            self.tensors, self._rooms, self._kinds = tensors, rooms, kinds
        self.key = key_of(group)

    def discard(self) -> None:
        """Hold nothing; the memory stays with readers that are at work until they have ended."""
        self.key = None
        # An error keeps its traceback, and so the allocation and its home, alive.
        self._reads = [read for read in self._reads if not read.done()]

    def abandon(self, allocation: Allocation) -> None:
        """Hold nothing of an allocation that nobody needs any more, nor write it.

        A writer that is at work ends in room that is not free before.
        """
        if any(each is allocation for each, _ in self._unwritten):
            writes, self._unwritten, self._writes = self._writes, [], []
            for write in writes:
                write.cancel()
        if self.key == key_of((allocation,)) and not self.users:
            self.discard()

    def wait_until_read(self) -> None:
        """Return once the content is there; HomeIOError where a read failed."""
        for read in self._reads:
            read.result()

    def store(
        self,
        allocations: Sequence[tuple[int, Allocation]],
        executor: Executor,
        notify: Callable[[], None],
    ) -> None:
        """Start writing home those of its tensors that are named by number."""
        unwritten = [(allocation, self._rooms[number]) for number, allocation in allocations]
        writes = list[Future[None]]()
        try:
            _start(executor, notify, unwritten, writes=True, started=writes)
        finally:  # a Ctrl-C does not end what is under way
            if not all(write.cancelled() for write in writes):
                self._writes, self._unwritten = writes, unwritten

    def wait_until_written(self) -> None:
        """Return once its writers have ended, well or not."""
        ended: list[Future[None]] = []
        begun, waited_for = clock(), self._unwritten
        while self._writes and ended is not self._writes:  # others may have stored again meanwhile
            ended = self._writes
            wait_for(ended)
        waited = clock() - begun if ended else 0
        recording.totals.waited_ns += waited
        if recording.active and waited_for and waited > SHORTEST_WAIT_NS:
            recording.add(WAIT_FOR_WRITE, begun, waited_for[0][0])

    def write_again(self) -> None:
        """Write what writers failed to write, in a slab that nobody uses, or raise HomeIOError."""
        for allocation, room in self._unwritten:
            allocation.write(room)
        self._unwritten, self._writes = [], []


def _succeeded(future: "Future[None]") -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _start(
    executor: Executor,
    notify: Callable[[], None],
    rooms: Sequence[tuple[Allocation, Tensor]],
    *,
    writes: bool,
    started: "list[Future[None]]",
) -> None:
    """Start moving the rooms' bytes, and call `notify` after each part.

    The home moves them by itself, or they are moved in pieces, each in a thread. Each future is in
    `started` before its bytes are.
    """
    rooms = [(allocation, room) for allocation, room in rooms if room.numel()]
    if not rooms:
        return
    home, future = rooms[0][0].home, Future[None]()
    future.add_done_callback(lambda _: notify())
    started.append(future)
    try:
        if home.start_moves(rooms, writes, future):
            return
    except BaseException:
        future.cancel()  # unless they are under way
        raise
    started.pop()
    for allocation, room in rooms:
        move = allocation.write if writes else allocation.read
        for start in range(0, room.numel(), home.part_bytes):
            part = executor.submit(move, room[start : start + home.part_bytes], start)
            part.add_done_callback(lambda _: notify())
            started.append(part)
