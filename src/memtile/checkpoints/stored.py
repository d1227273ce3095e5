"""Tensors that lie in safetensors files, read piece by piece and never mapped."""

import contextlib
import os
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from memtile.checkpoints import header
from memtile.checkpoints.header import TensorEntry
from memtile.errors import CheckpointError, HomeIOError
from memtile.homes import disk_io

PIECE_BYTES: Final = 4 << 20
MOST_OPEN: Final = 64  # of the 256 files that some systems allow a process


class _OpenFile:
    """A file that is open for reading until nothing refers to this any more."""

    def __init__(self, path: Path) -> None:
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened ({error.strerror})") from error
        self.close = weakref.finalize(self, os.close, self.fd)


_recent: OrderedDict[int, _OpenFile] = OrderedDict()
"""Open files by the ids of theirs, the last used one last; each act on it is one of the GIL's."""


class StoredFile:
    """One safetensors file: open while it is among the `MOST_OPEN` that were used last.

    A file that was replaced by another is read as it was for as long as it is open.

    Args:
        path: of the file.

    Attributes:
        path: of the file.
        header: what it holds.

    Raises:
        CheckpointError: it cannot be opened, or is not a whole safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        opened = _OpenFile(path)
        try:
            self.header = self._read_header(opened.fd)
        except BaseException:
            opened.close()  # not when the traceback goes
            raise
        self._identity = _identity(os.fstat(opened.fd))
        weakref.finalize(self, _recent.pop, id(self), None).atexit = False
        self._keep(opened)

    def _read_header(self, fd: int) -> header.SafetensorsHeader:
        where, size = str(self.path), os.fstat(fd).st_size
        try:
            length = header.header_bytes(os.pread(fd, header.LENGTH_BYTES, 0), size, where)
            raw = os.pread(fd, length, header.LENGTH_BYTES)
        except OSError as error:  # a folder, say
            raise CheckpointError(f"{where} cannot be read ({error.strerror})") from error
        return header.unpack(raw, size, where)

    def opened(self) -> _OpenFile | None:
        """What is open for as long as it is kept; None where the name is gone or another file's.

        Raises:
            CheckpointError: it was written to since it was opened first, or cannot be opened.
        """
        found = _recent.get(id(self))
        if found is None:
            if not self.path.exists():
                return None
            found = _OpenFile(self.path)
            if not self._is_same(os.fstat(found.fd)):
                return None
        self._keep(found)
        return found

    def _keep(self, opened: _OpenFile) -> None:
        _recent[id(self)] = opened
        with contextlib.suppress(KeyError):  # another thread's
            _recent.move_to_end(id(self))
            while len(_recent) > MOST_OPEN:
                _recent.popitem(last=False)

    def _is_same(self, found: os.stat_result) -> bool:
        """Whether this is the file, and not another one with its name; refuses a changed one."""
        if (found.st_dev, found.st_ino) != self._identity[:2]:
            return False
        if _identity(found) != self._identity:
            raise CheckpointError(
                f"{self.path} was written to while it was in use: what was read of it may be "
                "mixed; load it again, and write checkpoints into another folder"
            )
        return True

    def check_unchanged(self) -> None:
        """Refuses a file that was written to since it was opened first.

        Raises:
            CheckpointError: it was.
        """
        found = _recent.get(id(self))
        with contextlib.suppress(FileNotFoundError):  # replaced or removed: its bytes are the same
            self._is_same(os.stat(self.path) if found is None else os.fstat(found.fd))

    def descriptor(self) -> _OpenFile:
        """What is open for as long as it is kept.

        Raises:
            CheckpointError: its name is gone or another file's, and it was not kept open.
        """
        opened = self.opened()
        if opened is None:
            raise CheckpointError(
                f"{self.path} was replaced or removed while it was in use (only the last "
                f"{MOST_OPEN} files are kept open): load the checkpoint again"
            )
        return opened

    def fill(self, entry: TensorEntry, into: Tensor, start: int) -> None:
        """Read the entry's bytes from `start` on into all of a contiguous CPU tensor.

        Raises:
            CheckpointError: the system could not, or the file is shorter or another by now.
        """
        opened = self.descriptor()
        try:
            disk_io.fill(opened.fd, disk_io.bytes_of(into), entry.offset + start)
        except HomeIOError as error:
            raise CheckpointError(
                f"{self.path}: {entry.name!r} could not be read ({error})"
            ) from error


def _identity(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class StoredTensor:
    """One tensor of a checkpoint.

    Attributes:
        file: which holds it.
        entry: its place there.
    """

    def __init__(self, file: StoredFile, entry: TensorEntry) -> None:
        self.file, self.entry = file, entry

    @property
    def shape(self) -> torch.Size:
        """Its shape."""
        return self.entry.shape

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype in the file.

        Raises:
            CheckpointError: torch has none for it.
        """
        return self.entry.dtype

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return self.entry.nbytes

    def read(self) -> Tensor:
        """All of it, in new memory.

        Raises:
            CheckpointError: it could not be read.
        """
        return self.elements(0, self.shape.numel()).view(self.shape)

    def raw(self) -> Iterator[Tensor]:
        """Its bytes, whatever they mean, in new memory of a few MiB.

        Raises:
            CheckpointError: they could not be read.
        """
        for start in range(0, self.nbytes, PIECE_BYTES):
            piece = torch.empty(min(PIECE_BYTES, self.nbytes - start), dtype=torch.uint8)
            self.file.fill(self.entry, piece, start)
            yield piece

    def elements(self, start: int, stop: int) -> Tensor:
        """Elements of the flattened tensor, in new memory.

        Raises:
            CheckpointError: they could not be read.
        """
        out = torch.empty(stop - start, dtype=self.dtype)
        self.file.fill(self.entry, out, start * self.dtype.itemsize)
        return out

    def rows(self, start: int, stop: int) -> Tensor:
        """Some rows, whole, in new memory.

        Raises:
            CheckpointError: they could not be read.
        """
        width = self.shape[1:].numel()
        return self.elements(start * width, stop * width).view(stop - start, *self.shape[1:])

    def bands(self) -> Iterator[tuple[int, Tensor]]:
        """Where each band of whole rows starts, and the band, in new memory of a few MiB."""
        count = self.shape[0] if self.shape else 1
        height = max(1, PIECE_BYTES * count // max(1, self.nbytes))
        for start in range(0, count, height):
            yield start, self.rows(start, min(start + height, count)) if self.shape else self.read()

    def check_sum(self) -> bool:
        """Verify the bytes; False where the file does not tell their checksum.

        Raises:
            CheckpointError: they are not those that were written.
        """
        if self.entry.crc is None:
            return False
        crc, buffer = 0, torch.empty(min(PIECE_BYTES, self.nbytes), dtype=torch.uint8)
        for start in range(0, self.nbytes, PIECE_BYTES):
            piece = buffer[: min(PIECE_BYTES, self.nbytes - start)]
            self.file.fill(self.entry, piece, start)
            crc = zlib.crc32(disk_io.bytes_of(piece), crc)
        if crc != self.entry.crc:
            raise CheckpointError(
                f"{self.file.path}: the bytes of {self.entry.name!r} are not those that were "
                "written; the file is damaged: take another copy of it"
            )
        return True
