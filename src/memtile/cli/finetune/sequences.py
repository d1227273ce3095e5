"""Cuts texts into sequences of tokens, and says which sequence each step trains on."""

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from memtile.cli.errors import CommandError
from memtile.cli.finetune.settings import is_first_rank
from memtile.cli.finetune.tokens import TokenFile, document_tokens

_PIECE: Final = 1 << 16  # characters that are read at once


class EmptyTextError(CommandError):
    """A text has nothing but white space."""


class Sequences:
    """Stretches of a stream of tokens, each once an epoch; at most `count` of them.

    The order depends on the seed and the step's number alone, so a run can be resumed anywhere;
    without a seed it is the stream's own.
    """

    def __init__(
        self, stream: TokenFile, tokens: int, seed: int | None, count: int | None = None
    ) -> None:
        self._stream, self._tokens, self._seed = stream, tokens, seed
        self._count = count or stream.count // tokens
        self.largest_id = stream.largest_id

    def __len__(self) -> int:
        return self._count

    def at(self, step: int) -> Tensor:
        """The int64 tensor (1, tokens) of a step, counted from 0."""
        epoch, place = divmod(step, len(self))
        if self._seed is not None:
            place = shuffled(place, len(self), f"{self._seed} {epoch}")
        return self._stream.read(place * self._tokens, self._tokens)


def shuffled(place: int, count: int, key: str) -> int:
    """The image of a number below `count` under a permutation that only the key decides.

    It takes no memory; a drawn order would take 8 bytes a sequence.

    Source: a Feistel network of four rounds (Luby and Rackoff, 1988, doi:10.1137/0217022) permutes
    the numbers of so many bits; it is repeated while the result is not below `count` (Black and
    Rogaway, 2002, doi:10.1007/3-540-45760-7_9).
    """
    bits = ((count - 1).bit_length() + 1) // 2
    mask = (1 << bits) - 1
    while True:
        left, right = place >> bits, place & mask
        for turn in range(4):
            drawn = hashlib.sha256(f"{key} {turn} {right}".encode()).digest()
            left, right = right, left ^ (int.from_bytes(drawn, "big") & mask)
        place = (left << bits) | right
        if place < count:
            return place


def read_sequences(
    files: Sequence[Path],
    tokenizer: Any,  # of transformers, which is not imported to name its type
    tokens: int,
    seed: int,
    folder: Path,
    on_read: Callable[[int, int], None] = lambda done, total: None,
) -> Sequences:
    """The sequences of UTF-8 texts, each text tokenized as one document.

    A text is read piece by piece, and its tokens go to a file without a name in `folder`. `on_read`
    gets the bytes of text that were read, and those of all texts.
    """
    stream, done, total = TokenFile(folder), 0, sum(file.stat().st_size for file in files)

    def pieces(file: Path) -> Iterator[str]:
        nonlocal done
        for piece in text_pieces(file, "TEXT"):
            yield piece
            done += len(piece.encode())
            on_read(done, total)

    for file in files:
        for ids in document_tokens(pieces(file), tokenizer):
            stream.append(ids)
    on_read(total, total)
    if stream.count < tokens:
        raise CommandError(
            f"--tokens {tokens} is more than all texts have, {stream.count}: give fewer tokens, or "
            "more text."
        )
    return Sequences(stream, tokens, seed)


def checked_texts(files: Iterable[Path]) -> list[Path]:
    """The texts without empty ones, which are named; refuses what cannot be read as text."""
    some: list[Path] = []
    empty: dict[Path, EmptyTextError] = {}
    for file in files:
        if file.is_dir():
            raise CommandError(f"TEXT {file} is a folder: give its files, such as {file}/*.txt.")
        try:
            for _ in text_pieces(file, "TEXT"):
                pass
            some.append(file)
        except EmptyTextError as error:
            empty[file] = error
    if empty and not some:
        raise next(iter(empty.values()))
    for file in empty if is_first_rank() else ():
        print(f"TEXT {file} is empty: skipped", file=sys.stderr)
    return some


def text_pieces(file: Path, name: str, characters: int = _PIECE) -> Iterator[str]:
    """The UTF-8 text of a file, in pieces of so many characters; the last may have fewer.

    One that is missing, binary or empty is refused; the argument that gave it is called `name`.
    """
    is_empty = True
    try:
        with file.open(encoding="utf-8") as stream:
            while piece := stream.read(characters):
                if "\0" in piece:
                    raise CommandError(
                        f"{name} {file} holds zero bytes, as binary files do: give plain text."
                    )
                is_empty = is_empty and not piece.strip()
                yield piece
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise CommandError(f"{name} {file} cannot be read ({reason}): give plain text.") from error
    if is_empty:
        raise EmptyTextError(f"{name} {file} is empty: give a text file.")
