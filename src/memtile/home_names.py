"""The words that name a home, such as "disk", "host" and "checkpoint". Imports no torch."""

from collections.abc import Sequence
from typing import Final

from memtile.errors import ArgumentError

HOMES: Final = ("disk", "disk:FOLDER", "host", "device")
RANK_HOMES: Final = ("host", "disk", "disk:FOLDER")
"""Where the activations of a rank can be parked: its tiles are an engine's."""
IN_FILES: Final = "checkpoint"
"""Names the files that a model is filled from, where tiles may stay and are only read."""


def parse_home(
    word: object, label: str = "home=", known: Sequence[str] = HOMES, more: str = ""
) -> tuple[str, str | None]:
    """The kind of home that a word names, and the folder in it; None where it names no folder.

    Args:
        word: what the user gave.
        label: what the message begins with.
        known: words that have a meaning here.
        more: the end of the message.

    Raises:
        ArgumentError: it is none of the known words.
    """
    kind, colon, folder = word.partition(":") if isinstance(word, str) else ("", "", "")
    if kind in known and not colon:
        return kind, None
    if kind == "disk" and folder and "disk:FOLDER" in known:
        return kind, folder
    raise ArgumentError(
        f"{label}{word!r} is no home: it must be {', '.join(known[:-1])} or {known[-1]}{more}"
    )


def at_home(word: str) -> str:
    """Where what is parked there lives, as a phrase for tables."""
    kind, folder = parse_home(word, known=(*HOMES, IN_FILES))
    words = {"disk": "on disk", "host": "in host memory", "device": "on the device"}
    words[IN_FILES] = "in the checkpoint's files"
    return words[kind] + (f" in {folder}" if folder else "")
