"""Reads tensors from safetensors files, a few MiB at a time and without mapping them."""

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
MOST_OPEN: Final = 64  # files: some systems allow a process 256


class _OpenFile:
    """A file that is open for reading until this is garbage."""

    def __init__(self, path: Path) -> None:
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened ({error.strerror})") from error
        self.close = weakref.finalize(self, os.close, self.fd)


class _RecentFiles:
    """The `MOST_OPEN` files that were used last; each act on the dictionary is atomic."""

    def __init__(self) -> None:
        self._opened: OrderedDict[int, _OpenFile] = OrderedDict()  # by id, the last used one last

    def get(self, stored_file: "StoredFile") -> _OpenFile | None:
        """The file, where it is open."""
        return self._opened.get(id(stored_file))

    def keep(self, stored_file: "StoredFile", opened: _OpenFile) -> None:
        """Keep the file open; of too many, let go of those that were used first."""
        self._opened[id(stored_file)] = opened
        with contextlib.suppress(KeyError):  # another thread let go of it
            self._opened.move_to_end(id(stored_file))
            while len(self._opened) > MOST_OPEN:
                self._opened.popitem(last=False)

    def drop_with(self, stored_file: "StoredFile") -> None:
        """Let go of the file once the `StoredFile` is garbage."""
        weakref.finalize(stored_file, self._opened.pop, id(stored_file), None).atexit = False


_recent = _RecentFiles()


class StoredFile:
    """One safetensors file, open while it is among the `MOST_OPEN` that were used last.

    A file that was replaced by another is read as it was while it is open.

    Attributes:
        path: of the file.
        header: the tensors in it.

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
        _recent.drop_with(self)
        _recent.keep(self, opened)

    def _read_header(self, fd: int) -> header.SafetensorsHeader:
        where, size = str(self.path), os.fstat(fd).st_size
        try:
            length = header.header_bytes(os.pread(fd, header.LENGTH_BYTES, 0), size, where)
            raw = os.pread(fd, length, header.LENGTH_BYTES)
        except OSError as error:  # a folder, say
            raise CheckpointError(f"{where} cannot be read ({error.strerror})") from error
        return header.unpack(raw, size, where)

    def opened(self) -> _OpenFile | None:
        """The file, opened if need be; None where its name is gone or another file's."""
        found = _recent.get(self)
        if found is None:
            if not self.path.exists():
                return None
            found = _OpenFile(self.path)
            if not self._is_same(os.fstat(found.fd)):
                return None
        _recent.keep(self, found)
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
        found = _recent.get(self)
        with contextlib.suppress(FileNotFoundError):  # a removed file's bytes stay the same
            self._is_same(os.stat(self.path) if found is None else os.fstat(found.fd))

    def descriptor(self) -> _OpenFile:
        """The file, opened if need be; CheckpointError where it was replaced or changed."""
        opened = self.opened()
        if opened is None:
            raise CheckpointError(
                f"{self.path} was replaced or removed while it was in use (only the last "
                f"{MOST_OPEN} files are kept open): load the checkpoint again"
            )
        return opened

    def fill(self, entry: TensorEntry, into: Tensor, start: int) -> None:
        """Read the entry's bytes from `start` on into all of a contiguous CPU tensor."""
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
    """One tensor of a checkpoint. Everything that reads it may raise `CheckpointError`.

    Attributes:
        file: holds it.
        entry: its name, dtype, shape and place in the file.
    """

    def __init__(self, file: StoredFile, entry: TensorEntry) -> None:
        self.file, self.entry = file, entry

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
        """Its bytes, also of dtypes that torch lacks, each time in new memory of a few MiB."""
        for start in range(0, self.nbytes, PIECE_BYTES):
            piece = torch.empty(min(PIECE_BYTES, self.nbytes - start), dtype=torch.uint8)
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
