"""The header of a safetensors file: which tensor lies where, checked before it is trusted.

A file is the header's length (8 bytes, little endian), the header (JSON), and the tensors' bytes
without holes. Source: the format's description in the safetensors project. What memtile writes has
the CRC-32 of each tensor in the header's metadata, which other readers ignore.
"""

import json
import math
import operator
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import torch

from memtile.errors import CheckpointError

DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U64": torch.uint64,
        "U32": torch.uint32,
        "U16": torch.uint16,
        "U8": torch.uint8,
        "BOOL": torch.bool,
        "C64": torch.complex64,
    }
)
CHECKSUMS: Final = "memtile.crc32"
LENGTH_BYTES: Final = 8
LARGEST: Final = 100_000_000  # bytes of a header, as the safetensors library has it

_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT: Final = 8


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        name: of the tensor.
        dtype: of the tensor.
        shape: of the tensor.
        offset: where its bytes begin in the file.
        nbytes: how many they are.
        crc: their CRC-32, where the file tells it.
    """

    name: str
    dtype: torch.dtype
    shape: torch.Size
    offset: int
    nbytes: int
    crc: int | None = None


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        entries: the tensors by their names, in the order of their bytes.
        metadata: other texts.
    """

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


def header_bytes(raw: bytes, file_bytes: int, where: str) -> int:
    """How long the header is that follows these first bytes of a file.

    Raises:
        CheckpointError: no header can follow.
    """
    if len(raw) < LENGTH_BYTES:
        raise _not_whole(where, f"it has {file_bytes} bytes, fewer than a header")
    (length,) = struct.unpack("<Q", raw[:LENGTH_BYTES])
    if not 2 <= length <= LARGEST:
        raise CheckpointError(
            f"{where} is no safetensors file: its first bytes are {raw[:LENGTH_BYTES]!r}; give one "
            "that safetensors wrote, and convert others with the library that made them"
        )
    if LENGTH_BYTES + length > file_bytes:
        raise _not_whole(where, f"its header has {length} bytes, the file {file_bytes}")
    return int(length)


def unpack(raw: bytes, file_bytes: int, where: str) -> Header:
    """The header with this JSON.

    Args:
        raw: the header without its length.
        file_bytes: how long the file is.
        where: the file, for messages.

    Raises:
        CheckpointError: it is none, or does not describe a file of this length.
    """
    try:
        table = json.loads(raw)
        metadata = dict(table.pop("__metadata__", None) or {})
        crcs = json.loads(metadata.pop(CHECKSUMS, "{}"))
        start = LENGTH_BYTES + len(raw)
        entries = [_entry(name, fields, start, crcs) for name, fields in table.items()]
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: its header has no meaning ({type(error).__name__}: {error}); the file is "
            "damaged or half-written: take another copy of it"
        ) from error
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    _check_places(entries, start, file_bytes, where)
    return Header(MappingProxyType({entry.name: entry for entry in entries}), metadata)


def pack(
    tensors: Sequence[tuple[str, torch.dtype, Sequence[int]]],
    metadata: Mapping[str, str],
    crcs: Mapping[str, int] | None = None,
) -> bytes:
    """The beginning of a file with these tensors one after the other; its length knows no CRC.

    Args:
        tensors: name, dtype and shape of each.
        metadata: other texts.
        crcs: of each tensor; zeros by default, to be written over once they are known.
    """
    known = {name: f"{(crcs or {}).get(name, 0):08x}" for name, _, _ in tensors}
    table: dict[str, Any] = {"__metadata__": {**metadata, CHECKSUMS: json.dumps(known)}}
    start = 0
    for name, dtype, shape in tensors:
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        table[name] = {
            "dtype": dtype_name(dtype),
            "shape": list(shape),
            "data_offsets": [start, start + nbytes],
        }
        start += nbytes
    raw = json.dumps(table, separators=(",", ":")).encode()
    raw += b" " * (-(LENGTH_BYTES + len(raw)) % _ALIGNMENT)
    return struct.pack("<Q", len(raw)) + raw


def dtype_name(dtype: torch.dtype) -> str:
    """What safetensors calls a dtype.

    Raises:
        CheckpointError: it has no name for it.
    """
    if dtype not in _NAMES:
        raise CheckpointError(
            f"safetensors has no name for {dtype}; cast what is {dtype} before it is saved"
        )
    return _NAMES[dtype]


def _entry(name: str, fields: Mapping[str, Any], start: int, crcs: Mapping[str, str]) -> Entry:
    if fields["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{name!r} is kept as {fields['dtype']}, which memtile cannot read; save it in one of "
            f"{', '.join(DTYPES)} with the library that made it"
        )
    dtype, shape = DTYPES[fields["dtype"]], torch.Size(fields["shape"])
    first, last = (operator.index(offset) for offset in fields["data_offsets"])
    # not shape.numel(), which overflows: 2**40 × 2**40 would have no bytes
    if min(shape, default=0) < 0 or last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has {last - first} bytes, not those of {tuple(shape)} {dtype}")
    crc = crcs.get(name)
    return Entry(
        name, dtype, shape, start + first, last - first, None if crc is None else int(crc, 16)
    )


def _check_places(entries: Sequence[Entry], start: int, file_bytes: int, where: str) -> None:
    for entry in entries:
        if entry.offset != start:
            raise CheckpointError(
                f"{where}: {entry.name!r} begins at byte {entry.offset} and not at {start}: the "
                "header is damaged; take another copy of the file"
            )
        start += entry.nbytes
    if start != file_bytes:
        raise _not_whole(where, f"its tensors end at byte {start}, the file at {file_bytes}")


def _not_whole(where: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{where} is not whole: {why}; it was cut short, or writing it was never finished: take "
        "another copy of it"
    )
