"""Writing checkpoints tensor by tensor, with shards and index as transformers names them.

The old checkpoint of a folder stays whole until the new one is: new shards never take a name that
is in use, and one rename, of the only file or of the index, replaces the old one.
"""

import contextlib
import json
import os
import re
import secrets
import zlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from memtile.checkpoints import header
from memtile.checkpoints.opening import INDEX_SUFFIX, PARTIAL, SUFFIX
from memtile.checkpoints.publishing import (
    discard,
    new_file,
    rename,
    replace_file,
    sole_writer,
    sync_folder,
)
from memtile.errors import ArgumentError, CheckpointError
from memtile.homes import disk_io

SHARD_BYTES: Final = 5_000_000_000  # what the Hub recommends

_HEADER_OVERHEAD: Final = 200  # bytes of a header beside its tensors
_SHOWN: Final = 40  # characters of a name that is too long


@dataclass(frozen=True)
class Outgoing:
    """One tensor to be written.

    `pieces` gives its bytes in order, in contiguous CPU tensors; each is written before the next is
    asked for. Tensors with the same `block`, unless it is None, come into one file.
    """

    name: str
    dtype: torch.dtype | str  # torch's, or safetensors' name of one that torch lacks
    shape: torch.Size
    pieces: Callable[[], Iterable[Tensor]]
    block: Hashable = None

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "Outgoing":
        """A tensor that is in memory."""
        return cls(name, tensor.dtype, tensor.shape, lambda: [tensor.detach().cpu().contiguous()])

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return header.tensor_bytes(self.kind, self.shape)

    @property
    def kind(self) -> str:
        """safetensors' name of its dtype; CheckpointError where it has none."""
        return self.dtype if isinstance(self.dtype, str) else header.dtype_name(self.dtype)


def write_checkpoint(
    folder: "str | os.PathLike[str]",
    tensors: Sequence[Outgoing],
    *,
    max_shard_bytes: int = SHARD_BYTES,
    stem: str = "model",
    beside: Mapping[str, bytes | Path] | None = None,
    parameters: int | None = None,
) -> None:
    """Write a checkpoint into a folder, replacing the one in it.

    Args:
        folder: made where it is missing.
        tensors: what to write.
        max_shard_bytes: no file is larger, unless one tensor is. A header larger than safetensors
            reads is split too.
        stem: of the files' names.
        beside: small files by name: their content, or the file to copy. They are replaced just
            before the tensors are.
        parameters: how many numbers the model has, for the index; None: it does not say.

    Raises:
        ArgumentError: `max_shard_bytes` is no size.
        CheckpointError: two tensors have one name, or a dtype has no name in safetensors.
        CheckpointWriteError: it could not be written, or another run is writing there; what was
            there is as it was.
    """
    if type(max_shard_bytes) is not int or max_shard_bytes < 1:
        raise ArgumentError(
            f"max_shard_bytes={max_shard_bytes!r} must be a whole number of bytes, at least 1"
        )
    _check_names(tensors)
    place = Path(folder)
    with sole_writer(place):
        shards = _in_shards(tensors, max_shard_bytes)
        names = _free_names(place, stem, len(shards))
        written: list[Path] = []
        try:
            for name, shard in zip(names, shards, strict=True):
                written.append(_write_partial(place / name, shard))
            for name, content in (beside or {}).items():
                replace_file(place / name, content)
            if len(names) == 1:
                rename(written[0], place / names[0])
            else:
                _publish(place, stem, names, written, shards, parameters)
        except BaseException:
            for path in written:
                discard(path)
            raise
        _remove_others(place, stem, names)


def _check_names(tensors: Iterable[Outgoing]) -> None:
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise CheckpointError(
                f"two tensors are named {tensor.name!r}; give each a name of its own"
            )
        seen.add(tensor.name)
        entry_bytes = header.max_entry_bytes(tensor.name, tensor.kind, tensor.shape)
        limit = header.MAX_HEADER_BYTES
        if entry_bytes > limit - _HEADER_OVERHEAD:
            raise CheckpointError(
                f"the name {tensor.name[:_SHOWN]!r}… has {len(tensor.name)} characters, and a "
                f"header of safetensors {limit} bytes; give the tensor a shorter name"
            )


