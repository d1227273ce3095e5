"""Options as a record, --json, progress bars, and Ctrl-C and SIGTERM as errors."""

import inspect
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from memtile.cli.errors import Interrupted
from memtile.errors import ArgumentError
from memtile.observing import Observation

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document instead.")]
Trace = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Record one step: .json for Perfetto, or .png, a picture."),
]
_Record = TypeVar("_Record")


def with_options(
    record: type[_Record],
) -> Callable[[Callable[[_Record], int]], Callable[..., int]]:
    """Makes a function of a dataclass a command whose options are the fields."""

    def command_of(run: Callable[[_Record], int]) -> Callable[..., int]:
        @wraps(run)
        def command(**given: Any) -> int:  # as typer parsed them
            return run(record(**given))

        command.__signature__ = inspect.signature(record)  # type: ignore[attr-defined]  # typer's
        return command

    return command_of


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


def saved_trace(seen: Observation, path: Path) -> str:
    """Saves what was observed, and says where; or why not: that undoes none of what was done."""
    try:
        seen.save(path)
    except (OSError, ArgumentError) as error:
        return f"the trace could not be saved to {path}: {error}"
    return f"the trace is in {path}"


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
