"""What the parts of memtile report of their work: always sums, events while anyone observes.

A place that reports reads the clock, works, and hands over an event:

    begun = clock() if recording.active else 0
    ...
    if begun:
        recording.add(READ, begun, allocation, nbytes)

While nobody observes, `active` is an empty tuple: nothing is called or made.
"""

import threading
import time
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

clock: Final = time.perf_counter_ns

FORWARD: Final = "forward"
BACKWARD: Final = "backward"
STEP: Final = "optimizer step"
READ: Final = "read"
WRITE: Final = "write"
WAIT_FOR_READ: Final = "wait for a read"
WAIT_FOR_SLAB: Final = "wait for a slab"
WAIT_FOR_WRITE: Final = "wait for a write"
SLABS: Final = "slabs in use"

SHORTEST_WAIT_NS: Final = 10_000  # what is shorter was no wait: the tile was there

COMPUTE: Final = (FORWARD, BACKWARD, STEP)
WAITS: Final = (WAIT_FOR_READ, WAIT_FOR_SLAB, WAIT_FOR_WRITE)


@dataclass
class Totals:
    """Sums of this process since it began; what two threads add at the same moment may be lost.

    Args:
        waited_ns: nanoseconds for which threads that compute waited for tiles, slabs and writes.
        moving_ns: nanoseconds in which a home had reads or writes under way.
    """

    waited_ns: int = 0
    moving_ns: int = 0


totals = Totals()


class Event(NamedTuple):
    """Something that took time.

    Args:
        kind: FORWARD, say.
        begun_ns: on the clock of `time.perf_counter_ns`.
        ended_ns: on the same clock.
        thread: its `threading.get_ident()`; of moves that the kernel makes by itself, -1 and less.
        name: of the tile; dtype and shape where the tensor has no name.
        amount: bytes that were moved; of SLABS, how many.
    """

    kind: str
    begun_ns: int
    ended_ns: int
    thread: int
    name: str
    amount: int


class Recorder:
    """Events as they come, at most `limit`: about 200 bytes each."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.begun_ns = self.ended_ns = 0
        self.dropped = 0  # events that came after the limit
        self.events: list[tuple[str, int, int, int, str, int]] = []  # which the gc does not track
        self.threads: dict[int, str] = {}  # names
        self._names: dict[str, str] = {}  # one string for each

    def take(self, event: Event) -> None:
        """Keep an event, from the start of the recorder on; from any thread."""
        if len(self.events) >= self.limit:
            self.dropped += 1
            return
        kind, begun, ended, thread, name, amount = event
        if thread not in self.threads:
            by_kernel = f"kernel {-thread}"
            self.threads[thread] = by_kernel if thread < 0 else threading.current_thread().name
        name = self._names.setdefault(name, name)
        self.events.append((kind, max(begun, self.begun_ns), ended, thread, name, amount))


active: tuple[Recorder, ...] = ()
_lock = threading.Lock()


def start(recorder: Recorder) -> None:
    """Hand events that end from now on to the recorder, and to those that were started before."""
    global active
    with _lock:
        recorder.begun_ns = clock()
        active = (*active, recorder)


def stop(recorder: Recorder) -> None:
    """Hand it no more."""
    global active
    with _lock:
        active = tuple(each for each in active if each is not recorder)
        recorder.ended_ns = clock()


def add(kind: str, begun_ns: int, of: Any, amount: int = 0, thread: int | None = None) -> None:
    """Report what ends now; `of` is an allocation or a tensor, which is not kept."""
    name = getattr(of, "label", None) or f"{of.dtype} {tuple(of.shape)}".removeprefix("torch.")
    thread = threading.get_ident() if thread is None else thread
    event = Event(kind, begun_ns, clock(), thread, name, amount)
    for recorder in active:
        recorder.take(event)
