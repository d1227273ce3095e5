"""Reads and writes of a home that are under way: it stays open meanwhile; and what they moved."""

import threading
import weakref
from dataclasses import dataclass
from functools import partial

from memtile.homes.endings import Gates
from memtile.homes.kernel import renew_in_child
from memtile.observing import recording
from memtile.observing.recording import clock


@dataclass(frozen=True)
class Traffic:
    """Bytes that `Allocation.read` and `Allocation.write` have moved so far, in whole pages."""

    read_bytes: int = 0
    written_bytes: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        read = self.read_bytes + other.read_bytes
        return Traffic(read, self.written_bytes + other.written_bytes)


class Transfer:
    """A read or a write that is under way. It is over, at the latest, when nothing refers to it.

    A count would never be 0 again after a Ctrl-C at the first line of the function that ends one.
    """


class Transfers:
    """Those of one home.

    Attributes:
        lock: guards them, and whether the home is closed.
        traffic: what those that ended well have moved.
    """

    def __init__(self) -> None:
        self.traffic = Traffic()
        self._renew()
        renew_in_child(self, Transfers._renew)

    def _renew(self) -> None:
        """In the child of a fork nothing of its parent's goes on."""
        self.lock, self._gates = threading.RLock(), Gates()
        self._under_way: dict[int, weakref.ref[Transfer]] = {}
        self._since = 0  # when the first of them began

    def begin(self, transfer: Transfer) -> None:
        """One begins; called under the lock."""
        if not self._under_way:
            self._since = clock()
        key = id(transfer)
        lost = partial(_lose, self._under_way, self._gates, key)
        self._under_way[key] = weakref.ref(transfer, lost)

    def end(self, transfer: Transfer, moved: Traffic) -> None:
        """One has ended; a second time, or where it has not begun, nothing happens."""
        with self.lock:
            if self._under_way.pop(id(transfer), None) is None:
                return
            self.traffic += moved
            if not self._under_way:
                recording.totals.moving_ns += clock() - self._since
            self._gates.open_all()

    def gate(self) -> "threading.Lock | None":
        """What opens when one has ended; None: there is none. Called under the lock."""
        live = any(reference() is not None for reference in self._under_way.values())
        return self._gates.close_one() if live else None


def _lose(
    under_way: "dict[int, weakref.ref[Transfer]]", gates: Gates, key: int, reference: object
) -> None:
    under_way.pop(key, None)
    gates.open_all()
