"""Cuts tokens into sequences, and says which sequence each step trains on."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from memtile.cli.errors import CommandError
from memtile.cli.finetune.data_files import TEXT, Data, rows
from memtile.cli.finetune.examples import Part, document, encoder
from memtile.cli.finetune.token_store import Stored, stored
from memtile.cli.finetune.tokens import NumberFile, TokenFile

_PIECE: Final = 1 << 16  # characters that are read at once
_IGNORED: Final = -100  # the label of a token that does not count, torch's own


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
        self._count = stream.count // tokens if count is None else count
        self.largest_id = stream.largest_id

    def __len__(self) -> int:
        return self._count

    def at(self, step: int) -> Tensor:
        """The int64 tensor (1, tokens) of a step, counted from 0."""
        return self._stream.read(self._place(step) * self._tokens, self._tokens)

    def inputs(self, step: int) -> dict[str, Tensor]:
        """What the model takes in a step: ids, and labels that are the same."""
        ids = self.at(step)
        return {"input_ids": ids, "labels": ids}

    def _place(self, step: int) -> int:
        epoch, place = divmod(step, len(self))
        if self._seed is None:
            return place
        return shuffled(place, len(self), f"{self._seed} {epoch}")


class PaddedSequences(Sequences):
    """Examples that are a sequence each, padded at the end; `ends` says where each ends."""

    def __init__(self, stream: TokenFile, ends: NumberFile, tokens: int, seed: int | None) -> None:
        super().__init__(stream, tokens, seed, ends.count)
        self._ends = ends

    def at(self, step: int) -> Tensor:
        """The ids (1, tokens) of a step, padded."""
        return self.inputs(step)["input_ids"]

    def inputs(self, step: int) -> dict[str, Tensor]:
        """Ids, labels that are -100 for what does not count, and the mask of what is no padding."""
        place = self._place(step)
        begin = self._ends.numbers(place - 1, 1)[0] if place else 0
        end = self._ends.numbers(place, 1)[0]
        raw = self._stream.read(begin, end - begin)
        after = (0, self._tokens - raw.shape[1])
        pad = torch.nn.functional.pad
        return {
            "input_ids": pad(torch.where(raw < 0, ~raw, raw), after),  # any id: it is masked
            "labels": pad(torch.where(raw < 0, _IGNORED, raw), after, value=_IGNORED),
            "attention_mask": pad(torch.ones_like(raw), after),
        }


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
    data: Data,
    tokenizer: Any,  # of transformers, which is not imported to name its type
    tokens: int,
    seed: int | None,
    *,
    packs: bool,
    cache: Path,
    key: str,
    on_read: Callable[[int, int], None] = lambda done, total: None,
    on_stored: Callable[[str], None] = lambda sentence: None,
) -> Sequences:
    """The sequences of data, whose tokens are kept in `cache` under the key.

    Data are read piece by piece. `on_read` gets the bytes that were read, and those of all files;
    `on_stored` a sentence on what there is.
    """
    length = None if packs else tokens
    kept = stored(cache, key, length, lambda: _parts(data, tokenizer, on_read))
    nouns = {"messages": "conversation", "prompt": "completion"}
    where = f"{'found' if kept.was_there else 'kept'} in {kept.folder}"
    noun = nouns.get(data.columns[0], "document")
    on_stored(f"{data.name}: {kept.counts.summary(noun, tokens)}; {where}")
    _check(kept, data, tokens, noun)
    if kept.ends is None:
        return Sequences(kept.tokens, tokens, seed)
    return PaddedSequences(kept.tokens, kept.ends, tokens, seed)


def _parts(data: Data, tokenizer: Any, on_read: Callable[[int, int], None]) -> Iterator[Part]:
    done, total = 0, data.nbytes

    def read(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        on_read(done, total)

    if data.kind == TEXT:
        for file in data.files:
            yield from _text_file(file, data.name, tokenizer, read)
    else:
        yield from encoder(data.columns, tokenizer)(rows(data, read))
    on_read(total, total)


def _text_file(
    file: Path, name: str, tokenizer: Any, read: Callable[[int], None]
) -> Iterator[Part]:
    def pieces() -> Iterator[str]:
        for piece in text_pieces(file, name):
            yield piece
            read(len(piece.encode()))

    try:
        if any(piece.strip() for piece in text_pieces(file, name)):
            yield from document(pieces(), tokenizer)
    except EmptyTextError:
        yield [], True


def _check(kept: Stored, data: Data, tokens: int, noun: str) -> None:
    counts = kept.counts
    if kept.ends is None and 0 < counts.tokens < tokens:
        raise CommandError(
            f"--tokens {tokens} is more than all of {data.name} has, {counts.tokens}: give fewer "
            "tokens, more text, or --no-packing."
        )
    if not counts.kept:
        raise CommandError(
            f"{data.name} {data.files[0]} is empty: none of its {noun}s is left to train on ("
            f"{counts.empty} empty or with nothing to learn, {counts.cut_away} whose answer lies "
            f"beyond --tokens {tokens}): give others, or more tokens."
        )


def text_pieces(file: Path, name: str, characters: int = _PIECE) -> Iterator[str]:
    """The UTF-8 text of a file, in pieces of so many characters; the last may have fewer.

    One that is missing, binary or empty is refused; the argument that gave it is called `name`.
    """
    is_empty = True
    try:
        with file.open(encoding="utf-8-sig") as stream:
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
