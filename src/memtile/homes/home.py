"""What a home is: memory in which tensors are parked (offloaded), and the two ways to their bytes.

An allocation is the part of a home that one tensor has. Its bytes are reached as a tensor that lies
over them, or by `read` and `write`, in whole pages and from any thread; both ways see each other's
changes. The room of an allocation is used again only once the allocation and every tensor over it
are gone.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, Final, TypeVar

import torch
from torch import Tensor

from memtile.errors import ArgumentError, HomeError
from memtile.homes.endings import Ending
from memtile.homes.kernel import PAGE, whole_pages
from memtile.homes.transfers import Traffic, Transfer, Transfers
from memtile.observing import recording
from memtile.observing.recording import READ, WRITE, clock

# Direct I/O in pieces of 1 to 4 MiB saturates an idle disk. The smallest keep most under way while
# products keep all cores busy: 0.46 against 0.65 s for 512 MiB in 16 MiB tiles (2 cores).
PART_BYTES: Final = 1 << 20

# Of slabs for tiles of 1 MiB: three such hold too little to be read ahead. A step of SmolLM2 took
# 2.76 s with 1 MiB, 2.07 with 4, 2.03 with 8 (2 cores).
SLAB_BYTES: Final = 4 << 20

_H = TypeVar("_H", bound="Home")


class Home(ABC):
    """Memory in which tensors are parked; a context manager that closes it.

    To write one, give `allocate`, `hold` where room can be set aside, and `_release` where there is
    something to give back at closing. `tests/support/home_contract.py` has the tests to pass.

    Attributes:
        works_in_place: whether tensors may be worked on where they lie, without a slab.
        is_read_only: whether nothing can be parked or written there.
        closed: whether the home was closed.
        transfers: its reads and writes that are under way, not those of its tensors.
        kept_bytes: memory for its most used experts; set before tiles are used. It is for copies,
            where the home can tell that nothing has written to them (`watch_writes`,
            `Allocation.is_untouched`); a `TileOptimizer` takes it for experts that it trains.
        mapped_bytes: where tiles are worked on in a file's pages (`is_mapped`), how much of them
            may stay in this process's memory after its use; None: all. The page cache holds them
            all either way, for as long as nobody else needs the memory.
        slab_bytes: of a slab that tiles, or what a step works on, come into, at least; set before
            tiles are used. A plan sets 0: a slab is as large as the largest tile then.
    """

    works_in_place: ClassVar[bool] = False
    is_read_only: ClassVar[bool] = False

    def __init__(self) -> None:
        self.closed = False
        self.transfers = Transfers()
        self.kept_bytes = 0
        self.mapped_bytes: int | None = None
        self.slab_bytes = SLAB_BYTES
        self._before_close: list[Callable[[], None]] = []
        self._after_close: list[Callable[[], None]] = []

    @property
    def traffic(self) -> Traffic:
        """What `read` and `write` have moved; tensors' own reads and writes do not count."""
        return self.transfers.traffic

    @property
    def is_mapped(self) -> bool:
        """Whether tiles are worked on in a file's pages, from `Allocation.populate` to `release`.

        They need no slab; pages in use, and `mapped_bytes` of others, are memory of the process.
        """
        return False

    @abstractmethod
    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> "Allocation":
        """Room for one tensor; its content is undefined.

        Raises:
            HomeFullError: there is no room for it; nothing was changed.
            HomeError: the home is closed.
        """

    def hold(self, rooms: Sequence[int]) -> "Reservation":
        """Room that stays free for one owner, whoever else parks here.

        A home that cannot set room aside only checks that it is there now.

        Args:
            rooms: what `Allocation.room` of each allocation will be.

        Raises:
            HomeFullError: there is no room for them; nothing was changed.
            HomeError: the home is closed.
        """
        self.check_open()
        return Reservation(self)

    def close(self) -> None:
        """Ends the home; a second call does nothing.

        Waits for reads and writes under way; later ones, and later allocations, raise `HomeError`.
        Tensors that are still alive can be read and written until they are gone.
        """
        for act in list(self._before_close):
            act()
        while (gate := self._close_unless_moving()) is not None:
            with gate:
                pass
        self._before_close.clear()
        while self._after_close:
            self._after_close.pop()()

    def _close_unless_moving(self) -> "threading.Lock | None":
        """Close it; or else what opens once nothing is read or written."""
        with self.transfers.lock:
            gate = self.transfers.gate()
            if gate is None and not self.closed:
                self._release()
                self.closed = True
            return gate

    def when_closed(self, before: Callable[[], None], after: Callable[[], None]) -> None:
        """Calls `before` ahead of closing, which it stops by raising, and `after` when it is done.

        Neither is called where the home is only dropped.
        """
        self._before_close.append(before)
        self._after_close.append(after)

    def watch_writes(self) -> bool:
        """Has `Allocation.is_untouched` tell of writes from now on; what is read later is watched.

        Returns whether something may have been written since the last call: copies that were made
        before are out of date then. A home that watches from the beginning says no.
        """
        return False

    def check_open(self) -> None:
        """Raises HomeError where the home is closed."""
        if self.closed:
            raise HomeError(
                f"{self!r} is closed: a closed home parks and moves nothing; keep it open for as "
                "long as its model is used, or call memtile.untile(model) before"
            )

    @contextmanager
    def transferring(self, read_bytes: int = 0, written_bytes: int = 0) -> Iterator[None]:
        """Keeps the home open inside; unless an error comes out, the bytes count as moved."""
        transfer, moved = Transfer(), Traffic()
        try:
            self.begin_transfer(transfer)
            yield
            moved = Traffic(read_bytes, written_bytes)
        finally:
            self.transfers.end(transfer, moved)

    def begin_transfer(self, transfer: Transfer) -> None:
        """Keeps the home open until `transfers.end`, or until nothing refers to the transfer."""
        with self.transfers.lock:
            self.check_open()
            self.transfers.begin(transfer)

    def start_moves(self, rooms: "Rooms", writes: bool, ending: Ending) -> bool:
        """Starts reads or writes of whole rooms that need no thread of the caller's, if it can.

        Args:
            rooms: this home's allocations, and memory for each as `Allocation.read` takes it; they
                are kept until all have ended.
            writes: the memory is written to the rooms; else it is filled from them.
            ending: is told once all have ended, with an error, HomeIOError say.

        Returns:
            Whether they were started. A home that says no is read and written in threads.
        """
        return False

    @property
    def part_bytes(self) -> int:
        """What one read or write best moves at once; larger rooms are moved in parts."""
        return PART_BYTES

    def _release(self) -> None:  # noqa: B027  # a home may have nothing to give back
        """Gives back what the home holds, no read or write being under way; open if it raises."""

    def __enter__(self: _H) -> _H:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Reservation:
    """Room of a home that is held for one owner; it is given back once the reservation is gone.

    Allocations that were made of it stay: their room is the owner's again when they are gone.
    """

    def __init__(self, home: Home) -> None:
        self.home = home

    @contextmanager
    def used_by_this_thread(self) -> Iterator[None]:
        """Inside, this thread's allocations take the held room first, and other room after it."""
        yield