def _in_shards(tensors: Sequence[Outgoing], max_shard_bytes: int) -> list[list[Outgoing]]:
    """The tensors of each file, by the limits of its bytes and of its header's.

    As huggingface_hub deals them out: what is above the limit has a file of its own, before the
    one that is being filled.
    """
    shards, filling = list[list[Outgoing]](), list[Outgoing]()
    size, header_size, header_limit = 0, 0, header.MAX_HEADER_BYTES - _HEADER_OVERHEAD
    for block in _blocks(tensors):
        own_size = sum(tensor.nbytes for tensor in block)
        own = sum(header.max_entry_bytes(each.name, each.kind, each.shape) for each in block)
        if own_size > max_shard_bytes and own <= header_limit:
            shards.append(block)
            continue
        is_full = size + own_size > max_shard_bytes or header_size + own > header_limit
        if filling and is_full:
            shards.append(filling)
            filling, size, header_size = [], 0, 0
        filling += block
        size += own_size
        header_size += own
    return [*shards, filling] if filling or not shards else shards


def _blocks(tensors: Iterable[Outgoing]) -> list[list[Outgoing]]:
    """The tensors, with those of one block together, where its first one stands."""
    blocks: dict[Hashable, list[Outgoing]] = {}
    for number, tensor in enumerate(tensors):
        key = (False, number) if tensor.block is None else (True, tensor.block)
        blocks.setdefault(key, []).append(tensor)
    return list(blocks.values())


def _free_names(folder: Path, stem: str, count: int) -> list[str]:
    """Names for the files; shards take no existing one, since an old index may name it."""
    if count == 1:
        return [stem + SUFFIX]
    for mark in ("", f"-{secrets.token_hex(4)}"):
        names = [f"{stem}{mark}-{i:05}-of-{count:05}{SUFFIX}" for i in range(1, count + 1)]
        if not any((folder / name).exists() for name in names):
            break
    return names


def _write_partial(target: Path, tensors: Sequence[Outgoing]) -> Path:
    """One complete file under a partial name; the header is written last, with the checksums."""
    ordered = sorted(tensors, key=lambda tensor: -header.BITS[tensor.kind])  # each one aligned
    shapes = [(tensor.name, tensor.kind, tensor.shape) for tensor in ordered]
    offset = len(header.pack(shapes))
    with new_file(target) as (fd, partial):
        os.posix_fallocate(fd, 0, offset + sum(tensor.nbytes for tensor in ordered))
        crcs = {}
        for tensor in ordered:
            crcs[tensor.name] = _write_tensor(fd, tensor, offset)
            offset += tensor.nbytes
        disk_io.drain(fd, memoryview(header.pack(shapes, crcs)), 0)
    return partial


def _write_tensor(fd: int, tensor: Outgoing, offset: int) -> int:
    crc = done = 0
    for piece in tensor.pieces():
        raw = disk_io.bytes_of(piece)
        disk_io.drain(fd, raw, offset + done)
        crc = zlib.crc32(raw, crc)
        done += len(raw)
    if done != tensor.nbytes:
        raise AssertionError(f"{tensor.name}: {done} bytes came, {tensor.nbytes} were announced")
    return crc


def _publish(
    folder: Path,
    stem: str,
    names: list[str],
    partials: list[Path],
    shards: list[list[Outgoing]],
    parameters: int | None,
) -> None:
    """Rename the shards, then replace the index."""
    places = {
        tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard
    }
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    counted = {} if parameters is None else {"total_parameters": parameters}
    content = {"metadata": {**counted, "total_size": total}, "weight_map": places}
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    index = folder / (stem + INDEX_SUFFIX)
    try:
        for partial, name in zip(partials, names, strict=True):
            rename(partial, folder / name)
        replace_file(index, text)
    except BaseException:
        # After a Ctrl-C the index may be the new one already: then the new shards are needed.
        if not (index.exists() and index.read_text() == text):
            for name in names:
                discard(folder / name)
        raise


def _remove_others(folder: Path, stem: str, names: Sequence[str]) -> None:
    """Remove the old checkpoint, and half-written files of killed processes."""
    own = (stem + SUFFIX, stem + INDEX_SUFFIX)
    shard = re.compile(
        rf"{re.escape(stem)}(-[0-9a-f]{{8}})?-\d{{5,}}-of-\d{{5,}}{re.escape(SUFFIX)}"
    )
    # The index or single file goes first, so that no reader finds an index without its shards.
    with contextlib.suppress(OSError):
        (folder / (stem + (INDEX_SUFFIX if len(names) == 1 else SUFFIX))).unlink(missing_ok=True)
        sync_folder(folder)
        for path in list(folder.iterdir()):
            name, mark, _ = path.name.partition(PARTIAL)
            is_ours = shard.fullmatch(name) or (mark and name in own)
            if is_ours and path.name not in names:
                path.unlink(missing_ok=True)
