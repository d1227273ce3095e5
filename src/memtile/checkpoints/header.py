"""The header of a safetensors file: read and checked, and written.

A file is the header's length (8 bytes, little endian), the header (JSON), and the tensors' bytes
without gaps. Source: the format's description in the safetensors project. memtile adds the CRC-32
of each tensor to the header's metadata, which other readers ignore.
"""

import json
import math
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from memtile.errors import CheckpointError

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
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
# Bits of an element of each dtype of safetensors; torch lacks some of the dtypes.
BITS: Final[Mapping[str, int]] = {
    **{name: 8 * dtype.itemsize for name, dtype in DTYPES.items()},
    **{"F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}
CHECKSUMS: Final = "memtile.crc32"  # the metadata key of the tensors' checksums
LENGTH_BYTES: Final = 8
MAX_HEADER_BYTES: Final = 100_000_000  # bytes of a header: the limit of the safetensors library

NO_PICKLES: Final = (
    "pickles can run any code, so they are never loaded; load it with the library that wrote it, "
    "and save it as safetensors (a folder of transformers: from_pretrained, and save_pretrained to "
    "another folder)"
)
NO_GGUF: Final = (
    "have transformers write it as safetensors, by from_pretrained(folder, gguf_file=name) (where "
    "it has GgufConfig, with quantization_config=GgufConfig(dequantize=True)) and save_pretrained "
    "of its model and of its tokenizer"
)

_ENTRY_OVERHEAD: Final = 140  # brackets, quotes, words and offsets of a tensor, and its checksum
_DTYPE_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT: Final = 8


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file."""

    name: str
    kind: str  # safetensors' name of its dtype
    shape: torch.Size
    offset: int  # of its first byte in the file
    nbytes: int
    crc: int | None = None  # CRC-32 of its bytes, where the file has one

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype; CheckpointError where torch has none: its bytes can still be copied."""
        if self.kind not in DTYPES:
            raise CheckpointError(
                f"{self.name!r} is kept as {self.kind}, which memtile can show and copy, but "
                "neither load nor cut; save it in another dtype with the library that made it"
            )
        return DTYPES[self.kind]


def header_length(raw: bytes, file_bytes: int, where: str) -> int:
    """The header's length, from a file's first bytes; CheckpointError where it can be none."""
    if len(raw) < LENGTH_BYTES:
        raise _not_whole(where, f"it has {file_bytes} bytes, fewer than a header")
    length = int.from_bytes(raw[:LENGTH_BYTES], "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise CheckpointError(f"{where} {_what_else(raw[:LENGTH_BYTES])}")
    if LENGTH_BYTES + length > file_bytes:
        raise _not_whole(where, f"its header has {length} bytes, the file {file_bytes}")
    return length


def unpack(raw: bytes, file_bytes: int, where: str) -> dict[str, TensorEntry]:
    """The tensors by name, in the order of their bytes, from the header's JSON.

    CheckpointError where it is no header of a file of this length.
    """
    try:
        table = parse_json(raw)
        metadata = dict(table.pop("__metadata__", None) or {})
        crcs = parse_json(metadata.get(CHECKSUMS, "{}"))
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
    return {entry.name: entry for entry in entries}


def parse_json(raw: bytes | str) -> Any:  # any JSON
    """Parse JSON; ValueError where an object has a name twice: readers differ on which counts."""
    return json.loads(raw, object_pairs_hook=_named_once)


def pack(
    tensors: Sequence[tuple[str, str, Sequence[int]]], crcs: Mapping[str, int] | None = None
) -> bytes:
    """The beginning of a file with these tensors: name, safetensors' dtype and shape of each.

    Its length does not depend on the checksums.
    """
    known = {name: f"{(crcs or {}).get(name, 0):08x}" for name, _, _ in tensors}
    metadata = {"format": "pt", CHECKSUMS: json.dumps(known)}  # transformers asks for the format
    table: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name, kind, shape in tensors:
        nbytes = tensor_bytes(kind, shape)
        place = [start, start + nbytes]
        table[name] = {"dtype": kind, "shape": list(shape), "data_offsets": place}
        start += nbytes
    raw = json.dumps(table, separators=(",", ":")).encode()
    raw += b" " * (-(LENGTH_BYTES + len(raw)) % _ALIGNMENT)
    return len(raw).to_bytes(LENGTH_BYTES, "little") + raw


def max_entry_bytes(name: str, kind: str, shape: Sequence[int]) -> int:
    """The most bytes of a header that one tensor takes, its checksum included."""
    quoted = json.dumps(name)
    texts = (quoted, json.dumps(quoted), kind, json.dumps(list(shape)))
    return sum(map(len, texts)) + _ENTRY_OVERHEAD


def tensor_bytes(kind: str, shape: Sequence[int]) -> int:
    """The bytes of a tensor; ValueError where it does not end at a whole byte."""
    # not torch.Size.numel(), which overflows: 2**40 × 2**40 would have no bytes
    nbytes, rest = divmod(math.prod(shape) * BITS[kind], 8)
    if rest:
        raise ValueError(f"{tuple(shape)} {kind} does not end at a whole byte")
    return nbytes


def dtype_name(dtype: torch.dtype) -> str:
    """safetensors' name of a dtype; CheckpointError where it has none."""
    if dtype not in _DTYPE_NAMES:
        raise CheckpointError(
            f"safetensors has no name for {dtype}; cast what is {dtype} before it is saved"
        )
    return _DTYPE_NAMES[dtype]


def _entry(
    name: str, fields: Mapping[str, Any], start: int, crcs: Mapping[str, str]
) -> TensorEntry:
    kind = fields["dtype"]
    if kind not in BITS:
        raise CheckpointError(
            f"{name!r} is kept as {kind}, which is no dtype of safetensors; save it in one of "
            f"{', '.join(BITS)} with the library that made it"
        )
    shape = torch.Size(fields["shape"])
    first, last = (operator.index(offset) for offset in fields["data_offsets"])
    if min(shape, default=0) < 0 or last - first != tensor_bytes(kind, shape):
        raise ValueError(f"{name} has {last - first} bytes, not those of {tuple(shape)} {kind}")
    crc = crcs.get(name)
    return TensorEntry(
        name, kind, shape, start + first, last - first, None if crc is None else int(crc, 16)
    )


def _named_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:  # any JSON
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r} is there twice")
    return found


def _what_else(first: bytes) -> str:
    """What a file that is not safetensors is, by its first bytes."""
    if first.startswith(b"GGUF"):
        return f"is a GGUF file, and memtile reads safetensors; {NO_GGUF}"
    if first.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return f"is a pickle or a zip archive, and memtile reads safetensors: {NO_PICKLES}"
    return (
        f"is no safetensors file: its first bytes are {first!r}; give one that safetensors wrote, "
        "and convert others with the library that made them"
    )


def _check_places(entries: Sequence[TensorEntry], start: int, file_bytes: int, where: str) -> None:
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
