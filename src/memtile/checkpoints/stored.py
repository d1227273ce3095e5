"""Tensors that lie in safetensors files, read piece by piece and never mapped."""

import os
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from memtile.checkpoints import header
from memtile.checkpoints.header import Entry
from memtile.errors import CheckpointError, HomeIOError
from memtile.homes import disk_io

PIECE_BYTES: Final = 4 << 20


class StoredFile:
    """One open safetensors file; it is closed when nothing refers to it any more.

    Args:
        path: of the file.

    Attributes:
        path: of the file.
        fd: open for reading.
        header: what it holds.

    Raises:
        CheckpointError: it cannot be opened, or is not a whole safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened ({error.strerror})") from error
        self._closing = weakref.finalize(self, os.close, self.fd)
        try:
            self.header = self._read_header()
        except BaseException:
            self._closing()  # not when the traceback goes
            raise
        self._identity = self._stat()

    def _read_header(self) -> header.Header:
        where, size = str(self.path), os.fstat(self.fd).st_size
        try:
            length = header.header_bytes(os.pread(self.fd, header.LENGTH_BYTES, 0), size, where)
            raw = os.pread(self.fd, length, header.LENGTH_BYTES)
        except OSError as error:  # a folder, say
            raise CheckpointError(f"{where} cannot be read ({error.strerror})") from error
        return header.unpack(raw, size, where)

    def _stat(self) -> tuple[int, int]:
        found = os.fstat(self.fd)
        return found.st_size, found.st_mtime_ns

    def check_unchanged(self) -> None:
        """Refuses a file that was written to since it was opened.

        Raises:
            CheckpointError: it was.
        """
        if self._stat() != self._identity:
            raise CheckpointError(
                f"{self.path} was written to while it was in use: what was read of it may be "
                "mixed; load it again, and write checkpoints into another folder"
            )

    def fill(self, entry: Entry, into: Tensor, start: int) -> None:
        """Read the entry's bytes from `start` on into all of a contiguous CPU tensor.

        Raises:
            CheckpointError: the system could not, or the file is shorter by now.
        """
        try:
            disk_io.fill(self.fd, disk_io.bytes_of(into), entry.offset + start)
        except HomeIOError as error:
            raise CheckpointError(
                f"{self.path}: {entry.name!r} could not be read ({error})"
            ) from error


class StoredTensor:
    """One tensor of a checkpoint.

    Attributes:
        file: which holds it.
        entry: its place there.
    """

    def __init__(self, file: StoredFile, entry: Entry) -> None:
        self.file, self.entry = file, entry

    @property
    def shape(self) -> torch.Size:
        """Its shape."""
        return self.entry.shape

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype in the file."""
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
