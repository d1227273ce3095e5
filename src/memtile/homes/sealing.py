"""The format of a sealed home, and how a live file becomes one.

A header, the tiles page-aligned as they lived, and behind them a table in JSON: of each tile its
label, shape, dtype, offset, bytes and CRC-32. The header tells where the table is, how long the
file is, and carries the table's CRC-32 and its own, so that a file that was cut short, or changed
anywhere that matters, is recognised.
"""

import json
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch

from memtile.errors import HomeIOError, SealError
from memtile.homes import disk_io
from memtile.homes.buffers import pieces
from memtile.homes.home import whole_pages
from memtile.homes.live_file import LiveFile

NAME: Final = "tiles.memtile"
MAGIC: Final = b"memtile\x00"
VERSION: Final = 1
_HEADER: Final = struct.Struct("<8sIIQQQ")
_CRC: Final = struct.Struct("<I")
HEADER_BYTES: Final = _HEADER.size + _CRC.size


class Header(NamedTuple):
    """What a sealed file begins with, the magic and the header's own CRC-32 apart.

    Attributes:
        version: of the format.
        table_crc: the CRC-32 of the table.
        table_offset: where the table begins.
        table_bytes: how long it is.
        file_bytes: how long the file is.
    """

    version: int
    table_crc: int
    table_offset: int
    table_bytes: int
    file_bytes: int

    def packed(self) -> bytes:
        """As it stands in the file."""
        body = _HEADER.pack(MAGIC, *self)
        return body + _CRC.pack(zlib.crc32(body))


@dataclass(frozen=True)
class Entry:
    """One tile of a sealed file.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor.
        offset: where its bytes begin in the file.
        nbytes: how many they are.
        crc: their CRC-32.
    """

    shape: torch.Size
    dtype: torch.dtype
    offset: int
    nbytes: int
    crc: int


class Record(NamedTuple):
    """One tile of a live file that is to be sealed."""

    label: str
    shape: torch.Size
    dtype: torch.dtype
    offset: int
    nbytes: int


def seal(file: LiveFile, fd: int, records: Sequence[Record], *, replace: bool) -> None:
    """Makes a live file a sealed one, under its name in its folder.

    An older sealed file stays whole until the new one is complete on the disk.

    Args:
        file: the live file.
        fd: what to read the tiles from.
        records: the tiles.
        replace: whether an older sealed file may be there.

    Raises:
        SealError: a label is there twice; nothing was changed.
        HomeError: a sealed file is there, and is not to be replaced.
        HomeIOError: reading or writing failed; an older sealed file is as it was.
    """
    _check_labels(records)
    table = _table(records, [_crc(fd, record) for record in records])
    header = Header(VERSION, zlib.crc32(table), file.size, len(table), file.size + len(table))
    disk_io.drain(file.fd, memoryview(table), file.size)
    disk_io.drain(file.fd, memoryview(header.packed()), 0)
    try:
        file.publish(NAME, header.file_bytes, replace=replace)
    except OSError as error:
        raise HomeIOError(
            error.errno,
            f"sealing into {file.folder} failed ({error.strerror}): nothing there was changed; "
            "close the home again when the disk works",
        ) from error


def unpack_header(raw: bytes, where: str) -> Header:
    """The header in the first bytes of a file.

    Raises:
        SealError: it is not one of a sealed file, or of another version, or not whole.
    """
    if not raw or raw[: len(MAGIC)] != MAGIC[: len(raw)]:
        raise SealError(f"{where} is not a sealed memtile home: it must begin with {MAGIC!r}")
    if len(raw) < HEADER_BYTES:
        raise SealError(f"{where} is cut short: {len(raw)} bytes; {_START_ANEW}")
    header = Header(*_HEADER.unpack_from(raw)[1:])
    if header.version != VERSION:
        raise SealError(
            f"{where} is of version {header.version} of the format, this memtile reads {VERSION}: "
            "open it with the memtile that made it, and load from a checkpoint here"
        )
    if raw != header.packed():
        raise SealError(f"{where}: its header is corrupt; {_START_ANEW}")
    return header


def unpack_table(raw: bytes, header: Header, where: str) -> dict[str, Entry]:
    """The tiles of a sealed file by their labels.

    Raises:
        SealError: it is corrupt.
    """
    if zlib.crc32(raw) != header.table_crc:
        raise SealError(f"{where}: its table is corrupt; {_START_ANEW}")
    try:
        entries = {label: _entry(*fields) for label, *fields in json.loads(raw)}
    except (ValueError, TypeError, AttributeError) as error:  # a right CRC over a wrong table
        raise SealError(f"{where}: its table has no meaning ({error}); {_START_ANEW}") from error
    for label, entry in entries.items():
        _check_entry(label, entry, header, where)
    return entries


_START_ANEW: Final = "remove it, and load the tiles from a checkpoint"


def _check_labels(records: Sequence[Record]) -> None:
    twice = [label for label, times in Counter(r.label for r in records).items() if times > 1]
    if twice:
        raise SealError(
            f"the label {twice[0]!r} is on more than one berth: each label is of one tile; change "
            "it and close the home again"
        )


def _table(records: Sequence[Record], crcs: Sequence[int]) -> bytes:
    rows = [
        [r.label, list(r.shape), str(r.dtype).removeprefix("torch."), r.offset, r.nbytes, crc]
        for r, crc in zip(records, crcs, strict=True)
    ]
    return json.dumps(rows).encode()


def _crc(fd: int, record: Record) -> int:
    crc = 0
    for start, piece in pieces(whole_pages(record.nbytes)):
        raw = disk_io.bytes_of(piece)
        disk_io.fill(fd, raw, record.offset + start)
        crc = zlib.crc32(raw[: record.nbytes - start], crc)
    return crc


def _entry(shape: list[int], dtype: str, offset: int, nbytes: int, crc: int) -> Entry:
    known = getattr(torch, dtype)
    if not isinstance(known, torch.dtype):
        raise TypeError(f"{dtype} is no dtype")
    return Entry(torch.Size(shape), known, offset, nbytes, crc)


def _check_entry(label: str, entry: Entry, header: Header, where: str) -> None:
    size = entry.shape.numel() * entry.dtype.itemsize
    end = entry.offset + whole_pages(entry.nbytes)
    inside = entry.offset >= 0 and end <= header.table_offset
    if entry.nbytes != size or min(entry.shape, default=0) < 0 or not inside:
        raise SealError(f"{where}: its table places {label!r} where it cannot be; {_START_ANEW}")
