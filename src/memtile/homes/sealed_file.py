"""What is left of a kept home once it is closed: a sealed file, verified before it is trusted."""

import os
import stat
import weakref
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch

from memtile.errors import HomeError, SealError
from memtile.homes import disk_io, sealing
from memtile.homes.buffers import pieces
from memtile.homes.home import Berth, whole_pages
from memtile.homes.sealing import Entry


class SealedFile:
    """The tiles of a sealed home, to be copied into a live one; made by `SealedFile.open`.

    Attributes:
        path: where it is.
        entries: the tiles by their labels.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd
        self._cleanup = weakref.finalize(self, os.close, fd)
        try:
            self.entries: Mapping[str, Entry] = MappingProxyType(_verified(path, fd))
        except BaseException:
            self._cleanup()  # not when the traceback goes
            raise

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "SealedFile":
        """Opens a sealed file and verifies its header, its length and its table.

        The tiles themselves are verified by `copy_to`.

        Raises:
            SealError: it is missing, not a sealed home, of another version, cut short or corrupt.
        """
        place = Path(path).absolute()
        try:
            fd = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise SealError(
                f"{place} cannot be opened ({error.strerror}): a home leaves it when it was made "
                "with keep=True and closed; begin with DiskHome(folder, keep=True)"
            ) from error
        return cls(place, fd)

    def check_matches(self, expected: Mapping[str, tuple[Sequence[int], torch.dtype]]) -> None:
        """Refuses a file whose tiles are not the expected ones.

        Args:
            expected: shape and dtype of each tile by its label.

        Raises:
            SealError: a tile is missing, is one too many, or has another shape or dtype.
        """
        for label, (shape, dtype) in expected.items():
            entry = self._entry(label)
            if entry.shape != torch.Size(shape) or entry.dtype is not dtype:
                raise self._of_another_model(
                    f"{label!r} is {tuple(entry.shape)} {entry.dtype} there, the model's is "
                    f"{tuple(shape)} {dtype}"
                )
        for label in self.entries:
            if label not in expected:
                raise self._of_another_model(f"it has {label!r}, which the model has not")

    def check_sums(self) -> None:
        """Reads every tile and verifies its checksum, before anything is made of them.

        Raises:
            SealError: the bytes of a tile are not those that were sealed.
            HomeIOError: reading failed.
            HomeError: this file is closed.
        """
        for label, entry in self.entries.items():
            crc = 0
            for start, piece in pieces(whole_pages(entry.nbytes)):
                raw = disk_io.bytes_of(piece)
                disk_io.fill(self._open_fd(), raw, entry.offset + start)
                crc = zlib.crc32(raw[: entry.nbytes - start], crc)
            self._check_sum(label, crc)

    def _check_sum(self, label: str, crc: int) -> None:
        if crc != self.entries[label].crc:
            raise SealError(
                f"{self.path}: the bytes of {label!r} are not those that were sealed; the file is "
                "corrupt: remove it, and load the tiles from a checkpoint"
            )

    def copy_to(self, label: str, berth: Berth) -> None:
        """Copies one tile into a berth, a piece of at most 4 MiB at a time, and verifies it.

        Args:
            label: of the tile.
            berth: of its shape and dtype.

        Raises:
            SealError: there is no such tile, it does not fit the berth, or its bytes are not those
                that were sealed; what the berth then holds is undefined.
            HomeIOError: reading or writing failed, likewise.
            HomeError: this file, or the berth's home, is closed.
        """
        entry, crc = self._entry(label), 0
        self.check_fits(label, berth)
        for start, piece in pieces(berth.room):
            raw = disk_io.bytes_of(piece)
            disk_io.fill(self._open_fd(), raw, entry.offset + start)
            crc = zlib.crc32(raw[: entry.nbytes - start], crc)
            berth.write(piece, start)
        self._check_sum(label, crc)

    def check_fits(self, label: str, berth: Berth) -> None:
        """Refuses a berth of another shape or dtype than the tile.

        Raises:
            SealError: it is one, or there is no such tile.
        """
        entry = self._entry(label)
        if entry.shape != berth.shape or entry.dtype is not berth.dtype:
            raise self._of_another_model(
                f"{label!r} is {tuple(entry.shape)} {entry.dtype} there, the berth is "
                f"{tuple(berth.shape)} {berth.dtype}"
            )

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        self._cleanup()

    def _open_fd(self) -> int:
        if not self._cleanup.alive:
            raise HomeError(f"{self.path} was closed; open it again with SealedFile.open")
        return self._fd

    def _entry(self, label: str) -> Entry:
        try:
            return self.entries[label]
        except KeyError:
            raise self._of_another_model(f"it has no {label!r}") from None

    def _of_another_model(self, difference: str) -> SealError:
        return SealError(
            f"{self.path} is of another model, or of this one cut otherwise: {difference}; tile "
            "with the sizes and the dtype that it was sealed with, or begin in an empty folder"
        )

    def __enter__(self) -> "SealedFile":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"SealedFile({str(self.path)!r}, {len(self.entries)} tiles)"


def _verified(path: Path, fd: int) -> dict[str, Entry]:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise SealError(f"{path} is not a file; give the {sealing.NAME} of a sealed home")
    size = status.st_size
    header = sealing.unpack_header(_read(fd, 0, min(size, sealing.HEADER_BYTES)), str(path))
    if size != header.file_bytes or header.table_offset + header.table_bytes != size:
        raise SealError(
            f"{path} is {size} bytes long, and was sealed with {header.file_bytes}: it was cut "
            "short or added to; remove it, and load the tiles from a checkpoint"
        )
    table = _read(fd, header.table_offset, header.table_bytes)
    return sealing.unpack_table(table, header, str(path))


def _read(fd: int, offset: int, size: int) -> bytes:
    raw = bytearray(size)
    disk_io.fill(fd, memoryview(raw), offset)
    return bytes(raw)
