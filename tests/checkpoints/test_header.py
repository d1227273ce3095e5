"""A header is believed only when it describes its file exactly."""

import struct

import pytest
import torch
from safetensors.torch import load, save
from safetensors_files import entry, ragged_tensors, raw_file, same_tensors

from memtile.checkpoints import Checkpoint, StoredFile, header
from memtile.errors import CheckpointError


def test_what_safetensors_writes_is_read(tmp_path):
    """Every dtype and shape of a file that the library wrote is found, bit for bit."""
    tensors = ragged_tensors()
    path = tmp_path / "model.safetensors"
    path.write_bytes(save(tensors, {"format": "pt", "more": "words"}))

    found = StoredFile(path)

    checkpoint = Checkpoint.open(path)
    assert same_tensors({name: stored.read() for name, stored in checkpoint.items()}, tensors)
    assert found.header.metadata == {"format": "pt", "more": "words"}


def test_a_packed_header_is_what_safetensors_reads():
    """A header with checksums is a valid one, of the length that it has without them."""
    shapes = [("a", torch.float32, (2, 3)), ("b", torch.bfloat16, (5,))]
    data = bytes(range(34))

    packed = header.pack(shapes, {"format": "pt"}, {"a": 1, "b": 0xFFFFFFFF})

    assert len(packed) == len(header.pack(shapes, {"format": "pt"}))
    assert {name: (t.dtype, t.shape) for name, t in load(packed + data).items()} == {
        "a": (torch.float32, (2, 3)),
        "b": (torch.bfloat16, (5,)),
    }
    found = header.unpack(packed[8:], len(packed) + 34, "here")
    assert {name: found.entries[name].crc for name in "ab"} == {"a": 1, "b": 0xFFFFFFFF}


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
        ({"a": entry("F4", [2], 0, 1)}, "kept as F4, which memtile cannot read"),
        ({"a": entry("F32", [1], 4, 8)}, "begins at byte"),
        ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, "begins at byte"),
        ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 4, 8)}, "not whole"),
        ({}, "not whole"),
        ({"__metadata__": {"memtile.crc32": "{"}, "a": entry("F32", [1], 0, 4)}, "no meaning"),
        ({"__metadata__": 5, "a": entry("F32", [1], 0, 4)}, "no meaning"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(tmp_path, table, why):
    """Nonsense of any kind is a CheckpointError that names the file."""
    path = raw_file(tmp_path / "bad.safetensors", table, b"1234")

    with pytest.raises(CheckpointError, match=why) as raised:
        StoredFile(path)
    assert "bad.safetensors" in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"123", struct.pack("<Q", 1), b"PK\3\4" + bytes(60)])
def test_what_is_no_safetensors_file_is_refused(tmp_path, content):
    """An empty file, a short one and another format are told apart from a damaged header."""
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match=r"not whole|no safetensors file"):
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
    """What safetensors cannot hold is said, with the way out."""
    with pytest.raises(CheckpointError, match=r"no name for torch\.complex128; cast"):
        header.dtype_name(torch.complex128)


def test_metadata_that_others_wrote_is_no_checksum(tmp_path):
    """A file of another library has no checksums to verify."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(save({"a": torch.arange(5.0)}, {"format": "pt"}))

    assert Checkpoint.open(path).check_sums() == 0
