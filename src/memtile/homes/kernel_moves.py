"""Reads and writes of rooms that the kernel makes, as one future for the caller."""

import ctypes
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from memtile.homes.home import Allocation, Home, Traffic
from memtile.homes.kernel_aio import LARGEST_MOVE, KernelMove, kernel_queue
from memtile.observing import recording
from memtile.observing.recording import READ, WRITE, clock


@dataclass(frozen=True)
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


def start_kernel_moves(
    home: Home, moves: Sequence[RoomMove], writes: bool, future: "Future[None]"
) -> bool:
    """Start these moves, as `Home.start_moves` says, where the kernel has a queue for them."""
    queue = kernel_queue()
    if queue is None or any(move.memory.numel() > LARGEST_MOVE for move in moves):
        return False
    group = _Group(home, [(move.allocation, move.memory) for move in moves], writes, future)
    parts = [  # not kept: they keep the group, and so the memory, until they have ended
        KernelMove(move.descriptor, move.memory, move.offset, partial(group.end, move))
        for move in moves
    ]
    home._begin_transfer()
    future.set_running_or_notify_cancel()  # from now on it cannot be cancelled
    queue.start(writes, parts)
    return True


class _Group:
    """Moves that are under way; a future is told once all of them have ended."""

    def __init__(
        self,
        home: Home,
        rooms: Sequence[tuple[Allocation, Tensor]],
        writes: bool,
        future: "Future[None]",
    ) -> None:
        self._home, self._rooms, self._writes, self._future = home, rooms, writes, future
        self._left, self._lock = len(rooms), threading.Lock()
        self._error: BaseException | None = None
        self._begun = clock() if recording.active else 0

    def end(self, move: RoomMove, moved: int, number: int) -> None:
        """One of them has ended: with so many bytes, or an error; see `KernelMove.ended`."""
        allocation, memory, skipped = move.allocation, move.memory, move.skipped
        try:
            if moved != memory.numel() and (self._writes or moved < skipped + allocation.nbytes):
                # again, as a thread does it, which raises its errors
                (allocation._write_from if self._writes else allocation._read_into)(memory, 0)
            elif skipped:
                first = memory.data_ptr()
                ctypes.memmove(first, first + skipped, allocation.nbytes)
        except BaseException as error:  # it is raised where the future is waited for
            self._error = error
            if not isinstance(error, Exception):  # a Ctrl-C: now, nobody may ever wait
                raise
        finally:
            self._note_end(allocation, memory, number)

    def _note_end(self, allocation: Allocation, memory: Tensor, number: int) -> None:
        if self._begun:
            kind = WRITE if self._writes else READ
            recording.add(kind, self._begun, allocation, memory.numel(), thread=-1 - number)
        with self._lock:
            self._left -= 1
            is_last = not self._left
        if is_last:
            self._finish()

    def _finish(self) -> None:
        if self._error is not None:
            self._home._end_transfer(Traffic())
            self._future.set_exception(self._error)
            return
        nbytes = sum(memory.numel() for _, memory in self._rooms)
        self._home._end_transfer(Traffic(0, nbytes) if self._writes else Traffic(nbytes, 0))
        self._future.set_result(None)