class Allocation(ABC):
    """The bytes of a home that one tensor has.

    To write one, set `address` and give `tensor`, `_read_into` and `_write_from`.

    Attributes:
        address: `data_ptr()` of its tensors; 0 for tensors without elements.
        home: whose bytes they are.
        shape: of the tensor.
        dtype: of the tensor.
        nbytes: bytes of the tensor.
        room: whole pages, at least `nbytes`; the bytes from `nbytes` on have no meaning.
        label: the tensor's name, for messages; None: it has none.
    """

    address: int

    def __init__(self, home: Home, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.home = home
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.nbytes = self.shape.numel() * dtype.itemsize
        self.room = whole_pages(self.nbytes)
        self.label: str | None = None

    @abstractmethod
    def tensor(self) -> Tensor:
        """A new tensor over the bytes, contiguous, whose storage is exactly `nbytes` long."""

    def read(self, into: Tensor, start: int = 0) -> None:
        """Fills `into` with the room's bytes from `start` on, from any thread.

        Args:
            into: 1-D uint8 on the CPU, whole pages of page-aligned memory: an `aligned_buffer`, or
                a slice of one at a page.
            start: the first byte, a multiple of `PAGE`.

        Raises:
            ArgumentError: it is not such a tensor, or reaches past the room.
            HomeError: the home is closed.
            HomeIOError: the bytes could not be read; the content of `into` is undefined.
        """
        self._check_piece("read", into, start)
        begun = clock() if recording.active else 0
        with self.home.transferring(read_bytes=into.numel()):
            self._read_into(into, start)
        if begun:
            recording.add(READ, begun, self, into.numel())

    def write(self, source: Tensor, start: int = 0) -> None:
        """Writes all of `source` into the room from `start` on; arguments and errors as of `read`.

        Autograd does not see it: who writes under a graph increments the tensor's version. After a
        HomeIOError the content of these bytes of the room is undefined.
        """
        self._check_piece("write", source, start)
        begun = clock() if recording.active else 0
        with self.home.transferring(written_bytes=source.numel()):
            self._write_from(source, start)
        if begun:
            recording.add(WRITE, begun, self, source.numel())

    def populate(self, written: bool = False) -> Tensor:
        """A tensor over its pages, brought into this process's memory to be read, or written to.

        Not to be kept past `release`, which follows. HomeIOError where they could not be read;
        without a call they come when they are used.
        """
        return self.tensor()

    def release(self) -> None:  # noqa: B027  # nothing to do is right for memory homes
        """The end of what `populate` began: pages may be dropped, these or others."""

    def evict(self) -> None:  # noqa: B027  # likewise
        """Drops the pages that tensors brought into this process's memory; contents stay."""

    def is_untouched(self) -> bool:
        """Whether it is certain that nothing was written to it since the last `watch_writes`.

        False is right for every home that cannot tell of writes through tensors.
        """
        return False

    @abstractmethod
    def _read_into(self, into: Tensor, start: int) -> None:
        """`read`, after its checks."""

    @abstractmethod
    def _write_from(self, source: Tensor, start: int) -> None:
        """`write`, after its checks."""

    def _check_piece(self, act: str, piece: Tensor, start: int) -> None:
        fits = piece.dtype == torch.uint8 and piece.dim() == 1 and piece.is_contiguous()
        if not fits or not piece.is_cpu or piece.data_ptr() % PAGE or piece.numel() % PAGE:
            raise ArgumentError(
                f"{act} of {self}: a {tuple(piece.shape)} tensor of {piece.dtype} on "
                f"{piece.device}; it takes a 1-D contiguous uint8 tensor on the CPU, page-aligned "
                f"and a multiple of {PAGE} long: make it with memtile.homes.aligned_buffer"
            )
        if start % PAGE or start < 0 or start + piece.numel() > self.room:
            raise ArgumentError(
                f"{act} of {self}: bytes {start} to {start + piece.numel()}; they must begin at a "
                f"multiple of {PAGE} and end within the room of {self.room} bytes"
            )

    def __repr__(self) -> str:
        name = f" {self.label!r}" if self.label is not None else ""
        return f"<allocation{name} {tuple(self.shape)} {self.dtype} of {self.home!r}>"


Rooms = Sequence[tuple[Allocation, Tensor]]
"""Allocations, and as much memory as the room of each: what is moved to or from it."""
