"""The batches of the demo: consecutive stretches of one text, the same for every run."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from memtile.cli.errors import CommandError
from memtile.cli.texts import read_text

if TYPE_CHECKING:
    import torch

SHIPPED_TEXT: Final = Path(__file__).with_name("pride_and_prejudice.txt")


def text_of(file: Path) -> str:
    """The text of `file`; in the shipped one, without the lines on top that name its source.

    Raises:
        CommandError: If it cannot be read as UTF-8 text.
    """
    text = read_text(file, "--text")
    if file == SHIPPED_TEXT:
        text = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    return text.strip()


def cut_batches(
    text: str,
    tokenizer: Any,  # a transformers tokenizer, which this package does not import to name its type
    batches: int,
    tokens: int,
) -> "list[torch.Tensor]":
    """The first `batches` stretches of `tokens` tokens each, as int64 tensors of shape (1, tokens).

    Raises:
        CommandError: If the text has fewer tokens than that.
    """
    token_ids = tokenizer(text, return_tensors="pt").input_ids
    found = token_ids.shape[1]
    if found < batches * tokens:
        fewer = f"--tokens {found // batches} or " if found >= 2 * batches else ""
        raise CommandError(
            f"--tokens {tokens} needs {batches * tokens} for {batches} batches, and the text "
            f"has {found}: give {fewer}a longer --text."
        )
    return [token_ids[:, start * tokens : (start + 1) * tokens] for start in range(batches)]
