"""Plain text files that a command is given."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from memtile.cli.errors import CommandError

PIECE: Final = 1 << 16
"""Characters that are read at once, so that memory stays small."""


def read_text(file: Path, name: str) -> str:
    """The text of a file; see `text_pieces`."""
    return "".join(text_pieces(file, name))


def text_pieces(file: Path, name: str, characters: int = PIECE) -> Iterator[str]:
    """The text of a file, in pieces of so many characters, cut anywhere.

    Args:
        file: in UTF-8.
        name: of the argument that gave it, for messages.
        characters: of a piece; the last one may have fewer.

    Raises:
        CommandError: it is missing, binary or empty; as soon as that is seen.
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
        raise CommandError(f"{name} {file} is empty: give a text file.")
