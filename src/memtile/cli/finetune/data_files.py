"""Finds the files of DATA, and reads the rows of JSON lines and Parquet."""

import glob
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from memtile.cli.errors import CommandError, first_line

TEXT: Final = "text"
LINES: Final = "JSON lines"
PARQUET: Final = "Parquet"

_KINDS: Final = {".jsonl": LINES, ".ndjson": LINES, ".json": LINES, ".parquet": PARQUET}
# What a row is trained on, the first that is there: a row with messages may hold a prompt besides.
_COLUMNS: Final = (("messages",), ("prompt", "completion"), ("text",))
_BATCH: Final = 256  # rows of Parquet that are decoded at once


@dataclass(frozen=True)
class Data:
    """Files of one kind, and the columns of their rows that are trained on."""

    name: str  # of the argument that gave them
    files: tuple[Path, ...]
    kind: str  # TEXT, LINES or PARQUET
    columns: tuple[str, ...]  # ("text",) for text files too

    @property
    def is_text(self) -> bool:
        """Whether all tokens count in the loss."""
        return self.columns == ("text",)

    @property
    def nbytes(self) -> int:
        """The size of all files."""
        return sum(file.stat().st_size for file in self.files)


@dataclass(frozen=True)
class DataRow:
    """A row of a file; `place` says which one, to people."""

    place: str
    values: dict[str, Any]  # JSON


def find_data(paths: Iterable[Path], name: str) -> Data:
    """The files that are given, and those in folders that are; messages call them `name`."""
    files = tuple(file for path in paths for file in _files_of(path, name))
    kinds = {kind_of(file): file for file in reversed(files)}
    if len(kinds) > 1:
        given = ", ".join(f"{kind} ({file})" for kind, file in sorted(kinds.items()))
        raise CommandError(f"{name} holds several kinds of files: {given}; give files of one kind.")
    kind = kind_of(files[0])
    if kind == PARQUET:
        load_datasets()
    columns = ("text",) if kind == TEXT else _columns(files, kind, name)
    return Data(name, files, kind, columns)


def kind_of(file: Path) -> str:
    """What a file's name says that it holds."""
    return _KINDS.get(file.suffix.lower(), TEXT)


def _files_of(path: Path, name: str) -> list[Path]:
    if not path.is_dir():
        try:
            path.open("rb").close()
        except OSError as error:
            raise CommandError(
                f"{name} {path} cannot be read ({error.strerror}): give text files, JSON lines or "
                "Parquet, or a folder of them."
            ) from error
        return [path]
    inside = sorted(path.rglob("*"))
    found = [
        file
        for file in inside
        if file.is_file() and not any(p.startswith(".") for p in file.relative_to(path).parts)
    ]
    if not found:
        raise CommandError(f"{name} {path} is a folder without files: give one that has some.")
    return found


def _columns(files: tuple[Path, ...], kind: str, name: str) -> tuple[str, ...]:
    """Those of the first row; of Parquet every file is looked at, of JSON every row later."""
    if kind == PARQUET:
        found = [_chosen(_schema(file, name), f"{name} {file}") for file in files]
        return found[0]
    for file in files:
        for row in _lines(file, name, lambda nbytes: None):
            return _chosen(list(row.values), row.place)
    raise CommandError(f"{name} {files[0]} is empty: give a file with rows.")


def _chosen(columns: list[str], place: str) -> tuple[str, ...]:
    for wanted in _COLUMNS:
        if set(wanted) <= set(columns):
            return wanted
    raise CommandError(
        f"{place} has no column that is trained on (its columns: {', '.join(columns) or 'none'}): "
        "name one text, or messages, or two prompt and completion."
    )


def rows(data: Data, on_read: Callable[[int], None]) -> Iterator[DataRow]:
    """The rows of JSON lines or Parquet; `on_read` gets the bytes that each took in its file."""
    for file in data.files:
        read = _lines if data.kind == LINES else _parquet
        for row in read(file, data.name, on_read):
            missing = [column for column in data.columns if column not in row.values]
            if missing:
                raise CommandError(
                    f"{row.place} has no column {missing[0]} (its columns: "
                    f"{', '.join(row.values) or 'none'}), which the first row has: "
                    "write it, or leave the row out."
                )
            yield row


def _lines(file: Path, name: str, on_read: Callable[[int], None]) -> Iterator[DataRow]:
    """Not by `datasets`, which fits rows to the first 10 MB, and may read a file whole.

    A row with a key that those lack is refused by it, a column whose type changes makes it read the
    whole file with pandas, and an error does not say the line.
    """
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            on_read(len(line))
            if line.strip():
                place = f"{name} {file} line {number}"
                yield DataRow(place, _object(line, place, number, file))


def _object(line: bytes, place: str, number: int, file: Path) -> dict[str, Any]:
    if number == 1 and line.lstrip().startswith(b"["):
        raise CommandError(
            f"{place} begins a JSON array, and one object a line is read: jq -c '.[]' {file} > "
            f"{file.stem}-lines.jsonl"
        )
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CommandError(
            f"{place} is not valid JSON ({first_line(error)}): write one object a line."
        ) from error
    if not isinstance(found, dict):
        raise CommandError(
            f"{place} is no object but a {type(found).__name__}: write one object a line."
        )
    return found


def load_datasets() -> Any:  # the module, which is not imported to name its type
    """Loads Hugging Face's `datasets`, and has it print nothing; before memory is measured."""
    try:
        import datasets
        import pyarrow.parquet
    except ImportError as error:
        raise CommandError("Parquet needs datasets: pip install 'memtile[data]'") from error
    assert pyarrow.parquet
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def _schema(file: Path, name: str) -> list[str]:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import read_schema

    try:
        return [str(column) for column in read_schema(file).names]
    except (ArrowInvalid, OSError) as error:
        raise _damaged(file, name, error) from error


def _parquet(file: Path, name: str, on_read: Callable[[int], None]) -> Iterator[DataRow]:
    """A batch of rows after the other: a row group is never in memory whole."""
    from pyarrow import ArrowException
    from pyarrow.dataset import ParquetFragmentScanOptions
    from pyarrow.parquet import ParquetFile

    count, number, nbytes = ParquetFile(file).metadata.num_rows, 0, file.stat().st_size
    found = load_datasets().load_dataset(
        "parquet",
        data_files=glob.escape(str(file)),
        split="train",
        streaming=True,
        batch_size=_BATCH,
        fragment_scan_options=ParquetFragmentScanOptions(
            use_buffered_stream=True, pre_buffer=False
        ),
    )
    try:
        for values in found:
            on_read(nbytes * (number + 1) // count - nbytes * number // count)
            number += 1
            yield DataRow(f"{name} {file} row {number}", values)
    except ArrowException as error:
        raise _damaged(file, name, error) from error


def _damaged(file: Path, name: str, error: Exception) -> CommandError:
    return CommandError(
        f"{name} {file} is no Parquet that can be read ({first_line(error)}): take another copy."
    )
