"""What a person sees of a run: the plan's summary, and a bar or a line for each step."""

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from memtile.cli.finetune.log import Entry
from memtile.planning import format_byte_size


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

    def __enter__(self) -> "Display":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

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
