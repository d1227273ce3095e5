"""What lies in a path: tensors, sizes, and whether their bytes are those that were written."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from memtile.checkpoints import Checkpoint, StoredTensor
from memtile.checkpoints.header import DTYPES, parse_json
from memtile.checkpoints.steps import saved_steps
from memtile.cli.errors import CommandError
from memtile.planning import format_byte_size

_TRAINING: Final = "training.json"
_RUN_PARTS: Final = ("model", "trainable", "optimizer", "random")


@dataclass(frozen=True)
class Row:
    """One tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: str


@dataclass(frozen=True)
class Contents:
    """What was found.

    Attributes:
        path: that was looked at.
        kind: what it is.
        rows: its tensors.
        facts: other things that it tells, by their names.
        verified: tensors whose bytes were compared with their checksums.
        unknown: tensors whose checksums nobody wrote down; others were not to be verified.
    """

    path: str
    kind: str
    rows: list[Row]
    facts: dict[str, str] = field(default_factory=dict)
    verified: int = 0
    unknown: int = 0


def inspect(path: Path, verify: bool, progress: Progress) -> Contents:
    """Looks at a run's checkpoint, or a safetensors checkpoint.

    Raises:
        CommandError: There is nothing at the path.
        CheckpointError: It is no checkpoint, or a damaged one.
    """
    if not path.exists():
        raise CommandError(f"{path} does not exist: give a checkpoint.")
    steps = saved_steps(path)
    folder = steps[-1].path if steps and not any(path.glob("*.safetensors")) else path
    if (folder / _TRAINING).is_file():
        return _training(folder, verify, progress)
    checkpoint = Checkpoint.open(path)
    return _contents(path, "safetensors checkpoint", checkpoint.values(), {}, verify, progress)


def _training(folder: Path, verify: bool, progress: Progress) -> Contents:
    try:
        record = parse_json((folder / _TRAINING).read_bytes())
        facts = {name: json.dumps(record[name]) for name in ("step", "position") if name in record}
    except (OSError, ValueError, TypeError) as error:
        raise CommandError(
            f"{folder / _TRAINING} cannot be read ({error}): take another step's folder."
        ) from error
    tensors = [
        tensor
        for stem in _RUN_PARTS
        if any(folder.glob(f"{stem}*.safetensors"))
        for tensor in Checkpoint.open(folder, stem).values()
    ]
    return _contents(folder, "checkpoint of a run", tensors, facts, verify, progress)


def _contents(
    path: Path,
    kind: str,
    tensors: Iterable[StoredTensor],
    facts: dict[str, str],
    verify: bool,
    progress: Progress,
) -> Contents:
    found = list(tensors)
    rows = [
        Row(t.entry.name, tuple(t.shape), _dtype(t.entry.kind), t.nbytes, t.file.path.name)
        for t in found
    ]
    verified = sum(t.check_sum() for t in _tracked(found, progress)) if verify else 0
    unknown = sum(t.entry.crc is None for t in found)
    return Contents(str(path), kind, rows, facts, verified, unknown)


def _tracked(tensors: list[StoredTensor], progress: Progress) -> Iterator[StoredTensor]:
    yield from progress.track(tensors, description="Verifying checksums")


def _dtype(kind: str) -> str:
    """torch's word for what safetensors calls a dtype, where it has one."""
    return str(DTYPES.get(kind, kind)).removeprefix("torch.")


def show(contents: Contents, console: Console) -> None:
    """Prints the tensors, their sum, and what is known of their checksums."""
    table = Table("tensor", "shape", "dtype", "size", title=contents.path)
    table.columns[0].overflow = "fold"  # a name that is cut is no name
    table.columns[3].justify = "right"
    files = {row.file for row in contents.rows}
    if len(files) > 1:
        table.add_column("file", overflow="fold")
    for row in contents.rows:
        shape = " × ".join(map(str, row.shape)) or "one number"
        cells = [row.name, shape, row.dtype, format_byte_size(row.nbytes), row.file]
        table.add_row(*cells[: len(table.columns)])
    console.print(table)
    total = sum(row.nbytes for row in contents.rows)
    console.print(f"{contents.kind}: {len(contents.rows)} tensors, {format_byte_size(total)}")
    for name, value in contents.facts.items():
        console.print(f"{name}: {value}")
    console.print(_checksums(contents))


def _checksums(contents: Contents) -> str:
    parts = []
    left = len(contents.rows) - contents.verified - contents.unknown
    if contents.verified:
        parts.append(f"checksums of {contents.verified} tensors verified")
    if left:
        parts.append(f"checksums of {left} tensors not verified (--no-verify)")
    if contents.unknown:
        parts.append(
            f"no checksums of {contents.unknown} tensors: whether their bytes are those that were "
            "written cannot be told"
        )
    return "; ".join(parts) or "no tensors"
