"""The ferries of each home, made when they are first needed and gone with it."""

import os
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from memtile.homes import Home, lock_of_a_module, renew_in_child
from memtile.transfer.ferry import Ferry

# Threads a home. Four saturate an idle disk; while products keep all cores busy a thread waits for
# its turn to ask for more, and with eight pieces under way the disk does not wait with it.
READERS = 8
SLABS = 3  # the tile that is worked on, the next, and one that is written or read
GRADIENT_SLABS = 2


class Ferries:
    """What moves the tensors of one home: a ring for each use, one set of reader threads.

    Attributes:
        weights: tiles that are worked on in forward and backward.
        gradients: gradients on their way home.
        steps: what an optimizer works on.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(READERS, thread_name_prefix="memtile")
        self._process, self._is_closed = os.getpid(), False
        self._empty()
        renew_in_child(self, Ferries._renew_locks)

    def _empty(self) -> None:
        """New rings: their slabs have no memory before they are used."""
        self.weights = Ferry(self._executor, SLABS)
        self.gradients = Ferry(self._executor, GRADIENT_SLABS)
        self.steps = Ferry(self._executor, SLABS)

    def all(self) -> Iterator[Ferry]:
        """Each of them."""
        return iter((self.weights, self.gradients, self.steps))

    @property
    def works(self) -> bool:
        """Whether its threads run: not in a fork, which has none of them, nor once closed."""
        return self._process == os.getpid() and not self._is_closed

    def settle(self) -> None:
        """Return once everything that was stored is at home.

        Raises:
            HomeIOError: something could not be written.
        """
        if self.works:
            for ferry in self.all():
                ferry.settle()

    def close(self) -> None:
        """End the reader threads, without waiting for them, and let go of the slabs."""
        self._is_closed = True
        if self._process == os.getpid():  # a child has none, and their locks are as they were
            self._executor.shutdown(wait=False)
        self._empty()

    def _renew_locks(self) -> None:
        """This is the child of a fork: a tile that is in a slab now is still to be given back."""
        for ferry in self.all():
            ferry.renew_lock()


_ferries: "weakref.WeakKeyDictionary[Home, Ferries]" = weakref.WeakKeyDictionary()
_lock = lock_of_a_module()  # of the dictionary only: nothing is moved or computed under it


def ferries_of(home: Home) -> Ferries:
    """The ferries of this home in this process.

    Raises:
        HomeError: the home is closed.
    """
    with _lock:  # two rings for the same tiles would not know of each other's writes
        found = _ferries.get(home)
        if found is None or not found.works:
            home.check_open()
            found = _ferries[home] = Ferries()
            home.when_closed(found.settle, found.close)
        return found


def every_ferry() -> list[Ferry]:
    """All ferries that are in use in this process."""
    with _lock:
        every = list(_ferries.values())
    return [ferry for found in every if found.works for ferry in found.all()]
