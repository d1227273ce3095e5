"""Tokenizes a long text piece by piece, and keeps the tokens in a file.

A token may depend on the text around it, and some tokenizers put a space before a text. So
consecutive pieces overlap, and are joined in the middle of the overlap, where both have the same
tokens at the same places.
"""

import os
import tempfile
import weakref
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from memtile.cli.errors import CommandError

OVERLAP: Final = 1 << 12
"""Characters that consecutive pieces share."""

_ALIKE: Final = 4  # tokens on either side of a joint that must be the same
_HEAD: Final = 1000  # characters that are tokenized to see what a tokenizer adds to a text


@dataclass(frozen=True)
class _Encoded:
    """Tokens of a window, from the `first` on.

    Where they begin is asked of those near a joint: of all, it takes as long as to tokenize.
    """

    ids: list[int]
    window_begin: int
    encoding: Any  # of tokenizers, which is not imported to name its type
    first: int = 0

    def start(self, index: int) -> int:
        """The character of the document at which a token begins."""
        start, _ = self.encoding.token_to_chars(index)
        return self.window_begin + int(start)

    def at(self, character: int) -> int:
        """The first token that begins there or later."""
        return bisect_left(range(len(self.ids)), character, self.first, key=self.start)

    def around(self, index: int) -> list[tuple[int, int]]:
        """The tokens near an index, and where they begin."""
        near = range(max(self.first, index - _ALIKE), min(index + _ALIKE, len(self.ids)))
        return [(self.ids[each], self.start(each)) for each in near]


@dataclass(frozen=True)
class _Window:
    """A piece with the end of the text before it."""

    text: str
    begin: int  # in the document
    shared: int  # characters that the window before has too

    @property
    def alone(self) -> "_Window":
        """The piece without what is shared."""
        return _Window(self.text[self.shared :], self.begin + self.shared, 0)


def document_tokens(
    pieces: Iterable[str],
    tokenizer: Any,  # of transformers, which is not imported to name its type
    together: int = 1,
) -> Iterator[list[int]]:
    """The tokens of one document, piece by piece: the same as tokenized whole.

    What the tokenizer adds before and after a text is there once. An end-of-text token follows, if
    the tokenizer has one and does not add it itself. A word that is longer than half the overlap
    may be cut where a piece ends. A tokenizer that is written in Python does not say where its
    tokens begin: it gets the document in pieces that end with a line. All pieces but the last must
    be longer than the overlap. So many pieces `together` are tokenized in threads.
    """
    after: list[int] | None = None
    found = _joined(pieces, tokenizer, together) if tokenizer.is_fast else _lines(pieces, tokenizer)
    for text, ids in found:
        if after is None:
            before, after = _put_around(text[:_HEAD], tokenizer)
            yield before
        yield ids
    end = tokenizer.eos_token_id
    yield [*(after or []), *([] if end is None or end in (after or [])[-1:] else [end])]


