"""Texts as sequences of tokens, and which of them is trained on in which step."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memtile.cli.errors import CommandError
from memtile.cli.finetune.tokens import TokenFile, document_tokens
from memtile.cli.texts import text_pieces

if TYPE_CHECKING:
    from torch import Tensor

Heard = Callable[[int, int], None]
"""Called with the bytes of text that were read, and with those of all texts."""


class Sequences:
    """Stretches of one stream of tokens, each of them once an epoch, in an order drawn from a seed.

    The order depends on the step's number alone, so a run can be continued anywhere.

    Args:
        stream: of tokens.
        tokens: of one sequence.
        seed: of the order.
    """

    def __init__(self, stream: TokenFile, tokens: int, seed: int) -> None:
        self._stream, self._tokens, self._seed = stream, tokens, seed

    def __len__(self) -> int:
        return self._stream.count // self._tokens

    @property
    def largest_id(self) -> int:
        """The largest token."""
        return self._stream.largest_id

    def at(self, step: int) -> "Tensor":
        """The int64 tensor (1, tokens) of a step, counted from 0."""
        epoch, place = divmod(step, len(self))
        drawn = shuffled(place, len(self), f"{self._seed} {epoch}")
        return self._stream.read(drawn * self._tokens, self._tokens)

    def position(self, step: int) -> dict[str, int]:
        """Where in the texts a step stands."""
        epoch, place = divmod(step, len(self))
        return {"epoch": epoch, "sequence": place}


def shuffled(place: int, count: int, key: str) -> int:
    """Where a number below `count` goes in an order of all of them that only the key decides.

    Nothing is kept: an order that is drawn takes 8 bytes a sequence.

    Source: a Feistel network of four rounds (Luby and Rackoff, 1988, doi:10.1137/0217022) permutes
    the numbers of so many bits; those beyond `count` are walked on from (Black and Rogaway, 2002,
    doi:10.1007/3-540-45760-7_9).
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
    tokenizer: Any,  # of transformers, which this room does not import to name its type
    tokens: int,
    seed: int,
    folder: Path,
    heard: Heard = lambda done, total: None,
) -> Sequences:
    """The sequences of the texts, one after the other, each text tokenized as one document.

    A text is read piece by piece, and its tokens go to the disk as they are made.

    Args:
        files: UTF-8 texts.
        tokenizer: of transformers; see `document_tokens`.
        tokens: of one sequence.
        seed: of their order.
        folder: for a file of 4 bytes a token, which has no name.
        heard: called as the texts are read.

    Raises:
        CommandError: a file is missing, binary or empty, all of them are shorter than one sequence,
            or the folder has no room.
    """
    stream, sizes = TokenFile(folder), [file.stat().st_size for file in files]
    for number, file in enumerate(files):
        pieces = _heard(file, sum(sizes[:number]), sum(sizes), heard)
        for ids in document_tokens(pieces, tokenizer):
            stream.append(ids)
    heard(sum(sizes), sum(sizes))
    if stream.count < tokens:
        raise CommandError(
            f"--tokens {tokens} is more than all texts have, {stream.count}: give fewer tokens, or "
            "more text."
        )
    return Sequences(stream, tokens, seed)


def _heard(file: Path, done: int, total: int, heard: Heard) -> Iterator[str]:
    for piece in text_pieces(file, "TEXT"):
        yield piece
        done += len(piece.encode())
        heard(done, total)


def check_texts(files: Iterable[Path]) -> None:
    """Refuse texts that cannot be read, before anything slow begins.

    Raises:
        CommandError: see `read_sequences`.
    """
    for file in files:
        for _ in text_pieces(file, "TEXT"):
            pass
