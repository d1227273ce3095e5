"""What a person sees of a run: the plan's summary, and a bar or a line for each step."""

from types import TracebackType
from typing import Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from memtile.cli.finetune.log import Entry
from memtile.planning import format_byte_size

_SAID: Final = 16 << 20  # bytes of text between two lines in a log: tens of seconds


class Display:
    """Shows a run as it goes; on a terminal one bar, in a log one line a step.

    Args:
        console: where to.
        steps: in all.
        budget: in bytes; None: there is none.
    """

    def __init__(self, console: Console, steps: int, budget: int | None = None) -> None:
        self._console, self._steps, self._budget = console, steps, budget
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console,
            disable=console.quiet or not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._read = 0
        self._texts = Progress(
            TextColumn("reading the texts"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=console.quiet or not console.is_terminal,
        )

    def __enter__(self) -> "Display":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._texts.stop()
        self._bar.stop()

    def reading(self, done: int, total: int) -> None:
        """Show how many bytes of the texts are tokens by now; texts of a moment show nothing."""
        if self._console.is_terminal:
            if not self._texts.tasks:
                self._texts.start()
                self._texts.add_task("", total=total)
            self._texts.update(self._texts.tasks[0].id, completed=done)
        elif done // _SAID > self._read // _SAID:
            sizes = f"{format_byte_size(done)} of {format_byte_size(total)}"
            self._console.print(f"reading the texts: {sizes}", soft_wrap=True)
        self._read = done
        if done == total:
            self._texts.stop()

    def planned(self, summary: str) -> None:
        """Print what the plan comes to."""
        self._console.print(summary, soft_wrap=True)

    def started(self, done: int) -> None:
        """Begin the bar where the run begins."""
        if done == self._steps:
            self._console.print("all steps are done already")
        elif done:
            self._console.print(f"going on after step {done}")
        self._bar.start()
        self._task = self._bar.add_task("", total=self._steps, completed=done)

    def report(self, entry: Entry) -> None:
        """Show a step."""
        limit = "a rank" if self._budget is None else f"of {format_byte_size(self._budget)}"
        used = f"{format_byte_size(entry.peak_bytes)} {limit}"
        words = f"loss {entry.loss:.3f}, {entry.tokens_per_second:.0f} tokens/s, {used}"
        if not self._console.is_terminal:
            self._console.print(f"step {entry.step} of {self._steps}: {words}", soft_wrap=True)
        elif self._task is not None:
            self._bar.update(self._task, completed=entry.step, description=words)
