"""The loop of a run: a step, a line for it, checkpoints, and an end in good order when one asks."""

import math
import shutil
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from memtile.cli.errors import CommandError, Interrupted
from memtile.cli.finetune.log import NAME as LOG
from memtile.cli.finetune.log import Entry, Log
from memtile.cli.finetune.settings import Settings
from memtile.errors import NotFiniteError
from memtile.testing import PeakMemory

TRAINING: Final = "training"
"""The folder, inside that of the run, from which it can go on."""

Report = Callable[[Entry], None]


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        first: number of the first step that was done now.
        losses: of the steps that were done now.
        peak_bytes: the most memory, above the imports.
        seconds: they took.
    """

    first: int
    losses: list[float]
    peak_bytes: int
    seconds: float


class Run(ABC):
    """What the loop works with: a model that is trained in this process, or over ranks.

    Args:
        settings: what to train.
        out: the run's folder.
        save_every: steps between checkpoints.
        memory: of this process.

    Attributes:
        done: steps so far.
        writes: whether this process is the one that logs and draws.
    """

    writes = True

    def __init__(self, settings: Settings, out: Path, save_every: int, memory: PeakMemory) -> None:
        self.settings, self.out, self.save_every, self.memory = settings, out, save_every, memory
        self.done = 0

    @abstractmethod
    def resume(self) -> None:
        """Go on from the last checkpoint; a run that was killed before its first begins anew."""

    @abstractmethod
    def step(self) -> Entry:
        """One step more.

        Raises:
            CommandError: the loss is not finite; the weights are as they were.
            NotFiniteError: a gradient is not; some weights may have been stepped.
        """

    @abstractmethod
    def save(self) -> None:
        """Leave a checkpoint from which the run can go on.

        Raises:
            NotFiniteError: it could not; the one before is as it was.
        """

    @abstractmethod
    def write_folder(self) -> None:
        """Leave the fine-tuned model as other libraries read it."""

    @abstractmethod
    def has_saved(self) -> bool:
        """Whether there is a checkpoint."""

    def is_to_stop(self, asked: bool) -> bool:
        """Whether the run ends after this step, where this process was asked to or not."""
        return asked

    def check_finite(self, loss: float) -> None:
        """Refuse to train on a loss that is no number.

        Raises:
            CommandError: it is none.
        """
        if not math.isfinite(loss):
            raise self.refusal(f"the loss is {loss}")

    def refusal(self, what: str) -> CommandError:
        """The end of a run that met what is no number, with what there is to go on from."""
        kept = f"the last good state is in {self.out / TRAINING}"
        if not self.has_saved():
            kept = "nothing was saved before"
        return CommandError(
            f"{what} after {self.done} of {self.settings.steps} steps; {kept}: begin again in "
            f"another --out with an --lr below {self.settings.lr:g}."
        )


def train(run: Run, report: Report) -> Result:
    """Step until the end, or until somebody asks to stop.

    Raises:
        CommandError: a loss, a gradient or a weight is not finite; the last checkpoint stays.
        Interrupted: somebody did; the run is saved.
    """
    log = Log(run.out, run.done) if run.writes else None
    losses: list[float] = []
    first = run.done + 1
    begun = time.perf_counter()
    try:
        with _stopping() as came:
            while run.done < run.settings.steps:
                entry = run.step()
                losses.append(entry.loss)
                if log is not None:
                    log.add(entry)
                    report(entry)
                ended = run.done == run.settings.steps
                stops = run.is_to_stop(bool(came))
                if stops or ended or run.done % run.save_every == 0:
                    run.save()
                if stops and not ended:
                    raise Interrupted(_stopped(run), 128 + (came or [signal.SIGTERM])[0])
    except NotFiniteError as error:
        raise run.refusal(str(error).partition(";")[0]) from error
    finally:
        if log is not None:
            log.close()
    return Result(first, losses, run.memory.nbytes, time.perf_counter() - begun)


def first_missing(folder: Path) -> Path | None:
    """The outermost of the folders that have to be made for this one; None: it is there."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    return missing[-1] if missing else None


@contextmanager
def nothing_left_of_a_failed_start(out: Path, made: Path | None, was_begun: bool) -> Iterator[None]:
    """Remove what a run wrote that ended before its first step was done.

    Args:
        out: the run's folder; what is in it is this run's, where nothing was begun before.
        made: what `first_missing` said before it was made.
        was_begun: whether the folder holds a run, or is another process's to remove: nothing is.
    """
    try:
        yield
    except BaseException:
        log = out / LOG
        if not was_begun and not (log.is_file() and log.stat().st_size):
            _empty(out)
            if made is not None:
                shutil.rmtree(made, ignore_errors=True)
        raise


def _empty(folder: Path) -> None:
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _stopped(run: Run) -> str:
    return (
        f"Stopped and saved after step {run.done} of {run.settings.steps}; to go on, give the same "
        "command with --resume."
    )


@contextmanager
def _stopping() -> Iterator[list[int]]:
    """A list that gets the number of the first Ctrl-C or SIGTERM; another one stops at once."""
    came: list[int] = []
    before: dict[int, Any] = {}  # handlers as the signal module has them

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: object) -> None:
        came.append(number)
        restore()

    for each in (signal.SIGINT, signal.SIGTERM):
        before[each] = signal.signal(each, note)
    try:
        yield came
    finally:
        restore()
