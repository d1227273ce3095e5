"""A home in memory whose reads and writes are recorded, can be delayed, and can be made to fail."""

import errno
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from memtile.errors import HomeIOError
from memtile.homes import Allocation, Home, HostHome

PATIENCE_SECONDS = 30  # a hang becomes a failure; nothing that passes waits so long


class WatchedHome(Home):
    """Tiles are brought in through slabs, as from a disk.

    Attributes:
        events: ("read" or "write", label of the allocation), in the order in which they began.
        broken: acts that fail, with an I/O error.
        before: called with (act, label) in the moving thread, before anything moves.
        tells: whether it says of its allocations that nothing has written to them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, str]] = []
        self.broken: set[str] = set()
        self.tells = False
        self.slab_bytes = 0  # small tiles would all stay in a larger one
        self.before: Callable[[str, str], None] = lambda act, label: None
        self._inner = HostHome()
        self._began: dict[tuple[str, str], threading.Event] = defaultdict(threading.Event)

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> "WatchedAllocation":
        self.check_open()
        return WatchedAllocation(self, self._inner.allocate(shape, dtype))

    def tile(self, label: str, value: float, length: int = 3) -> "WatchedAllocation":
        """A labelled allocation, filled with one value."""
        allocation = self.allocate((length,), torch.float32)
        allocation.label = label
        allocation.tensor().fill_(value)
        return allocation

    def tiles(self, number: int, length: int = 3) -> list["WatchedAllocation"]:
        """Allocations labelled "0", "1", …, filled with their numbers."""
        return [self.tile(str(n), n, length) for n in range(number)]

    def begins(self, act: str, label: str) -> None:
        """Return once such a move has begun, since the events were last cleared."""
        assert self._began[act, label].wait(PATIENCE_SECONDS), (act, label, self.events)

    def clear(self) -> None:
        """Forget the events."""
        self.events.clear()
        self._began.clear()

    def labels(self, act: str = "read") -> list[str]:
        """What was moved, in order."""
        return [label for done, label in list(self.events) if done == act]

    def note(self, act: str, label: str) -> None:
        """A move begins."""
        self.events.append((act, label))
        self._began[act, label].set()
        self.before(act, label)
        if act in self.broken:
            raise HomeIOError(errno.EIO, f"{act} of {label}: the test wants it")


class WatchedAllocation(Allocation):
    """An allocation of a `WatchedHome`."""

    home: WatchedHome

    def __init__(self, home: WatchedHome, inner: Allocation) -> None:
        super().__init__(home, inner.shape, inner.dtype)
        self._inner, self.address = inner, inner.address

    def tensor(self) -> Tensor:
        return self._inner.tensor()

    def is_untouched(self) -> bool:
        return self.home.tells

    def _read_into(self, into: Tensor, start: int) -> None:
        self.home.note("read", self.label or "")
        self._inner.read(into, start)

    def _write_from(self, source: Tensor, start: int) -> None:
        self.home.note("write", self.label or "")
        self._inner.write(source, start)
