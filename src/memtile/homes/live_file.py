"""The unnamed file of a disk home, which grows and is mapped in segments."""

import contextlib
import errno
import io
import mmap
import os
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Final

from memtile.errors import HomeError, HomeFullError, HomeIOError, MemtileError, way_out
from memtile.geometry import round_up
from memtile.homes import disk_io
from memtile.homes.kernel import PAGE, aligned_buffer
from memtile.homes.segments import FreeRoom, Segment

_UNIT: Final = max(PAGE, mmap.ALLOCATIONGRANULARITY)  # maps begin at multiples of it
_SMALLEST_GROWTH: Final = 1 << 20
_LARGEST_AHEAD: Final = 1 << 30
_LONG_AGO: Final = 0  # ns; no write has this time
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_LIMITS: Final = frozenset({errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE})


class LiveFile:
    """A file that nobody else can open and that does not outlive this process.

    Its first unit holds no tensor: the self-test uses it. All `size` bytes are allocated on the
    disk. Reads and writes by `fd` go through the page cache, those by `direct_fd` past it; it is
    None where that does not work.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.size = 0
        self._open = contextlib.ExitStack()  # what `close` closes
        self.fd = self._open.enter_context(_file_without_name(folder)).fileno()
        try:
            self._allocate(_UNIT)
            self._map(_UNIT).close()  # a filesystem without maps is refused now, not at `extend`
            self.direct_fd = self._open_direct()
        except BaseException:
            self.close()
            raise

    def extend(self, needed: int) -> Segment:
        """More of the file, at least so many bytes, mapped; after an error it is as it was.

        It doubles the file up to 1 GiB at a time, since each map costs a file descriptor; where
        there is no room for that, it adds what is needed.
        """
        offset = self.size
        size = round_up(max(needed, min(_LARGEST_AHEAD, offset), _SMALLEST_GROWTH), _UNIT)
        try:
            self._allocate(size)
        except HomeFullError:
            size = round_up(needed, _UNIT)
            self._allocate(size)
        try:
            memory = self._map(size, offset)
        except BaseException:
            self._shrink(offset)
            raise
        return Segment(offset, memory, FreeRoom(size))

    def watch(self, unmap_pages: Callable[[], None]) -> None:
        """`is_unwritten` tells of every write from now on, by whatever way.

        The file's time of modification is set to one that no write has. A write through a page
        that is mapped for writing would not change it, so maps' pages are dropped after that.
        """
        with contextlib.suppress(OSError):  # `is_unwritten` says no then
            os.utime(self.fd, ns=(_LONG_AGO, _LONG_AGO))
            try:
                unmap_pages()
            except OSError:  # locked in memory
                os.utime(self.fd)
                raise

    def is_unwritten(self) -> bool:
        """Whether it is certain that nothing was written since `watch`."""
        return os.fstat(self.fd).st_mtime_ns == _LONG_AGO

    @cached_property
    def tells_of_writes(self) -> bool:
        """Whether a trial was told of writes through a map, twice, and of others."""
        with contextlib.closing(self._map(_UNIT)) as shared, contextlib.suppress(HomeIOError):
            page = disk_io.bytes_of(_buffer := aligned_buffer(PAGE))  # keeps its memory
            fds = [fd for fd in (self.fd, self.direct_fd) if fd is not None]
            acts: list[Callable[[], None]] = [
                lambda: shared.__setitem__(0, 1),
                lambda: shared.__setitem__(0, 2),
                *(lambda fd=fd: disk_io.drain(fd, page, 0) for fd in fds),
            ]
            return all(self._tells_of(act, shared) for act in acts)
        return False

    def _tells_of(self, write: Callable[[], None], shared: mmap.mmap) -> bool:
        self.watch(lambda: shared.madvise(mmap.MADV_DONTNEED))
        bytes(shared[:PAGE])  # a page that is mapped for reading
        before = self.is_unwritten()
        write()
        return before and not self.is_unwritten()

    def close(self) -> None:
        """Closes what is open; a second call does nothing."""
        self._open.close()

    def _allocate(self, more: int) -> None:
        """Allocates on the disk: writing a mapped hole of a full disk would be a SIGBUS."""
        try:
            os.posix_fallocate(self.fd, self.size, more)
        except OSError as error:
            self._shrink(self.size)
            if error.errno not in _NO_ROOM:
                raise HomeIOError(
                    error.errno,
                    f"a home in {self.folder} cannot grow ({error.strerror}); {way_out(error)}",
                ) from error
            disk = os.fstatvfs(self.fd)
            free = disk.f_bavail * disk.f_frsize
            raise HomeFullError(
                error.errno,
                f"a home in {self.folder}: {more} more bytes needed, {free} bytes are free "
                f"there ({error.strerror}); {way_out(error)}",
            ) from error
        self.size += more

    def _map(self, size: int, offset: int = 0) -> mmap.mmap:
        try:
            return mmap.mmap(self.fd, size, offset=offset)
        except OSError as error:
            what = f"a home in {self.folder}: {size} bytes of its file"
            raise cannot_map(what, error, "give a folder on a local disk") from error

    def _shrink(self, size: int) -> None:
        with contextlib.suppress(OSError):  # more is allocated than we use: no harm
            os.ftruncate(self.fd, size)
        self.size = size

    def _open_direct(self) -> int | None:
        try:
            fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:
            return None
        with contextlib.ExitStack() as failed:
            failed.callback(os.close, fd)
            # Some filesystems open it, but refuse to read or write.
            with contextlib.suppress(HomeIOError):
                if self._coherent(fd):
                    self._open.push(failed.pop_all())
                    return fd
        return None

    def _coherent(self, direct: int) -> bool:
        """Whether the map and direct reads and writes see each other's changes, both ways."""
        shared = self._map(_UNIT)
        piece = disk_io.bytes_of(buffer := aligned_buffer(PAGE))
        written, mapped = os.urandom(PAGE), os.urandom(PAGE)
        shared[:PAGE] = mapped
        disk_io.fill(direct, piece, 0)
        seen_direct = bytes(piece) == mapped
        piece[:] = written
        disk_io.drain(direct, piece, 0)
        seen_mapped = shared[:PAGE] == written
        shared.close()
        del piece, buffer
        return seen_direct and seen_mapped


def _file_without_name(folder: Path) -> io.FileIO:
    """Where the filesystem has no such files, it is unlinked as soon as it is open."""
    try:
        return tempfile.TemporaryFile(buffering=0, prefix="tiles.memtile-", dir=folder)
    except OSError as error:
        raise HomeError(
            f"a home in {folder} cannot be made ({error.strerror}); {way_out(error)}"
        ) from error


def cannot_map(what: str, error: OSError, elsewhere: str) -> MemtileError:
    """The error where `what` was not mapped: a limit is reached, or the filesystem is at fault.

    `elsewhere` is the way out in the second case.
    """
    if error.errno in _LIMITS:
        return HomeFullError(
            error.errno,
            f"{what} could not be mapped ({error.strerror}); raise the limits of address space "
            "(ulimit -v) or open files (ulimit -n)",
        )
    return HomeError(
        f"{what} could not be mapped ({error.strerror}), and parked tiles lie in mapped memory; "
        f"network filesystems and those of user programs (FUSE) may map no files: {elsewhere}"
    )
