"""Plain text files that a command is given."""

from pathlib import Path

from memtile.cli.errors import CommandError


def read_text(file: Path, name: str) -> str:
    """The text of a file.

    Args:
        file: in UTF-8.
        name: of the argument that gave it, for messages.

    Raises:
        CommandError: it is missing, binary or empty.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise CommandError(f"{name} {file} cannot be read ({reason}): give plain text.") from error
    if "\0" in text:
        raise CommandError(f"{name} {file} holds zero bytes, as binary files do: give plain text.")
    if not text.strip():
        raise CommandError(f"{name} {file} is empty: give a text file.")
    return text
