"""The record of a training checkpoint: a JSON file with checksums, and the random state.

Tensors have checksums in their files' headers. The record has a checksum of each header, of each
other file and of itself, so a flipped bit anywhere is detected.
"""

import json
import random
import sys
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from memtile.checkpoints import header
from memtile.checkpoints.exact_json import from_json, to_json
from memtile.checkpoints.opening import SUFFIX, Checkpoint
from memtile.checkpoints.publishing import replace_file
from memtile.checkpoints.steps import RECORD
from memtile.checkpoints.writing import Outgoing
from memtile.errors import CheckpointError

FORMAT: Final = 1

_CPU, _CUDA = "cpu", "cuda."

_COPY: Final = "take another copy of it"

TrainingRecord = dict[str, Any]  # JSON


def write_record(folder: Path, record: TrainingRecord) -> None:
    """Write the record of a folder, after all other files of it."""
    files = {path.name: _summary(path) for path in sorted(folder.iterdir())}
    full = {"format": FORMAT, **record, "files": files}
    text = json.dumps({"crc32": _crc_of(full), **full}, allow_nan=False)
    replace_file(folder / RECORD, text)


def read_record(folder: Path) -> TrainingRecord:
    """The record; it and all files that it names are verified, except the tensors' bytes."""
    record = _read(folder / RECORD)
    if record.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} is in format {record.get('format')}, written by memtile "
            f"{record.get('memtile')}; this memtile reads format {FORMAT}: use the one that wrote "
            "it, or a newer one"
        )
    for name, summary in record["files"].items():
        _check(folder / name, summary)
    return record


def _read(path: Path) -> TrainingRecord:
    try:
        record: TrainingRecord = header.parse_json(path.read_bytes())
        crc = record.pop("crc32")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} has no {path.name}: it is no training checkpoint, or not all of it was "
            f"copied; {_COPY}"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path) from error
    if crc != _crc_of(record):
        raise _damaged(path)
    return record


def _crc_of(record: TrainingRecord) -> str:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return f"{zlib.crc32(text.encode()):08x}"


def _summary(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        raw = file.read(header.LENGTH_BYTES) if path.name.endswith(SUFFIX) else file.read()
        size = path.stat().st_size
        if path.name.endswith(SUFFIX):
            raw += file.read(header.header_length(raw, size, str(path)))
    return {"bytes": size, "crc32": f"{zlib.crc32(raw):08x}"}


def _check(path: Path, summary: dict[str, Any]) -> None:
    try:
        size = path.stat().st_size
        if size != summary["bytes"]:
            raise CheckpointError(
                f"{path} has {size} bytes, and {summary['bytes']} were written: it was cut short "
                f"or replaced; {_COPY}"
            )
        if _summary(path) != summary:
            raise _damaged(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: not all was copied; {_COPY}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: it is not what was written; {_COPY}")


@dataclass(frozen=True)
class RandomState:
    """The states of the global random generators of Python, numpy and torch."""

    python: Any  # of random.getstate
    numpy: Any  # of numpy.random.get_state, with lists for arrays; None where numpy is not loaded
    torch: Mapping[str, Tensor]  # by device

    @classmethod
    def now(cls) -> "RandomState":
        """The present state; CUDA's where CUDA is in use."""
        states = {_CPU: torch.get_rng_state()}
        if torch.cuda.is_initialized():
            states |= {f"{_CUDA}{n}": s for n, s in enumerate(torch.cuda.get_rng_state_all())}
        numpy = sys.modules.get("numpy")
        found = None if numpy is None else _with_lists(numpy.random.get_state(legacy=False))
        return cls(random.getstate(), found, states)

    def to_json(self) -> Any:  # any JSON
        """The part that goes into the record."""
        return to_json({"python": self.python, "numpy": self.numpy}, "the random state")

    def outgoing(self) -> list[Outgoing]:
        """The part that goes into a file of tensors."""
        return [Outgoing.of(name, state) for name, state in self.torch.items()]

    @classmethod
    def read(cls, found: Any, tensors: Checkpoint) -> "RandomState":  # any JSON
        """The saved state; CheckpointError where this torch's generator has another form."""
        both = from_json(found)
        states = {name: tensor.read() for name, tensor in tensors.items()}
        ours, theirs = torch.get_rng_state(), states.get(_CPU)
        if theirs is None or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
            raise CheckpointError(
                f"{tensors.path} holds no state of this torch's generator of random numbers; "
                "resume with the torch that saved it"
            )
        return cls(both["python"], both["numpy"], states)

    def restore(self) -> None:
        """Set the generators; warns of those that are not in this process."""
        random.setstate(self.python)
        numpy = sys.modules.get("numpy")
        if self.numpy is not None and numpy is not None:
            numpy.random.set_state(self.numpy)
        torch.set_rng_state(self.torch[_CPU])
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        wanting = [] if self.numpy is None or numpy is not None else ["numpy"]
        for name, state in self.torch.items():
            number = name.removeprefix(_CUDA)
            if name != _CPU and int(number) < count:
                torch.cuda.set_rng_state(state, int(number))
            elif name != _CPU:
                wanting.append(name)
        if wanting:
            warnings.warn(
                f"the checkpoint has random states of {', '.join(wanting)}, which this process "
                "does not have: random numbers will differ from those of an uninterrupted run",
                stacklevel=3,
            )


def _with_lists(state: Any) -> Any:  # numpy's own form, with lists for arrays
    if isinstance(state, dict):
        return {key: _with_lists(value) for key, value in state.items()}
    return state.tolist() if hasattr(state, "tolist") else state
