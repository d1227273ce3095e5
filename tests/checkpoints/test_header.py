"""A header is accepted only when it describes its file exactly."""

import struct

import pytest
import torch
from safetensors.torch import load, save
from safetensors_files import entry, ragged_tensors, raw_file, same_tensors

from memtile.checkpoints import Checkpoint, StoredFile, header
from memtile.errors import CheckpointError


def test_what_safetensors_writes_is_read(tmp_path):
    """Every dtype and shape of a file written by safetensors is read bit for bit."""
    tensors = ragged_tensors()
    path = tmp_path / "model.safetensors"
    path.write_bytes(save(tensors, {"format": "pt", "more": "words"}))

    checkpoint = Checkpoint.open(path)

    assert same_tensors({name: stored.read() for name, stored in checkpoint.items()}, tensors)


def test_a_packed_header_is_what_safetensors_reads():
    """A header with checksums is a valid one, of the length that it has without them."""
    shapes = [("a", "F32", (2, 3)), ("b", "BF16", (5,))]
    data = bytes(range(34))

    packed = header.pack(shapes, {"a": 1, "b": 0xFFFFFFFF})

    assert len(packed) == len(header.pack(shapes))
    assert {name: (t.dtype, t.shape) for name, t in load(packed + data).items()} == {
        "a": (torch.float32, (2, 3)),
        "b": (torch.bfloat16, (5,)),
    }
    found = header.unpack(packed[8:], len(packed) + 34, "here")
    assert {name: found[name].crc for name in "ab"} == {"a": 1, "b": 0xFFFFFFFF}


@pytest.mark.parametrize(
    ("table", "why"),
    [
        (b"[" * 100_000, "no meaning"),
        (b"\xff\xfe{}", "no meaning"),
        (b"[]", "no meaning"),
        (b"77", "no meaning"),
        ({"a": 3}, "no meaning"),
        ({"a": {"dtype": "F32"}}, "no meaning"),
        ({"a": entry("F32", [2], 0, 4)}, "4 bytes, not those of"),
        ({"a": entry("F32", [-1], 0, 4)}, "4 bytes, not those of"),
        ({"a": entry("F32", [1.0], 0, 4)}, "no meaning"),
        ({"a": entry("F32", [1], 0.0, 4.0)}, "no meaning"),
        ({"a": entry("F32", [2**40, 2**40], 0, 0)}, "0 bytes, not those of"),
        ({"a": entry("F32", [2**63], 0, 4)}, "no meaning"),
        ({"a": entry("F3", [8], 0, 3)}, "kept as F3, which is no dtype of safetensors"),
        ({"a": entry("F4", [3], 0, 2)}, "does not end at a whole byte"),
        (b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":1}', "'a' is there twice"),
        (b'{"a":{"dtype":"U8","dtype":"U8"}}', "'dtype' is there twice"),
        ({"__metadata__": {"memtile.crc32": '{"a":"0","a":"1"}'}}, "'a' is there twice"),
        ({"a": entry("F32", [1], 4, 8)}, "begins at byte"),
        ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, "begins at byte"),
        ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 4, 8)}, "not whole"),
        ({}, "not whole"),
        ({"__metadata__": {"memtile.crc32": "{"}, "a": entry("F32", [1], 0, 4)}, "no meaning"),
        ({"__metadata__": 5, "a": entry("F32", [1], 0, 4)}, "no meaning"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(tmp_path, table, why):
    """An invalid header of any kind gives a CheckpointError that names the file."""
    path = raw_file(tmp_path / "bad.safetensors", table, b"1234")

    with pytest.raises(CheckpointError, match=why) as raised:
        StoredFile(path)
    assert "bad.safetensors" in str(raised.value)


def test_every_dtype_of_safetensors_is_carried(tmp_path):
    """Dtypes that torch lacks, also of less than a byte, are listed and their bytes read."""
    data = bytes(range(1, 25)) + bytes(range(3)) + b"\7"
    table = {
        "a": entry("F8_E8M0", [3, 5], 0, 15),
        "b": entry("F6_E2M3", [2, 6], 15, 24),
        "c": entry("F6_E3M2", [4], 24, 27),
        "d": entry("F4", [2], 27, 28),
    }
    path = raw_file(tmp_path / "model.safetensors", table, data)

    found = Checkpoint.open(path)

    assert {name: (t.entry.kind, tuple(t.shape)) for name, t in found.items()} == {
        name: (one["dtype"], tuple(one["shape"])) for name, one in table.items()
    }
    assert b"".join(bytes(piece.tolist()) for t in found.values() for piece in t.raw()) == data
    with pytest.raises(CheckpointError, match=r"'d' is kept as F4, which memtile can show and"):
        found["d"].read()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not whole"),
        (b"123", "not whole"),
        (struct.pack("<Q", 1), "no safetensors file"),
        (b"PK\3\4\0\0\10\10" + bytes(60), "a pickle or a zip archive"),
        (b"\x80\2}q\0X" + bytes(60), "a pickle or a zip archive"),
        (b"GGUF\3\0\0\0" + bytes(60), r"a GGUF file, and .* gguf_file=name"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path, content, why):
    """An empty file, a short one and other formats each have their message, with a way out."""
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match=why):
        StoredFile(path)


def test_every_truncation_is_noticed(tmp_path):
    """A file that lacks any number of bytes at its end is refused."""
    whole = save({"a": torch.arange(5.0), "b": torch.arange(3)})
    path = tmp_path / "short.safetensors"

    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            StoredFile(path)


def test_no_flipped_bit_of_a_header_is_a_crash(tmp_path):
    """Each flipped bit gives a CheckpointError, or a header that still fits its file."""
    whole = save({"a": torch.arange(5.0), "b": torch.arange(3)})
    (length,) = struct.unpack("<Q", whole[:8])
    path = tmp_path / "flipped.safetensors"
    refused = 0

    for bit in range((8 + length) * 8):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            for stored in Checkpoint.open(path).values():
                stored.read()
        except CheckpointError:
            refused += 1

    assert refused > length  # most of them


def test_a_dtype_without_a_name_is_refused():
    """A dtype without a name in safetensors is refused; the message says what to do."""
    with pytest.raises(CheckpointError, match=r"no name for torch\.complex128; cast"):
        header.dtype_name(torch.complex128)


def test_metadata_that_others_wrote_is_no_checksum(tmp_path):
    """A file of another library has no checksums to verify."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(save({"a": torch.arange(5.0)}, {"format": "pt"}))

    assert Checkpoint.open(path).check_sums() == 0
