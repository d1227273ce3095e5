"""DCP's folders written and read by ranks together, or read by one of them alone."""

import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from memtile.checkpoints.publishing import way_out
from memtile.engines.piece_reader import PieceReader
from memtile.engines.ranks import Ranks
from memtile.errors import CheckpointError, CheckpointWriteError

State = dict[str, Any]  # what DCP takes: tensors, dictionaries, anything


def write_shards(ranks: Ranks, state: State, folder: Path) -> None:
    """Write what each rank holds.

    Raises:
        CheckpointWriteError: some rank could not.
        EngineError: a rank is gone.
    """
    writer = FileSystemWriter(folder)
    try:
        with ranks.answering(), _silent():
            state_dict_saver.save(
                state, storage_writer=writer, process_group=ranks.group, no_dist=ranks.is_alone
            )
    except CheckpointException as error:
        rank, cause = _first(error)
        number = getattr(cause, "errno", None) or errno.EIO
        raise CheckpointWriteError(
            number,
            f"{folder.parent} could not be written by rank {rank} ({cause}); what was there "
            f"before is as it was: {way_out(number)}",
        ) from error


def read_shards(ranks: Ranks, state: State, folder: Path) -> None:
    """Read what each rank wants, in place.

    Raises:
        CheckpointError: some rank could not.
        EngineError: a rank is gone.
    """
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


def read_alone(state: State, folder: Path) -> None:
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
