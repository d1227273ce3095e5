"""Leases: groups of tensors in memory for as long as a block works on them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from memtile.homes import Allocation
from memtile.transfer.slabs import Group, Slab

WriteHome = Callable[[Slab, Sequence[tuple[int, Allocation]]], None]


class Lease(ABC):
    """Groups that were acquired at once, in memory until they are released.

    `tensors` are one for each allocation: not to be kept.
    """

    tensors: list[Tensor]

    @abstractmethod
    def store(self, *numbers: int) -> None:
        """Start writing the tensors home: all of them, or those with these numbers."""


class SlabLease(Lease):
    """Groups in slabs."""

    def __init__(
        self, write_home: WriteHome, slabs: Sequence[Slab], groups: Sequence[Group]
    ) -> None:
        self._write_home, self._slabs = write_home, slabs
        self._places = [
            (slab, slab.number_of(allocation), allocation)
            for slab, group in zip(slabs, groups, strict=True)
            for allocation in group
        ]
        self.tensors = [slab.tensors[number] for slab, number, _ in self._places]

    def store(self, *numbers: int) -> None:
        """Start writing the tensors home: all of them, or those with these numbers."""
        chosen = [self._places[number] for number in numbers] or self._places
        for slab in self._slabs:
            own = [(number, allocation) for holder, number, allocation in chosen if holder is slab]
            if own:
                self._write_home(slab, own)


class MappedLease(Lease, AbstractContextManager[Lease]):
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
