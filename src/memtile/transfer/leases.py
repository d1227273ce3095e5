"""Leases: groups of tensors in memory for as long as a block works on them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from memtile.homes import Allocation
from memtile.transfer.prefetch_order import Group
from memtile.transfer.slabs import SlabPart

WriteHome = Callable[[SlabPart, Sequence[tuple[int, Allocation]]], None]


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
        self, write_home: WriteHome, parts: Sequence[SlabPart], groups: Sequence[Group]
    ) -> None:
        self._write_home, self._parts = write_home, parts
        self._places = [
            (part, part.number_of(allocation), allocation)
            for part, group in zip(parts, groups, strict=True)
            for allocation in group
        ]
        self.tensors = [part.tensors[number] for part, number, _ in self._places]

    def store(self, *numbers: int) -> None:
        """Start writing the tensors home: all of them, or those with these numbers."""
        chosen = [self._places[number] for number in numbers] or self._places
        for part in self._parts:
            own = [(number, allocation) for holder, number, allocation in chosen if holder is part]
            if own:
                self._write_home(part, own)


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
