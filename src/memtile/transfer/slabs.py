"""Slabs: buffers of a fixed number that tiles land in, filled and emptied by reader threads."""

import enum
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from concurrent.futures import wait as wait_for

import torch
from torch import Tensor

from memtile.homes import Berth, aligned_buffer
from memtile.transfer.itinerary import Key, key_of

# Direct I/O in pieces of 1 to 4 MiB saturates an idle disk. The smallest keep most under way while
# products keep all cores busy: 0.46 against 0.65 s for 512 MiB in 16 MiB tiles (2 cores).
PIECE_BYTES = 1 << 20

Move = Callable[[Berth, Tensor, int], None]  # berth, memory, first byte of the berth


class Holder(enum.Enum):
    """Who holds the memory of a slab."""

    NOBODY = "it may be filled with anything"
    READERS = "it is being filled"
    ITS_TILES = "its content is theirs, and nobody works on it"
    WORKERS = "someone works on it"
    WRITERS = "it is being written home, or could not be: it is the truth until it is there"


class Slab:
    """One buffer, and what it holds. Its ring's lock guards every change of `key` and `users`."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.key: Key | None = None
        self.tensors: list[Tensor] = []
        self.users = 0
        self.is_spoiled = False  # what it holds must not be used again
        self._reads: list[Future[None]] = []
        self._writes: list[Future[None]] = []
        self._unwritten: list[tuple[Berth, Tensor]] = []

    @property
    def holder(self) -> Holder:
        """Who holds its memory now."""
        if self.users:
            return Holder.WORKERS
        if self.is_unwritten:
            return Holder.WRITERS
        if not all(read.done() for read in self._reads):
            return Holder.READERS
        return Holder.NOBODY if self.key is None else Holder.ITS_TILES

    @property
    def is_unwritten(self) -> bool:
        """Whether it holds what its home does not have yet."""
        self.forget_written()
        return bool(self._unwritten)

    def forget_written(self) -> None:
        """Let go of the berths, and so of their home, where all of it is written."""
        if self._unwritten and all(_succeeded(write) for write in self._writes):
            self._unwritten, self._writes = [], []

    @property
    def failed_to_read(self) -> bool:
        """Whether a read of its content ended with an error."""
        return any(read.done() and not _succeeded(read) for read in self._reads)

    @property
    def failed_to_write(self) -> bool:
        """Whether its writers have ended and it holds what its home does not have."""
        return self.is_unwritten and all(write.done() for write in self._writes)

    def load(self, cargo: Sequence[Berth], executor: Executor, notify: Callable[[], None]) -> None:
        """Take a cargo in: its readers start now."""
        self.claim(cargo)
        try:
            for piece in _pieces(cargo, self.memory):
                self._reads.append(_submit(executor, _read, piece, notify))
        except BaseException:
            self.key = None  # or it would pass for read
            raise

    def claim(self, cargo: Sequence[Berth]) -> None:
        """Take a cargo in whose content is still to be made."""
        self.empty()
        needed = sum(berth.room for berth in cargo)
        if self.memory.numel() < needed:
            self.memory = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new comes
            self.memory = aligned_buffer(needed)
        starts = _starts(cargo)
        self.tensors = [
            self.memory[start : start + berth.nbytes].view(berth.dtype).view(berth.shape)
            for start, berth in zip(starts, cargo, strict=True)
        ]
        self.key = key_of(cargo)

    def empty(self) -> None:
        """Hold nothing; readers that are still at work must have ended before."""
        self.key, self.tensors, self._reads, self.is_spoiled = None, [], [], False

    def let_go(self) -> None:
        """Hold nothing; what readers are still at work on stays theirs until they have ended."""
        self.key = None
        # An error keeps its traceback, and so the berth and its home, alive.
        self._reads = [read for read in self._reads if not read.done()]

    def wait_until_read(self) -> None:
        """Return once the content is there.

        Raises:
            HomeIOError: a read failed.
        """
        for read in self._reads:
            read.result()

    def store(
        self, berths: Sequence[tuple[int, Berth]], executor: Executor, notify: Callable[[], None]
    ) -> None:
        """Start writing home those of its tiles that are named by number."""
        unwritten = [(berth, self._room(number, berth)) for number, berth in berths]
        self._writes = [
            _submit(executor, _write, (berth, room[start:stop], start), notify)
            for berth, room in unwritten
            for start, stop in _cuts(berth.room)
        ]
        self._unwritten = unwritten

    def _room(self, number: int, berth: Berth) -> Tensor:
        start = self.tensors[number].data_ptr() - self.memory.data_ptr()
        return self.memory[start : start + berth.room]

    def wait_until_written(self) -> None:
        """Return once its writers have ended, well or not."""
        ended = None
        while ended is not self._writes:  # someone else may have stored anew meanwhile
            ended = self._writes
            wait_for(ended)

    def write_again(self) -> None:
        """Write what writers failed to write; nobody else may work on the slab.

        Raises:
            HomeIOError: it failed again; the slab goes on holding what its home does not have.
        """
        for berth, room in self._unwritten:
            berth.write(room)
        self._unwritten, self._writes = [], []


def _succeeded(future: "Future[None]") -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _submit(
    executor: Executor, move: Move, piece: tuple[Berth, Tensor, int], notify: Callable[[], None]
) -> "Future[None]":
    future = executor.submit(move, *piece)
    future.add_done_callback(lambda _: notify())
    return future


def _read(berth: Berth, memory: Tensor, start: int) -> None:
    berth.read(memory, start)


def _write(berth: Berth, memory: Tensor, start: int) -> None:
    berth.write(memory, start)


def _starts(cargo: Sequence[Berth]) -> list[int]:
    starts, total = [], 0
    for berth in cargo:
        starts.append(total)
        total += berth.room
    return starts


def _cuts(room: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + PIECE_BYTES, room)) for start in range(0, room, PIECE_BYTES))


def _pieces(cargo: Sequence[Berth], memory: Tensor) -> Iterator[tuple[Berth, Tensor, int]]:
    for berth, origin in zip(cargo, _starts(cargo), strict=True):
        for start, stop in _cuts(berth.room):
            yield berth, memory[origin + start : origin + stop], start
