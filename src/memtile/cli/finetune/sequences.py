"""Texts as sequences of tokens, and which of them is trained on in which step."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from memtile.cli.errors import CommandError
from memtile.cli.texts import read_text

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK: Final = 1 << 16  # characters that are tokenized at once, so that memory stays small


class Sequences:
    """Stretches of one stream of tokens, each of them once an epoch, in an order drawn from a seed.

    The order depends on the step's number alone, so a run can be continued anywhere.

    Args:
        token_ids: int32, of shape (tokens in all,).
        tokens: of one sequence.
        seed: of the order.
    """

    def __init__(self, token_ids: "Tensor", tokens: int, seed: int) -> None:
        self._ids, self._tokens, self._seed = token_ids, tokens, seed
        self._epoch, self._order = -1, token_ids[:0]

    def __len__(self) -> int:
        return self._ids.numel() // self._tokens

    @property
    def largest_id(self) -> int:
        """The largest token."""
        return int(self._ids.max())

    def at(self, step: int) -> "Tensor":
        """The int64 tensor (1, tokens) of a step, counted from 0."""
        epoch, place = divmod(step, len(self))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._drawn(epoch)
        start = int(self._order[place]) * self._tokens
        return self._ids[start : start + self._tokens].long().unsqueeze(0)

    def position(self, step: int) -> dict[str, int]:
        """Where in the texts a step stands."""
        epoch, place = divmod(step, len(self))
        return {"epoch": epoch, "sequence": place}

    def _drawn(self, epoch: int) -> "Tensor":
        import torch

        generator = torch.Generator().manual_seed(self._seed + epoch)
        return torch.randperm(len(self), generator=generator)


def read_sequences(files: Sequence[Path], tokenizer: Any, tokens: int, seed: int) -> Sequences:
    """The sequences of the texts, one after the other, with an end-of-text token between them.

    Args:
        files: UTF-8 texts.
        tokenizer: of transformers, which this room does not import to name its type.
        tokens: of one sequence.
        seed: of their order.

    Raises:
        CommandError: a file is missing, binary or empty, or all of them are shorter than one
            sequence.
    """
    import torch

    pieces = [torch.empty(0, dtype=torch.int32)]
    for file in files:
        ids = [id for chunk in _chunks(read_text(file, "TEXT")) for id in _encode(tokenizer, chunk)]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        pieces.append(torch.tensor(ids + end, dtype=torch.int32))
    token_ids = torch.cat(pieces)
    if token_ids.numel() < tokens:
        raise CommandError(
            f"--tokens {tokens} is more than all texts have, {token_ids.numel()}: give fewer "
            "tokens, or more text."
        )
    return Sequences(token_ids, tokens, seed)


def _encode(tokenizer: Any, chunk: str) -> list[int]:
    ids: list[int] = tokenizer(chunk, add_special_tokens=False, verbose=False).input_ids
    return ids


def _chunks(text: str) -> Iterator[str]:
    """The text in pieces that end with a line, where lines are short enough."""
    start = 0
    while start < len(text):
        stop = min(start + _CHUNK, len(text))
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop


def check_texts(files: Iterable[Path]) -> None:
    """Refuse texts that cannot be read, before anything slow begins.

    Raises:
        CommandError: see `read_sequences`.
    """
    for file in files:
        read_text(file, "TEXT")
