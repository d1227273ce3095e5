"""The record of a training checkpoint: a JSON file that vouches for itself and the files beside it.

Tensors have checksums in their files' headers. The record has one of each header and of each other
file, and one of itself: a bit that flips anywhere is found.
"""

import json
import zlib
from pathlib import Path
from typing import Any, Final

from memtile.checkpoints import header
from memtile.checkpoints.opening import SUFFIX
from memtile.checkpoints.publishing import write_text
from memtile.checkpoints.steps import RECORD
from memtile.errors import CheckpointError

FORMAT: Final = 1

_COPY: Final = "take another copy of it"

TrainingRecord = dict[str, Any]  # whatever JSON the record has


def write_record(folder: Path, record: TrainingRecord) -> None:
    """Write the record of what the folder holds by now; the record comes last.

    Raises:
        CheckpointWriteError: the system could not.
    """
    files = {path.name: _summary(path) for path in sorted(folder.iterdir())}
    full = {"format": FORMAT, **record, "files": files}
    text = json.dumps({"crc32": _crc_of(full), **full}, allow_nan=False)
    write_text(folder / RECORD, text)


def read_record(folder: Path) -> TrainingRecord:
    """The record, once it and all files that it names were found as they were written.

    What the tensors hold is left to their own checksums.

    Raises:
        CheckpointError: the folder is not whole, or damaged, or of another format.
    """
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
            raw += file.read(header.header_bytes(raw, size, str(path)))
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
