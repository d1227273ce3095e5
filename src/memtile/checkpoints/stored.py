"""Reads tensors from safetensors files, a few MiB at a time and without mapping them."""

import contextlib
import os
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from memtile.checkpoints import header
from memtile.checkpoints.header import TensorEntry
from memtile.errors import CheckpointError, HomeIOError
from memtile.homes import disk_io

PIECE_BYTES: Final = 4 << 20
MOST_OPEN: Final = 64  # files: some systems allow a process 256
_COMPARED_BYTES: Final = 64 << 10


class OpenFile:
    """A file that is closed when nothing refers to this any more."""

    def __init__(self, path: Path) -> None:
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened ({error.strerror})") from error
        self.close = weakref.finalize(self, os.close, self.fd)

    @cached_property
    def direct_fd(self) -> int | None:
        """Reads past the page cache; None where that does not work."""
        try:
            fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:
            return None
        weakref.finalize(self, os.close, fd)
        size = min(_COMPARED_BYTES, os.fstat(self.fd).st_size)
        cached, direct = (torch.empty(size, dtype=torch.uint8) for _ in range(2))
        disk_io.fill(self.fd, disk_io.bytes_of(cached), 0)
        agrees = disk_io.fill_directly(fd, direct, 0) and torch.equal(cached, direct)
        return fd if agrees else None


_open_files: OrderedDict[int, OpenFile] = OrderedDict()  # by a StoredFile's id, last used last


class StoredFile:
    """One safetensors file: its `path`, and the `entries` of its tensors.

    The `MOST_OPEN` files that were used last are kept open; a file that was replaced meanwhile is
    read as it was. CheckpointError where it cannot be opened or is not a whole safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        opened = OpenFile(path)
        try:
            self.entries = self._read_header(opened.fd)
        except BaseException:
            opened.close()  # not when the traceback goes
            raise
        self._identity = _identity(os.fstat(opened.fd))
        weakref.finalize(self, _open_files.pop, id(self), None).atexit = False
        self._keep_open(opened)

    def _read_header(self, fd: int) -> dict[str, TensorEntry]:
        where, size = str(self.path), os.fstat(fd).st_size
        try:
            length = header.header_length(os.pread(fd, header.LENGTH_BYTES, 0), size, where)
            raw = os.pread(fd, length, header.LENGTH_BYTES)
        except OSError as error:  # a folder, say
            raise CheckpointError(f"{where} cannot be read ({error.strerror})") from error
        return header.unpack(raw, size, where)

    def _keep_open(self, opened: OpenFile) -> None:
        """Keep the file open; of more than `MOST_OPEN`, close those that were used first.

        Each call of the dictionary's methods is atomic.
        """
        _open_files[id(self)] = opened
        with contextlib.suppress(KeyError):  # another thread closed it
            _open_files.move_to_end(id(self))
            while len(_open_files) > MOST_OPEN:
                _open_files.popitem(last=False)

    def try_open(self) -> OpenFile | None:
        """The file, opened if need be; None where its name is gone or another file's."""
        found = _open_files.get(id(self))
        if found is None:
            if not self.path.exists():
                return None
            found = OpenFile(self.path)
            if not self._is_same(os.fstat(found.fd)):
                return None
        self._keep_open(found)
        return found

    def _is_same(self, found: os.stat_result) -> bool:
        """Whether this is the file, not another of its name; CheckpointError where it changed."""
        if (found.st_dev, found.st_ino) != self._identity[:2]:
            return False
        if _identity(found) != self._identity:
            raise CheckpointError(
                f"{self.path} was written to while it was in use: what was read of it may be "
                "mixed; load it again, and write checkpoints into another folder"
            )
        return True

    def check_unchanged(self) -> None:
        """Raise CheckpointError where the file was written to since it was opened first."""
        found = _open_files.get(id(self))
        with contextlib.suppress(FileNotFoundError):  # a removed file's bytes stay the same
            self._is_same(os.stat(self.path) if found is None else os.fstat(found.fd))

    def open(self) -> OpenFile:
        """The file, opened if need be; CheckpointError where it was replaced or changed."""
        opened = self.try_open()
        if opened is None:
            raise CheckpointError(
                f"{self.path} was replaced or removed while it was in use (only the last "
                f"{MOST_OPEN} files are kept open): load the checkpoint again"
            )
        return opened

    def fill(self, entry: TensorEntry, into: Tensor, start: int) -> None:
        """Read the entry's bytes from `start` on into all of a contiguous CPU tensor."""
        opened = self.open()
        try:
            disk_io.fill(opened.fd, disk_io.bytes_of(into), entry.offset + start)
        except HomeIOError as error:
            raise CheckpointError(
                f"{self.path}: {entry.name!r} could not be read ({error})"
            ) from error


def _identity(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """One tensor of a checkpoint: an entry of a file. Reading it may raise `CheckpointError`."""

    file: StoredFile
    entry: TensorEntry

    @property
    def shape(self) -> torch.Size:
        """Its shape."""
        return self.entry.shape

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype in the file; CheckpointError where torch has none for it."""
        return self.entry.dtype

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return self.entry.nbytes

    def read(self) -> Tensor:
        """All of it, in new memory."""
        return self.elements(0, self.shape.numel()).view(self.shape)

    def raw(self) -> Iterator[Tensor]:
        """Its bytes, also of dtypes that torch lacks: a few MiB of memory, filled again."""
        buffer = torch.empty(min(PIECE_BYTES, self.nbytes), dtype=torch.uint8)
        for start in range(0, self.nbytes, PIECE_BYTES):
            piece = buffer[: self.nbytes - start]
            self.file.fill(self.entry, piece, start)
            yield piece

    def elements(self, start: int, stop: int) -> Tensor:
        """Elements of the flattened tensor, in new memory."""
        out = torch.empty(stop - start, dtype=self.dtype)
        self.file.fill(self.entry, out, start * self.dtype.itemsize)
        return out

    def rows(self, start: int, stop: int) -> Tensor:
        """Whole rows, in new memory."""
        width = self.shape[1:].numel()
        return self.elements(start * width, stop * width).view(stop - start, *self.shape[1:])

    def check_sum(self) -> bool:
        """Verify the checksum; False where the file has none."""
        if self.entry.crc is None:
            return False
        crc = 0
        for piece in self.raw():
            crc = zlib.crc32(disk_io.bytes_of(piece), crc)
        if crc != self.entry.crc:
            raise CheckpointError(
                f"{self.file.path}: the bytes of {self.entry.name!r} are not those that were "
                "written; the file is damaged: take another copy of it"
            )
        return True
