"""Reads and writes of rooms that the kernel makes, with one end for the caller."""

import ctypes
import errno
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from memtile.homes.endings import Ending, error_of
from memtile.homes.home import Allocation, Home
from memtile.homes.kernel_aio import LARGEST_MOVE, KernelMove, kernel_queue
from memtile.homes.transfers import Traffic, Transfer
from memtile.observing import recording
from memtile.observing.recording import READ, WRITE, clock


@dataclass(frozen=True, eq=False)
class RoomMove:
    """A move of the whole room of an allocation.

    Args:
        allocation: whose room it is.
        memory: as `Allocation.read` takes it, as long as the room.
        descriptor: of a file that was opened with O_DIRECT.
        offset: in the file, a multiple of a page.
        skipped: bytes that are read before those of the room, which are put in their place.
    """

    allocation: Allocation
    memory: Tensor
    descriptor: int
    offset: int
    skipped: int = 0


def start_kernel_moves(home: Home, moves: Sequence[RoomMove], writes: bool, ending: Ending) -> bool:
    """Start these moves, as `Home.start_moves` says, where the kernel has a queue for them."""
    queue = kernel_queue()
    if queue is None or any(move.memory.numel() > LARGEST_MOVE for move in moves):
        return False
    group = _Group(home, moves, writes, ending)
    parts = [  # not kept: they keep the group, and so the memory, until they have ended
        KernelMove(move.descriptor, move.memory, move.offset, partial(group.end, move))
        for move in moves
    ]
    try:
        home.begin_transfer(group.transfer)
        ending.was_begun = True
        queue.start(writes, parts)
    except BaseException:  # a signal handler's
        with ExitStack() as stack:  # which calls all, also after one has raised
            for move, part in zip(moves, parts, strict=True):
                if queue.take_back(part):
                    stack.callback(group.end, move, -errno.ECANCELED, 0)
        raise
    return True


class _Group:
    """Moves that are under way; `ending` is told once all of them have ended."""

    def __init__(self, home: Home, moves: Sequence[RoomMove], writes: bool, ending: Ending) -> None:
        self._home, self._writes, self._ending = home, writes, ending
        self._left, self._lock = set(moves), threading.RLock()
        self._nbytes = sum(move.memory.numel() for move in moves)
        self._error: BaseException | None = None
        self._since = clock() if recording.active else 0
        self.transfer = Transfer()

    def end(self, move: RoomMove, moved: int, number: int) -> None:
        """One of them has ended, with so many bytes or an error; a second time nothing happens."""
        if move not in self._left:
            return
        error = error_of(partial(_complete, move, self._writes, moved))
        self._error = self._error or error
        self._note_end(move, number)
        if error is not None and not isinstance(error, Exception):
            raise error  # a Ctrl-C: nobody may ever wait for the end

    def _note_end(self, move: RoomMove, number: int) -> None:
        if self._since:
            kind, nbytes = WRITE if self._writes else READ, move.memory.numel()
            recording.add(kind, self._since, move.allocation, nbytes, thread=-1 - number)
        with self._lock:
            is_last = self._left == {move}
            self._left.discard(move)
        if is_last:
            self._finish()

    def _finish(self) -> None:
        nbytes = 0 if self._error is not None else self._nbytes
        moved = Traffic(0, nbytes) if self._writes else Traffic(nbytes, 0)
        self._home.transfers.end(self.transfer, moved)
        self._ending.finish(self._error)


def _complete(move: RoomMove, writes: bool, moved: int) -> None:
    """What is left to do where the kernel moved so many bytes; or as a thread, with its errors."""
    allocation, memory = move.allocation, move.memory
    if moved != memory.numel() and (writes or moved < move.skipped + allocation.nbytes):
        (allocation._write_from if writes else allocation._read_into)(memory, 0)
    elif move.skipped:
        first = memory.data_ptr()
        ctypes.memmove(first, first + move.skipped, allocation.nbytes)
