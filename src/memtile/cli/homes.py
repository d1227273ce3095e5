"""The word on the command line that names a home."""

from memtile.cli.errors import CommandError


def check_home(word: str, *more: str) -> str:
    """The word, when it is "disk", "disk:FOLDER", "host", or one of the others.

    Raises:
        CommandError: It is none of them.
    """
    kind, colon, folder = word.partition(":")
    if word in ("disk", "host", *more) or (kind == "disk" and colon and folder):
        return word
    known = ", ".join(("disk", "disk:FOLDER", "host", *more))
    raise CommandError(f"--home {word!r} is no home: give one of {known}.")