def _joined(
    pieces: Iterable[str], tokenizer: Any, together: int
) -> Iterator[tuple[str, list[int]]]:
    held, text = _Encoded([], 0, None), ""
    windows = _windows(pieces)
    while group := list(islice(windows, together)):
        for window, found in zip(group, _encoded(group, tokenizer), strict=True):
            text = window.text
            joint = _joint(held, found, window.begin + window.shared // 2)
            if joint is None:  # nothing shared, or one word
                stop, go_on = len(held.ids), 0
                found = _encoded([window.alone], tokenizer)[0] if window.shared else found
            else:
                stop, go_on = joint
            yield text, held.ids[held.first : stop]
            held = replace(found, first=go_on)
    yield text, held.ids[held.first :]


def _windows(pieces: Iterable[str]) -> Iterator[_Window]:
    text, begin = "", 0
    for piece in pieces:
        shared = text[-OVERLAP:]
        begin += len(text) - len(shared)
        text = shared + piece
        yield _Window(text, begin, len(shared))


def _encoded(windows: list[_Window], tokenizer: Any) -> list[_Encoded]:
    texts = [window.text for window in windows]
    found = tokenizer(texts, add_special_tokens=False, verbose=False)
    return [
        _Encoded(ids, window.begin, encoding)
        for window, ids, encoding in zip(windows, found.input_ids, found.encodings, strict=True)
    ]


def _joint(old: _Encoded, new: _Encoded, middle: int) -> tuple[int, int] | None:
    """The first place from the middle on where both have the same tokens: an index into each."""
    for i in range(max(old.first + 1, old.at(middle)), len(old.ids) - _ALIKE + 1):
        j = new.at(old.start(i))
        if old.start(i - 1) < old.start(i) and old.around(i) == new.around(j):
            return i, j
    return None


def _lines(pieces: Iterable[str], tokenizer: Any) -> Iterator[tuple[str, list[int]]]:
    rest = ""
    for piece in pieces:
        text = rest + piece
        stop = text.rfind("\n") + 1 or len(text)
        rest = text[stop:]
        yield text, ids_of(text[:stop], tokenizer, add_special_tokens=False)
    if rest:
        yield rest, ids_of(rest, tokenizer, add_special_tokens=False)


def _put_around(text: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer adds before and after a text."""
    bare, whole = ids_of(text, tokenizer, add_special_tokens=False), ids_of(text, tokenizer)
    for start in range(len(whole) - len(bare) + 1):
        stop = start + len(bare)
        if whole[start:stop] == bare:
            return whole[:start], whole[stop:]
    return [], []


def ids_of(text: str, tokenizer: Any, **options: bool) -> list[int]:
    """The tokens of a text, with what the tokenizer adds unless `add_special_tokens=False`."""
    return list(tokenizer(text, verbose=False, **options).input_ids)


class NumberFile:
    """Numbers of a C type in a file of `folder`, at the end of which more can be put.

    Without a name it ends with the process; one with a name is made anew, unless it is to be read.
    """

    def __init__(
        self, folder: Path, name: str | None, code: str, *, is_there: bool = False
    ) -> None:
        self._folder, self._code, self._size = folder, code, array(code).itemsize
        try:
            file: Any = (  # without a buffer: typed as one that may have one
                tempfile.TemporaryFile(buffering=0, dir=folder)  # noqa: SIM115  # kept open
                if name is None
                else (folder / name).open("rb" if is_there else "w+b", buffering=0)
            )
        except OSError as error:
            raise self._refusal(error) from error
        self._file = file
        self.count = os.fstat(file.fileno()).st_size // self._size
        weakref.finalize(self, file.close)

    def append(self, numbers: "array[int]") -> None:
        """Adds numbers of this type at the end."""
        try:
            raw = memoryview(numbers).cast("B")
            while raw:
                raw = raw[self._file.write(raw) :]
        except OSError as error:
            raise self._refusal(error) from error
        self.count += len(numbers)

    def numbers(self, start: int, count: int) -> list[int]:
        """Those from `start` on."""
        raw = os.pread(self._file.fileno(), self._size * count, self._size * start)
        return array(self._code, raw).tolist()

    def _refusal(self, error: OSError) -> CommandError:
        return CommandError(
            f"The tokens cannot be kept in {self._folder} ({error.strerror}): make room there, 4 "
            "bytes a token, or give another --cache."
        )


class TokenFile(NumberFile):
    """Tokens, 4 bytes each; one that does not count in the loss is there as its complement, ~id."""

    def __init__(
        self, folder: Path, name: str | None = None, *, is_there: bool = False, largest_id: int = 0
    ) -> None:
        super().__init__(folder, name, "i", is_there=is_there)
        self.largest_id = largest_id

    def append(self, numbers: "array[int]") -> None:
        """Adds tokens at the end."""
        super().append(numbers)
        if numbers:
            self.largest_id = max(self.largest_id, max(numbers), ~min(numbers))

    def read(self, start: int, count: int) -> Tensor:
        """An int64 tensor (1, count) of the tokens from `start` on, as they were added."""
        raw = os.pread(self._file.fileno(), 4 * count, 4 * start)
        return torch.frombuffer(bytearray(raw), dtype=torch.int32).long().unsqueeze(0)
