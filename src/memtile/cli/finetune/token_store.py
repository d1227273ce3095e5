"""Tokens of data on disk: kept in the cache, and found there when the same data come again."""

import fcntl
import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from memtile.checkpoints import replace_file
from memtile.cli.errors import CommandError
from memtile.cli.finetune.examples import Part
from memtile.cli.finetune.tokens import NumberFile, TokenFile

_VERSION: Final = 1  # of how data become tokens: another one is tokenized anew
_TOGETHER: Final = 1 << 16  # tokens that are written at once
_COUNTS: Final = "counts.json"  # written last: without it the folder is not whole

Make = Callable[[], Iterable[Part]]


@dataclass
class Counts:
    """What became of documents, conversations or pairs of prompt and completion."""

    kept: int = 0  # are trained on
    tokens: int = 0  # of those
    largest_id: int = 0
    empty: int = 0  # skipped: nothing but white space, or nothing that counts in the loss
    cut: int = 0  # kept, but longer than a sequence
    cut_away: int = 0  # skipped: the cut left nothing that counts in the loss

    def summary(self, noun: str, length: int | None) -> str:
        """A sentence on them; `noun` says what they are."""
        said = [f"{self.kept:,} {noun}{'' if self.kept == 1 else 's'}, {self.tokens:,} tokens"]
        if self.empty:
            said.append(f"{self.empty:,} skipped that are empty or have nothing to learn")
        if self.cut:
            said.append(f"{self.cut:,} cut to --tokens {length}")
        if self.cut_away:
            said.append(f"{self.cut_away:,} skipped whose answer lies beyond --tokens {length}")
        return "; ".join(said)


@dataclass(frozen=True)
class Stored:
    """Tokens one after another, and where each example ends (None: packed, it does not matter)."""

    tokens: TokenFile
    ends: NumberFile | None
    counts: Counts
    folder: Path
    was_there: bool


def key_of(*parts: object) -> str:
    """The name of what is made of these, and of nothing else."""
    return hashlib.sha256(repr((_VERSION, *parts)).encode()).hexdigest()[:16]


def stored(
    cache: Path,
    key: str,
    length: int | None,
    make: Make,
) -> Stored:
    """What is in the cache under the key, else what `make` gives, written there.

    Examples are cut to `length` (None: they are packed, and never cut). Processes that ask for the
    same key wait for the first one.
    """
    folder = cache / "tokens" / key
    with _locked(folder, cache):
        found = _counts(folder / _COUNTS)
        was_there = found is not None
        if found is None:
            with _removed_if_it_fails(folder):
                found = _written(folder, length, make)
        tokens = TokenFile(folder, "tokens", is_there=True, largest_id=found.largest_id)
        ends = None if length is None else NumberFile(folder, "ends", "q", is_there=True)
    return Stored(tokens, ends, found, folder, was_there)


def _written(folder: Path, length: int | None, make: Make) -> Counts:
    counts, tokens = Counts(), TokenFile(folder, "tokens")
    if length is None:
        _write_packed(counts, tokens, make())
    else:
        _write_examples(counts, tokens, NumberFile(folder, "ends", "q"), length, make())
    counts.tokens, counts.largest_id = tokens.count, tokens.largest_id
    replace_file(folder / _COUNTS, json.dumps(asdict(counts)) + "\n")
    return counts


def _write_packed(counts: Counts, tokens: TokenFile, parts: Iterable[Part]) -> None:
    begun, held = 0, array("i")
    for ids, ended in parts:
        held.extend(ids)
        begun += len(ids)
        if ended:
            counts.kept += begun > 0
            counts.empty += begun == 0
            begun = 0
        if len(held) >= _TOGETHER:
            tokens.append(held)
            held = array("i")
    tokens.append(held)


def _write_examples(
    counts: Counts, tokens: TokenFile, ends: NumberFile, length: int, parts: Iterable[Part]
) -> None:
    held: list[int] = []  # of the example that has not ended, one token too many at most
    for ids, ended in parts:
        held += ids[: length + 1 - len(held)]
        if not ended:
            continue
        is_cut, example, held = len(held) > length, held[:length], []
        if any(id >= 0 for id in example[1:]):  # the first token is not predicted
            tokens.append(array("i", example))
            ends.append(array("q", [tokens.count]))
            counts.kept += 1
            counts.cut += is_cut
        elif is_cut:
            counts.cut_away += 1
        else:
            counts.empty += 1


def _counts(file: Path) -> Counts | None:
    with suppress(OSError, ValueError, TypeError):  # not there, or not whole
        return Counts(**json.loads(file.read_bytes()))
    return None


@contextmanager
def _locked(folder: Path, cache: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise CommandError(
            f"The tokens cannot be kept in {cache} ({error.strerror}): give another --cache."
        ) from error
    try:
        with suppress(OSError):  # a filesystem without locks: the last one's files stay
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextmanager
def _removed_if_it_fails(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
