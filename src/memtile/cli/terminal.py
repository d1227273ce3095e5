"""The option --json, progress bars, and Ctrl-C and SIGTERM as errors."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from memtile.cli.errors import Interrupted

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document instead.")]


@contextmanager
def interruptible() -> Iterator[None]:
    """Turns Ctrl-C and SIGTERM into an error, so that workers are stopped and files removed."""

    def stop(number: int, frame: object) -> None:
        raise Interrupted("Terminated.", 128 + number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("Interrupted.", 130) from None
    finally:
        signal.signal(signal.SIGTERM, previous)


def progress() -> Progress:
    """Bars on stderr, removed at the end; nothing where stderr is no terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,  # in a log, bars are noise
    )
