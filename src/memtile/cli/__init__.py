"""The command `memtile`: `main` runs it and gives the exit code."""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and gives its exit code.

    Args:
        arguments: The words after `memtile`; those of this process if None.
    """
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        sys.stderr.write(
            f"memtile: the command line needs {error.name}, which is not installed here; "
            "run: pip install 'memtile[cli]'\n"
        )
        return 2
    from memtile.cli.app import run

    return run(arguments)
