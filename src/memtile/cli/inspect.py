"""`memtile inspect`: lists the tensors of a checkpoint, and verifies their checksums."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from memtile.checkpoints import Checkpoint
from memtile.checkpoints.header import DTYPES, parse_json
from memtile.checkpoints.opening import way_to
from memtile.checkpoints.steps import RECORD, saved_steps
from memtile.cli.errors import CommandError
from memtile.cli.terminal import AsJson, progress
from memtile.costmodel import format_byte_size

_KEPT_HOME: Final = "tiles.memtile"  # of releases that kept homes
_RUN_PARTS: Final = ("model", "trainable", "optimizer", "random")


def run_inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint's folder or file.")],
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Read all bytes, verify checksums.")
    ] = True,
    as_json: AsJson = False,
) -> int:
    """Show the tensors of a safetensors checkpoint, and verify their checksums.

    Nothing is loaded as code and nothing is changed. Damage ends with exit code 2.
    """
    with progress() as bars:
        contents = inspect(path, verify, bars)
    if as_json:
        print(json.dumps(asdict(contents), indent=2))
    else:
        _show(contents, Console())
    return 0


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
    """What lies at a path."""

    path: str
    kind: str
    rows: list[Row]
    facts: dict[str, str]  # other values that it records, by name
    verified: int  # tensors whose bytes were compared with their checksums
    unknown: int  # tensors without a recorded checksum


def inspect(path: Path, verify: bool, bars: Progress) -> Contents:
    """Looks at a run's checkpoint, or a safetensors checkpoint."""
    if not path.exists():
        raise CommandError(f"{path} does not exist: {way_to(path)}.")
    if _KEPT_HOME in (path.name, *(file.name for file in path.glob(_KEPT_HOME))):
        raise CommandError(
            f"{path} is a kept home, which is no longer read: with the release that made it, save "
            "the model by memtile.save_checkpoint or memtile finetune --out, and give that folder."
        )
    steps = saved_steps(path)
    folder = steps[-1].path if steps and not any(path.glob("*.safetensors")) else path
    if (folder / RECORD).is_file():
        kind, facts = "checkpoint of a run", _facts(folder / RECORD)
        stems = [stem for stem in _RUN_PARTS if any(folder.glob(f"{stem}*.safetensors"))]
        parts = [Checkpoint.open(folder, stem) for stem in stems]
    else:
        folder, kind, facts, parts = path, "safetensors checkpoint", {}, [Checkpoint.open(path)]
    tensors = [tensor for part in parts for tensor in part.values()]
    rows = [
        Row(t.entry.name, tuple(t.shape), _dtype(t.entry.kind), t.nbytes, t.file.path.name)
        for t in tensors
    ]
    read = bars.track(tensors, description="Verifying checksums") if verify else ()
    verified = sum(tensor.check_sum() for tensor in read)
    unknown = sum(tensor.entry.crc is None for tensor in tensors)
    return Contents(str(folder), kind, rows, facts, verified, unknown)


def _facts(file: Path) -> dict[str, str]:
    try:
        record = parse_json(file.read_bytes())
        return {name: json.dumps(record[name]) for name in ("step", "position") if name in record}
    except (OSError, ValueError, TypeError) as error:
        raise CommandError(
            f"{file} cannot be read ({error}): take another step's folder."
        ) from error


def _dtype(kind: str) -> str:
    """torch's word for a dtype of safetensors, where it has one."""
    return str(DTYPES[kind]).removeprefix("torch.") if kind in DTYPES else kind


def _show(contents: Contents, console: Console) -> None:
    table = Table("tensor", "shape", "dtype", "size", title=contents.path)
    table.columns[0].overflow = "fold"  # a name must not be cut
    table.columns[3].justify = "right"
    if len({row.file for row in contents.rows}) > 1:
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
