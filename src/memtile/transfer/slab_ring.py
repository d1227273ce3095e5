"""A ring of slabs for the tiles of one home.

A group is one tile, or the few tensors that are used together (a weight, its gradient and its
moments). `acquire` gives a group in memory and starts reading the groups expected next.
"""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress

from torch import Tensor

from memtile.observing import recording
from memtile.observing.recording import SHORTEST_WAIT_NS, SLABS, WAIT_FOR_READ, clock
from memtile.transfer.groups import Group
from memtile.transfer.part_ring import PartRing
from memtile.transfer.slabs import SlabPart


class Lease(ABC):
    """Groups that were acquired at once, in memory until they are released.

    `tensors` are one for each allocation: not to be kept.
    """

    tensors: list[Tensor]

    @abstractmethod
    def store(self, *numbers: int) -> None:
        """Start writing the tensors home: all of them, or those with these numbers."""


class SlabRing(PartRing):
    """A fixed number of slabs, each as large as the largest group so far."""

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
            return _MappedLease(group, made, written)
        return _SlabLease(self, group, made, written, ahead, experts)


class _SlabLease(Lease, AbstractContextManager[Lease]):
    """Groups in slabs of a ring, until the block ends; arguments as of `SlabRing.acquire`.

    No generator: it would not see a Ctrl-C that comes after its `yield` and before the block.
    """

    def __init__(
        self,
        ring: SlabRing,
        group: Group,
        made: Group,
        written: bool,
        ahead: Iterable[Group] | None,
        experts: Iterable[Group] | None,
    ) -> None:
        self._ring, self._made, self._written = ring, made, written
        self._groups = [each for each in (group, made) if each]
        self._ahead, self._experts = ahead, experts
        self._parts: list[SlabPart] = []  # one for each group
        self._user = weakref.ref(self)
        self._begun = 0

    def __enter__(self) -> Lease:
        try:
            self._acquire()
        except BaseException:
            self._ring.release(self._user, self._parts, half_changed=True)
            raise
        return self

    def _acquire(self) -> None:
        ring, ahead, experts, before = self._ring, self._ahead, self._experts, self._ring.last
        learn, is_expert = ahead is None, experts is not None
        ring.acquire_parts(
            self._user, self._groups, self._parts, self._made, learn=learn, is_expert=is_expert
        )
        # No memory for a slab, say: reported when that group itself is asked for.
        with suppress(OSError, MemoryError):
            ring.fetch_ahead(ahead, experts, before)
        self._begun = clock()
        for part in self._parts:
            part.wait_until_read()
            if self._written:  # or what is half changed when an error comes would go home
                part.wait_until_written()
        waited = clock() - self._begun
        recording.totals.waited_ns += waited
        if recording.active and waited > SHORTEST_WAIT_NS:
            recording.add(WAIT_FOR_READ, self._begun, self._groups[0][0])
        self._places = [
            (part, part.number_of(allocation), allocation)
            for part, group in zip(self._parts, self._groups, strict=True)
            for allocation in group
        ]
        self.tensors = [part.tensors[number] for part, number, _ in self._places]

    def __exit__(self, kind: object, *raised: object) -> None:
        used = len(self._parts)
        try:
            self._ring.check_process()
            self._ring.release(self._user, self._parts, half_changed=kind is not None)
        except BaseException:
            self._ring.release(self._user, self._parts, half_changed=True)
            raise
        if recording.active and self._groups:
            recording.add(SLABS, self._begun, self._groups[0][0], used)

    def store(self, *numbers: int) -> None:
        """Start writing the tensors home: all of them, or those with these numbers."""
        chosen = [self._places[number] for number in numbers] or self._places
        for part in self._parts:
            own = [(number, allocation) for holder, number, allocation in chosen if holder is part]
            if own:
                self._ring.write_home(part, own)


class _MappedLease(Lease, AbstractContextManager[Lease]):
    """Allocations of a home that is worked on in place: their own tensors, until the block ends."""

    def __init__(self, group: Group, made: Group, written: bool) -> None:
        self._allocations = (*group, *made)
        self._first_written = 0 if written else len(group)
        self.tensors = []

    def __enter__(self) -> Lease:
        try:
            for number, allocation in enumerate(self._allocations):
                self.tensors.append(allocation.populate(written=number >= self._first_written))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        for allocation in self._allocations[: len(self.tensors)]:
            allocation.release()

    def store(self, *numbers: int) -> None:
        """Nothing is to be written: the tensors lie at home."""
