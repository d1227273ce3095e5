"""Slabs: a fixed number of buffers for tiles, filled and written while others are worked on.

A slab is as large as the largest group of its ring, or larger. Smaller groups that follow one
another share one: with a small group in each of three slabs the disk has little to read ahead.
"""

import enum
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from memtile.homes import Allocation, Ending, WorkerThreads, aligned_buffer
from memtile.observing import recording
from memtile.observing.recording import SHORTEST_WAIT_NS, WAIT_FOR_WRITE, clock
from memtile.transfer.groups import Group, Key, key_of, nbytes_of

User = weakref.ref[Any]
Kinds = tuple[tuple[int, torch.dtype, torch.Size], ...]  # of a group's tensors, with their rooms

_KNOWN: Final = 64  # layouts of groups for which a slab keeps its tensors


class Holder(enum.IntEnum):
    """Who holds the memory of a slab: of its parts, the one that comes last here."""

    NOBODY = 0  # it may be filled with anything
    IDLE = 1  # it holds tiles that are not in use
    READERS = 2  # it is being filled
    WRITERS = 3  # it is being written home, or could not be: it has the only newest values
    WORKERS = 4  # its tiles are in use


class Slab:
    """One buffer, filled with groups from its beginning on. Its ring's lock guards every change."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.parts: list[SlabPart] = []
        self.last_use = 0
        self._end = 0  # of the last part, in bytes
        self._known: dict[tuple[int, Kinds], tuple[list[Tensor], list[Tensor]]] = {}

    @property
    def holder(self) -> Holder:
        """Who holds its memory now."""
        return max((part.holder for part in self.parts), default=Holder.NOBODY)

    @property
    def is_free(self) -> bool:
        """Whether it may be filled anew."""
        return all(part.holder <= Holder.IDLE for part in self.parts)

    @property
    def is_unused(self) -> bool:
        """Whether nobody holds any of it."""
        if self.parts and self.parts[0].key is not None:  # most often
            return False
        return all(part.holder is Holder.NOBODY for part in self.parts)

    def has_room(self, nbytes: int) -> bool:
        """Whether a group of this size fits behind the others."""
        return self._end + nbytes <= self.memory.numel()

    def empty(self, nbytes: int) -> None:
        """Hold nothing, in memory of at least this size; nobody uses it."""
        self.parts, self._end = [], 0
        if self.memory.numel() < nbytes:
            self._known = {}
            self.memory = torch.empty(0, dtype=torch.uint8)  # free the old before the new is made
            self.memory = aligned_buffer(nbytes)

    def add(self, group: Group) -> "SlabPart":
        """A part with room for a group, which it does not hold yet."""
        kinds = tuple((each.room, each.dtype, each.shape) for each in group)
        found = self._known.get((self._end, kinds))
        if found is None:  # to make tensors takes longer than to start a read
            found = self._made(group, kinds)
        part = SlabPart(*found)
        self.parts.append(part)
        self._end += nbytes_of(group)
        return part

    def take_back(self, part: "SlabPart", group: Group) -> None:
        """Undo the last `add`."""
        self.parts.remove(part)
        self._end -= nbytes_of(group)

    def _made(self, group: Group, kinds: Kinds) -> tuple[list[Tensor], list[Tensor]]:
        rest = self.memory[self._end : self._end + nbytes_of(group)]
        with torch.inference_mode(False):  # a step may write to them later
            rooms = list(rest.split([room for room, _, _ in kinds]))
            tensors = [
                room[: allocation.nbytes].view(allocation.dtype).view(allocation.shape)
                for room, allocation in zip(rooms, group, strict=True)
            ]
        if len(self._known) >= _KNOWN:
            self._known.clear()
        self._known[self._end, kinds] = rooms, tensors
        return rooms, tensors


class Slabs(list[Slab]):
    """The slabs of a ring. Its lock guards every change."""

    def __init__(self, number: int, least_bytes: int) -> None:
        super().__init__(Slab() for _ in range(number))
        self.nbytes = least_bytes  # of a slab that is filled from now on
        self._filling = self[0]

    def parts(self) -> "list[SlabPart]":
        """All of them."""
        return [part for slab in self for part in slab.parts]

    def release_lost(self) -> bool:
        """Take parts from users that are gone; whether there were any."""
        found = [(part, user) for part in self.parts() for user in part.users if user() is None]
        for part, user in found:
            part.release(user, half_changed=True)
        return bool(found)

    def find(self, key: Key) -> "Place | None":
        """The part that holds the group, alone or among others that were read with it."""
        for slab in self:
            for part in slab.parts:
                own, found = part.key, part.key == key
                if not found and own is not None and len(own) > len(key):
                    found = set(key) <= set(own)
                if found and not part.is_stale and not part.failed_to_read:
                    return slab, part
        return None

    def places(self, groups: Sequence[Group], keys: Sequence[Key]) -> "list[Place] | None":
        """For each group the part that holds it, or a new one; None: there is no room for all."""
        places: list[Place] = []
        for group, key in zip(groups, keys, strict=True):
            place = self.find(key) or self.room_for(group, {slab for slab, _ in places})
            if place is None:
                for (slab, part), taken in zip(places, groups, strict=False):
                    if part.key is None:
                        slab.take_back(part, taken)
                return None
            places.append(place)
        return places

    def room_for(self, group: Group, needed: "set[Slab]") -> "Place | None":
        """A new part: behind the one before, or in a slab that is free and not needed."""
        nbytes = nbytes_of(group)
        slab = self._filling
        if slab.is_unused and slab not in needed:
            self._empty(slab, nbytes)
        elif not slab.has_room(nbytes):
            free = [each for each in self if each not in needed and each.is_free]
            if not free:
                return None
            slab = min(free, key=lambda each: (not each.is_unused, each.last_use))
            self._empty(slab, nbytes)
        return slab, slab.add(group)

    def _empty(self, slab: Slab, nbytes: int) -> None:
        self.nbytes = max(self.nbytes, nbytes)
        slab.empty(self.nbytes)
        self._filling = slab


class SlabPart:
    """A part of a slab, and the group that it holds. Its ring's lock guards `key` and `users`.

    Attributes:
        writes: their end; None: there are none, or all have succeeded.
        users: their leases. One that is gone was lost: a Ctrl-C came before it could be given back.
    """

    def __init__(self, rooms: list[Tensor], tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self.key: Key | None = None
        self.users: list[User] = []
        self.is_stale = False  # what it holds must not be used again
        self._rooms = rooms  # the bytes of each tensor, whole pages
        self._reads: Ending | None = None
        self.writes: Ending | None = None
        self._unwritten: list[tuple[Allocation, Tensor]] = []

    @property
    def holder(self) -> Holder:
        """Who holds its memory now."""
        if self.users:
            return Holder.WORKERS
        if self.writes is not None and self.is_unwritten:
            return Holder.WRITERS
        if self._reads is not None and not self._reads.is_done:
            return Holder.READERS
        return Holder.NOBODY if self.key is None else Holder.IDLE

    def number_of(self, allocation: Allocation) -> int:
        """Which of its tensors is that of an allocation that it holds."""
        assert self.key is not None
        return self.key.index(weakref.ref(allocation))

    @property
    def is_unwritten(self) -> bool:
        """Whether it holds what its home does not have yet."""
        self.discard_written()
        return self.writes is not None

    def discard_written(self) -> None:
        """Drop the references to allocations, and so to their home, where all of it is written."""
        writes = self.writes
        if writes is not None and writes.is_done and not writes.error:
            self._unwritten, self.writes = [], None

    @property
    def failed_to_read(self) -> bool:
        """Whether a read of its content ended with an error."""
        return self._reads is not None and self._reads.has_failed

    @property
    def failed_to_write(self) -> bool:
        """Whether its writers have ended and it holds what its home does not have."""
        return self.writes is not None and self.writes.has_failed

    def load(self, group: Group, workers: WorkerThreads, notify: Callable[[], None]) -> None:
        """Take a group in; its readers start now."""
        rooms = [pair for pair in zip(group, self._rooms, strict=True) if pair[0].room]
        if rooms:
            self._reads = reads = Ending(notify)  # before there are any
            try:
                _start(reads, rooms, workers, writes=False)
            except BaseException:
                reads.cancel()
                raise
        self.claim(group)  # not before: it would count as read

    def claim(self, group: Group) -> None:
        """Take a group in, whose content may still be to be computed."""
        self.key = key_of(group)

    def discard(self) -> None:
        """Hold nothing; the memory stays with readers that are at work until they have ended."""
        self.key = None
        # An error keeps its traceback, and so the allocation and its home, alive.
        if self._reads is not None and self._reads.is_done:
            self._reads = None

    def release(self, user: User, half_changed: bool = False) -> None:
        """A user works on it no longer; what it has half changed must not be used."""
        if user in self.users:
            self.users.remove(user)
        if half_changed:
            self.is_stale = not self.is_unwritten
        if self.is_stale and not self.users and not self.is_unwritten:
            self.discard()

    def abandon(self, allocation: Allocation) -> None:
        """Hold nothing of an allocation that nobody needs any more, nor write it.

        A writer that is at work ends in room that is not free before.
        """
        if any(each is allocation for each, _ in self._unwritten):
            writes, self._unwritten, self.writes = self.writes, [], None
            assert writes is not None
            writes.cancel()
        if self.key == key_of((allocation,)) and not self.users:
            self.discard()

    def wait_until_read(self) -> None:
        """Return once the content is there; HomeIOError where a read failed."""
        if self._reads is not None:
            self._reads.result()

    def store(
        self,
        allocations: Sequence[tuple[int, Allocation]],
        workers: WorkerThreads,
        notify: Callable[[], None],
    ) -> None:
        """Start writing home those of its tensors that are named by number."""
        rooms = [(each, self._rooms[number]) for number, each in allocations if each.room]
        if not rooms:
            return
        before, writes = (self.writes, self._unwritten), Ending(notify)
        self.writes, self._unwritten = writes, rooms
        try:
            _start(writes, rooms, workers, writes=True)
        except BaseException:
            writes.cancel()
            if not writes.was_begun:  # a Ctrl-C does not end what is under way
                self.writes, self._unwritten = before
            raise

    def wait_until_written(self) -> None:
        """Return once its writers have ended, well or not."""
        writes = self.writes
        if writes is None:
            return
        begun, waited_for = clock(), self._unwritten
        while not writes.is_done:
            writes.wait()
            writes = self.writes or writes  # others may have stored again meanwhile
        waited = clock() - begun
        recording.totals.waited_ns += waited
        if recording.active and waited_for and waited > SHORTEST_WAIT_NS:
            recording.add(WAIT_FOR_WRITE, begun, waited_for[0][0])

    def write_again(self) -> None:
        """Write what writers failed to write, in a slab that nobody uses, or raise HomeIOError."""
        for allocation, room in self._unwritten:
            allocation.write(room)
        self._unwritten, self.writes = [], None


Place = tuple[Slab, SlabPart]


def _start(
    ending: Ending,
    rooms: Sequence[tuple[Allocation, Tensor]],
    workers: WorkerThreads,
    *,
    writes: bool,
) -> None:
    """Start moving the rooms' bytes: by the home itself, or in pieces, each by a thread."""
    home = rooms[0][0].home
    if home.start_moves(rooms, writes, ending):
        return
    acts = [
        partial(allocation.write if writes else allocation.read, piece, start)
        for allocation, room in rooms
        for start, piece in _pieces(room, home.part_bytes)
    ]
    workers.start(ending, acts)


def _pieces(room: Tensor, nbytes: int) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, room.numel(), nbytes):
        yield start, room[start : start + nbytes]
