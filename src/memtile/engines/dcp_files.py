"""Reads and writes the folders of `torch.distributed.checkpoint` (DCP), by all ranks or by one."""

import errno
import io
import mmap
import pickle
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from memtile.engines.ranks import Ranks
from memtile.errors import CheckpointError, CheckpointWriteError, way_out

DcpState = dict[str, Any]  # what DCP takes: tensors, dictionaries, anything


def write_shards(ranks: Ranks, state: DcpState, folder: Path) -> None:
    """Write what each rank holds; CheckpointWriteError where some rank could not."""
    writer = FileSystemWriter(folder)
    try:
        with ranks.answering(), _silent():
            state_dict_saver.save(
                state, storage_writer=writer, process_group=ranks.group, no_dist=ranks.is_alone
            )
    except CheckpointException as error:
        rank, cause = _first(error)
        said = cause if isinstance(cause, OSError) else OSError()
        raise CheckpointWriteError(
            said.errno or errno.EIO,
            f"{folder.parent} could not be written by rank {rank} ({cause}); what was there "
            f"before is as it was: {way_out(said)}",
        ) from error


def read_shards(ranks: Ranks, state: DcpState, folder: Path) -> None:
    """Read what each rank wants, in place; CheckpointError where some rank could not."""
    reader = PieceReader(folder)
    try:
        with ranks.answering(), _silent():
            state_dict_loader.load(
                state, storage_reader=reader, process_group=ranks.group, no_dist=ranks.is_alone
            )
    except CheckpointException as error:
        rank, cause = _first(error)
        raise CheckpointError(
            f"{folder} could not be read by rank {rank} ({cause}), and values may be of both runs "
            "now: load another checkpoint"
        ) from error


def read_alone(state: DcpState, folder: Path) -> None:
    """Read on this rank alone, in place; errors are DCP's own."""
    with _silent():
        state_dict_loader.load(state, storage_reader=PieceReader(folder), no_dist=True)


def _first(error: CheckpointException) -> tuple[int, BaseException]:
    rank, (cause, _) = next(iter(error.failures.items()))
    return rank, cause


@contextmanager
def _silent() -> Iterator[None]:
    """Without DCP's warning that one process works by itself, where that is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class PieceReader(FileSystemReader):
    """DCP's reader of folders, for tensors of which only pieces are wanted.

    DCP's own loads each saved tensor whole, once for each piece of it that is wanted: a layer of
    512 × 512 that was saved dense peaked at twice its size when a rank wanted 16 tiles of it,
    measured. Here the file is mapped, and each wanted piece is copied out of it.
    """

    def set_up_storage_reader(self, metadata: Metadata, *arguments: Any, **options: Any) -> None:
        """Remember what the checkpoint holds; arguments are the base class's own."""
        super().set_up_storage_reader(metadata, *arguments, **options)
        self._held = metadata.state_dict_metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy each wanted piece to its place."""
        requests: dict[MetadataIndex, list[ReadItem]] = {}
        for item in plan.items:
            if item.type == LoadItemType.TENSOR:
                requests.setdefault(item.storage_index, []).append(item)
        others = [item for item in plan.items if item.type != LoadItemType.TENSOR]
        for place, items in requests.items():
            stored = self._mapped(place)
            if stored is None:
                others.extend(items)
                continue
            for item in items:
                target = planner.resolve_tensor(item).detach()
                target.copy_(_part_of(stored, item))
                planner.commit_tensor(item, target)
        return super().read_data(replace(plan, items=others), planner)

    def _mapped(self, place: MetadataIndex) -> Tensor | None:
        """The tensor saved at a place, mapped; None where only torch can read it."""
        info, held = self.storage_data[place], self._held[place.fqn]
        if info.transform_descriptors or not isinstance(held, TensorStorageMetadata):
            return None
        path = self.fs.concat_path(self.path, info.relative_path)
        with self.fs.create_stream(path, "rb") as file:
            try:
                part = self._slice_file(file, info)
                archive: Any = torch._C.PyTorchFileReader(part)  # torch's stub lacks methods
                is_native = archive.get_record("byteorder").decode() == sys.byteorder
                layout = _LayoutUnpickler(io.BytesIO(archive.get_record("data.pkl"))).load()
                if not is_native or not isinstance(layout, _Layout):
                    return None
                key, numel = layout.storage
                offset = info.offset + archive.get_record_offset(f"data/{key}")
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except (RuntimeError, pickle.UnpicklingError, OSError):
                return None  # OSError: some network filesystems map nothing (ENODEV)
        dtype = held.properties.dtype
        flat = torch.frombuffer(mapped, dtype=dtype, count=numel, offset=offset)
        return flat.as_strided(layout.size, layout.stride, layout.start)


def _part_of(stored: Tensor, item: ReadItem) -> Tensor:
    for dimension, (start, size) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        stored = stored.narrow(dimension, start, size)
    return stored


class _Layout(NamedTuple):
    """How a tensor lies in its storage."""

    storage: tuple[str, int]  # its name and number of elements
    start: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _LayoutUnpickler(pickle.Unpickler):
    """Reads how a plain tensor lies in its storage, and runs nothing."""

    def persistent_load(self, pid: Any) -> tuple[str, int]:  # kind, class, key, device, numel
        """The name of a storage and its number of elements."""
        return pid[2], pid[4]

    def find_class(self, module: str, name: str) -> Any:  # whatever is called
        """What stands for the few names of a plain tensor; UnpicklingError for others."""
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *values: _Layout(*values[:4])
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"{module}.{name} is not of a plain tensor")
