"""The one file of a live disk home: nameless while it lives, grown and mapped in stretches."""

import contextlib
import errno
import mmap
import os
import secrets
import tempfile
from pathlib import Path
from typing import Final

from memtile.errors import HomeError, HomeFullError, HomeIOError, MemtileError, way_out
from memtile.homes import disk_io
from memtile.homes.buffers import aligned_buffer
from memtile.homes.home import PAGE
from memtile.homes.segments import FreeRoom, Segment

HEADER: Final = max(PAGE, mmap.ALLOCATIONGRANULARITY)
"""Bytes at the file's beginning that belong to no tile: the header of a sealed file."""

_SMALLEST_GROWTH: Final = 1 << 20
_LARGEST_AHEAD: Final = 1 << 30
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_LIMITS: Final = frozenset({errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE})
_NO_TMPFILE: Final = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT})


class LiveFile:
    """A file that nobody else can open and that does not outlive this process.

    Args:
        folder: where, checked before.
        keep: whether `publish` will be called. Where the filesystem has no nameless files, the file
            then has a partial name while it lives, which a killed process leaves behind.

    Attributes:
        fd: read and written through the page cache.
        direct_fd: past the page cache; None where that does not work here.
        size: bytes so far, all of them allocated on the disk.
    """

    def __init__(self, folder: Path, keep: bool) -> None:
        self.folder = folder
        self.direct_fd: int | None = None
        self.size = 0
        self._partial: Path | None = None
        self._owner = os.getpid()
        self.fd = self._open(keep)
        try:
            self._allocate(HEADER)
            self._map(HEADER).close()  # told now, and not when tiles are made
            self.direct_fd = self._open_direct()
        except BaseException:
            self.close()
            raise

    def extend(self, needed: int) -> Segment:
        """More of the file, at least so many bytes, mapped.

        It doubles the file up to 1 GiB at a time, since each map costs a file descriptor; where
        there is no room for that, it adds what is needed.

        Raises:
            HomeFullError: there is no room for it, or a limit on maps; the file is as it was.
            HomeError: its filesystem maps no more of it; the file is as it was.
        """
        offset = self.size
        ahead = max(needed, min(_LARGEST_AHEAD, offset), _SMALLEST_GROWTH)
        size = _in_units(ahead)
        try:
            self._allocate(size)
        except HomeFullError:
            size = _in_units(needed)
            self._allocate(size)
        try:
            memory = self._map(size, offset)
        except BaseException:
            self._shrink(offset)
            raise
        return Segment(offset, memory, FreeRoom(size))

    def publish(self, name: str, file_bytes: int, *, replace: bool) -> None:
        """Cuts the file to its length and gives it its name, whole and on the disk or not at all.

        Raises:
            HomeError: the name is taken, and is not to be replaced.
            OSError: the filesystem refused.
        """
        target = self.folder / name
        os.ftruncate(self.fd, file_bytes)
        os.fsync(self.fd)
        if self._partial is None and not replace:
            self._link(target)
        else:
            self._rename(target, replace)
        self._sync_folder()

    def close(self) -> None:
        """Closes what is open and removes what has only a partial name; a second call is free."""
        fds, self.fd, self.direct_fd = (self.fd, self.direct_fd), -1, None
        for fd in fds:
            if fd is not None and fd >= 0:
                os.close(fd)
        partial, self._partial = self._partial, None
        if partial is not None and os.getpid() == self._owner:  # a forked child removes nothing
            partial.unlink(missing_ok=True)

    def _open(self, keep: bool) -> int:
        flags = os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC
        try:
            return os.open(self.folder, flags if keep else flags | os.O_EXCL, 0o600)
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise _cannot_open(self.folder, error) from error
        try:
            fd, name = tempfile.mkstemp(prefix="tiles.memtile.partial-", dir=self.folder)
        except OSError as error:
            raise _cannot_open(self.folder, error) from error
        if keep:
            self._partial = Path(name)
        else:
            os.unlink(name)
        return fd

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
        try:
            if self._coherent(fd):
                return fd
        except HomeIOError:
            pass  # opened, but refuses to read or write
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return None

    def _coherent(self, direct: int) -> bool:
        """Whether the map and direct reads and writes see each other's changes, both ways."""
        shared = self._map(HEADER)
        piece = disk_io.bytes_of(buffer := aligned_buffer(PAGE))
        written, mapped = os.urandom(PAGE), os.urandom(PAGE)
        shared[:PAGE] = mapped
        disk_io.fill(direct, piece, 0)
        seen_direct = bytes(piece) == mapped
        piece[:] = written
        disk_io.drain(direct, piece, 0)
        seen_mapped = shared[:PAGE] == written
        shared[:PAGE] = bytes(PAGE)
        shared.close()
        del piece, buffer
        return seen_direct and seen_mapped

    def _sync_folder(self) -> None:
        # The file has its name by now, and some network filesystems cannot sync a folder.
        with contextlib.suppress(OSError):
            folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _link(self, target: Path) -> None:
        try:
            # Only with a folder's descriptor does Python call linkat and follow the symlink.
            folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                own = f"/proc/self/fd/{self.fd}"
                os.link(own, target.name, dst_dir_fd=folder, follow_symlinks=True)
            finally:
                os.close(folder)
        except FileExistsError as error:
            raise _taken(target) from error

    def _rename(self, target: Path, replace: bool) -> None:
        partial = self._partial
        if partial is None:
            partial = target.with_name(f"{target.name}.partial-{secrets.token_hex(4)}")
            self._link(partial)
            self._partial = partial  # for another try: Linux links a nameless file only once
        if not replace and target.exists():
            raise _taken(target)
        os.rename(partial, target)
        self._partial = None


def _in_units(nbytes: int) -> int:
    return -(-nbytes // HEADER) * HEADER


def _taken(target: Path) -> HomeError:
    return HomeError(
        f"{target} is there already: a home is sealed over another only after "
        "DiskHome.reopen(folder); remove or move it first"
    )


def _cannot_open(folder: Path, error: OSError) -> HomeError:
    return HomeError(f"a home in {folder} cannot be made ({error.strerror}); {way_out(error)}")


def cannot_map(what: str, error: OSError, elsewhere: str) -> MemtileError:
    """What to say where a file is not mapped: a limit is reached, or its filesystem maps none.

    Args:
        what: was to be mapped.
        error: the system's.
        elsewhere: the way out where the filesystem is at fault.
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
