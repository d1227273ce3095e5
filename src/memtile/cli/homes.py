"""Checks the `--home` option of a subcommand."""

from memtile.home_names import parse_home


def check_home(word: str, *more: str) -> str:
    """The word, when it is "disk", "disk:FOLDER", "host", or one of the others.

    Raises:
        ArgumentError: It is none of them.
    """
    parse_home(word, "--home ", ("disk", "disk:FOLDER", "host", *more), more=".")
    return word
