"""The home of the demo's tiled run: from a word on the command line, and into words again."""

from memtile.homes import DiskHome, Home, resolve_home


def make_home(word: str) -> Home | None:
    """The home that a checked word names; None where tiles stay in ordinary memory.

    Raises:
        HomeError: Tiles cannot live in that folder.
    """
    return None if word == "none" else resolve_home(word)


def describe_home(home: Home | None) -> str:
    """Where it is, and how it was reached, for the tables."""
    if home is None:
        return ""
    return f"{home!r} by {home.path}" if isinstance(home, DiskHome) else repr(home)
