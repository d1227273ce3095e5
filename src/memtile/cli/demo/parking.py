"""The home of the demo's tiled run: from a word on the command line, and into words again."""

from memtile.cli.errors import CommandError
from memtile.homes import DiskHome, Home, HostHome

_DISK = "disk"


def check_home(word: str) -> str:
    """The word, when it names a home.

    Raises:
        CommandError: It does not.
    """
    kind, colon, folder = word.partition(":")
    if word in (_DISK, "host", "none") or (kind == _DISK and colon and folder):
        return word
    raise CommandError(f"--home {word!r} is no home: give disk, disk:FOLDER, host or none.")


def make_home(word: str) -> Home | None:
    """The home that a checked word names; None where tiles stay in ordinary memory.

    Raises:
        HomeError: Tiles cannot live in that folder.
    """
    kind, _, folder = word.partition(":")
    if kind == _DISK:
        return DiskHome(folder or None)
    return HostHome() if kind == "host" else None


def describe_home(home: Home | None) -> str:
    """Where it is, and how it was reached, for the tables."""
    if home is None:
        return ""
    return f"{home!r} by {home.path}" if isinstance(home, DiskHome) else repr(home)
