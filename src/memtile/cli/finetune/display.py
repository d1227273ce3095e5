"""What a run prints: the plan's summary, and a bar or a line for each step."""

from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from memtile.cli.finetune.limits import bound_by
from memtile.cli.finetune.log import LoggedStep
from memtile.cli.terminal import saved_trace
from memtile.costmodel import format_byte_size
from memtile.observing import Observation

_BETWEEN_LINES: Final = 16 << 20  # bytes of text, tens of seconds


class Display:
    """Shows a run: a bar on a terminal, else a line a step; `limit` follows each peak.

    What was observed of a step is saved to `trace` at the end: drawing takes memory.
    """

    def __init__(
        self, console: Console, steps: int, limit: str = "", trace: Path | None = None
    ) -> None:
        self._console, self._steps, self._limit = console, steps, limit
        self._read, self._trace = 0, trace
        self._seen: tuple[int, Observation] | None = None
        hidden = console.quiet or not console.is_terminal
        sizes, left = TextColumn("{task.description}"), TimeRemainingColumn()
        self._texts = Progress(
            BarColumn(), sizes, left, console=console, transient=True, disable=hidden
        )
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), sizes, left)
        self._bar = Progress(*columns, console=console, disable=hidden)
        self._step = self._bar.add_task("", total=steps)

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *raised: object) -> None:
        self._texts.stop()
        self._bar.stop()
        if self._seen is not None and self._trace is not None:
            step, seen = self._seen
            self._console.print(f"step {step}, observed:", seen)
            self.say(saved_trace(seen, self._trace))

    def reading(self, done: int, total: int) -> None:
        """Shows how many bytes of the data were read; a few show nothing."""
        words = f"reading the data: {format_byte_size(done)} of {format_byte_size(total)}"
        if self._console.is_terminal:
            if not self._texts.tasks:
                self._texts.start()
                self._texts.add_task("", total=total)
            self._texts.update(self._texts.tasks[0].id, completed=done, description=words)
        elif done // _BETWEEN_LINES > self._read // _BETWEEN_LINES:
            self._console.print(words, soft_wrap=True)
        self._read = done
        if done == total:
            self._texts.stop()
            for task in self._texts.task_ids:
                self._texts.remove_task(task)

    def say(self, sentence: str) -> None:
        """Prints a sentence on the data or on the plan."""
        self._console.print(sentence, soft_wrap=True)

    def started(self, done: int) -> None:
        """Begins the bar after the steps that are done."""
        if done == self._steps:
            self._console.print("all steps are done already")
        elif done:
            self._console.print(f"going on after step {done}")
        self._bar.update(self._step, completed=done)
        self._bar.start()

    def report(self, entry: LoggedStep) -> None:
        """Shows a step."""
        used = format_byte_size(entry.peak_bytes) + self._limit
        checked = entry.validation_loss
        more = "" if checked is None else f" (validation {checked:.3f})"
        words = f"loss {entry.loss:.3f}{more}, {entry.tokens_per_second:.0f} tokens/s, {used}"
        bound = bound_by(entry)
        if bound is not None:
            words += f", bound by {bound}"
        if not self._console.is_terminal:
            self._console.print(f"step {entry.step} of {self._steps}: {words}", soft_wrap=True)
        else:
            self._bar.update(self._step, completed=entry.step, description=words)

    def traced(self, step: int, seen: Observation) -> None:
        """Keeps what was observed of a step."""
        self._seen = step, seen
