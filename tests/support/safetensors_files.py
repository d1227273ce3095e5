"""Safetensors files made byte by byte, and small tensors to put into them."""

import json
import struct
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memtile.checkpoints import Outgoing, write_checkpoint


def raw_file(path: Path, header: Any, data: bytes = b"") -> Path:
    """A file with this header, whatever it says, and these bytes behind it."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(dtype: str, shape: list[Any], start: Any, stop: Any) -> dict[str, Any]:
    """One tensor of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def ragged_tensors(seed: int = 0) -> dict[str, Tensor]:
    """Tensors of many dtypes and shapes, without elements and dimensions too."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (7, 5), "b": (3,), "scalar": (), "none": (0, 4), "c": (2, 3, 4)}
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    found["half"] = found["a"].half()[:5].contiguous()
    found["brain"] = found["a"].bfloat16()
    found["double"] = found["c"].double()
    found["whole"] = torch.arange(11) + seed
    found["byte"] = torch.arange(13, dtype=torch.uint8)
    found["truth"] = torch.tensor([True, False, True])
    return found


def outgoing_of(tensors: dict[str, Tensor]) -> list[Outgoing]:
    """Those tensors, to be written."""
    return [Outgoing.of(name, tensor) for name, tensor in tensors.items()]


def same_tensors(one: Any, other: Any) -> bool:
    """Whether two mappings have the same names, dtypes, shapes and bits."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name])
        for name in other
    )


def write_without_end(said: Connection, folder: Path, seed: int) -> None:
    """Write one checkpoint after another into the folder; say each one's seed."""
    said.send(seed)
    while True:
        seed += 1
        size = (150, 300, 10**9)[seed % 3]
        write_checkpoint(folder, outgoing_of(ragged_tensors(seed)), max_shard_bytes=size)
        said.send(seed)
