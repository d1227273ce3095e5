"""The training loop of a run: steps, log, checkpoints; a signal saves and stops it after a step."""

import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from torch import Tensor

from memtile.checkpoints import training_folder
from memtile.cli.errors import CommandError, Interrupted
from memtile.cli.finetune.backend import Backend
from memtile.cli.finetune.data_files import Data
from memtile.cli.finetune.display import Display
from memtile.cli.finetune.log import LOG, Log, LoggedStep
from memtile.cli.finetune.preparing import prepare
from memtile.cli.finetune.sequences import Sequences
from memtile.cli.finetune.settings import Options, TrainingSettings, is_first_rank
from memtile.convert import has_training
from memtile.engines.ranks import Ranks
from memtile.errors import NotFiniteError
from memtile.homes import keep_freed_memory_out
from memtile.observing import Observation, observe, totals
from memtile.testing import PeakMemory

TRAINING: Final = "training"
"""The folder, inside that of the run, from which it can be resumed."""


@dataclass(frozen=True)
class Result:
    """The steps that were done now, the peak memory above the imports, and the seconds."""

    entries: list[LoggedStep]
    peak_bytes: int
    seconds: float


@dataclass
class Run:
    """A model, its sequences, and how far the training is."""

    settings: TrainingSettings
    backend: Backend
    sequences: Sequences
    memory: PeakMemory
    out: Path | None = None  # None: nothing is written, and signals are not handled
    save_every: int = 1
    done: int = 0  # steps
    seen: int = 0  # sequences, of all ranks together
    validation: Sequences | None = None
    eval_steps: int = 1
    on_traced: Callable[[int, Observation], None] | None = None  # gets one step, by its number

    def step(self) -> LoggedStep:
        """One step more; a loss that is not finite leaves the weights unchanged."""
        backend = self.backend
        before, lr = replace(totals), float(backend.scheduler.get_last_lr()[0])
        started = time.perf_counter()
        loss = backend.loss(self._inputs(self.sequences, self.seen + backend.rank))
        value = sum(backend.of_all_ranks(float(loss.detach()))) / backend.ranks
        if not math.isfinite(value):  # before backward, which may step the weights with it
            raise self.refusal(f"the loss is {value}")
        backend.update(loss)
        self.done += 1
        self.seen += backend.ranks
        seconds = time.perf_counter() - started
        speed = self.settings.tokens * backend.ranks / seconds
        peak_bytes = max(backend.of_all_ranks(self.memory.nbytes))
        entry = LoggedStep(self.done, value, lr, seconds, speed, peak_bytes)
        if self.settings.engine is not None:  # which gathers tiles itself
            return entry
        waited, moving = totals.waited_ns - before.waited_ns, totals.moving_ns - before.moving_ns
        return replace(entry, waited_seconds=waited / 1e9, moving_seconds=moving / 1e9)

    def traced_step(self) -> LoggedStep:
        """A step that is observed, for `on_traced`."""
        assert self.on_traced is not None
        with observe() as seen:
            entry = self.step()
        self.on_traced(entry.step, seen)
        return entry

    def evaluate(self) -> float | None:
        """The loss on the validation data, a mean over tokens; None where it is not due."""
        if self.validation is None:
            return None
        if self.done % self.eval_steps and self.done != self.settings.steps:
            return None
        total, count, ranks = 0.0, 0, self.backend.ranks
        for first in range(0, len(self.validation), ranks):
            number = first + self.backend.rank  # past the end too: every rank takes part
            inputs = self._inputs(self.validation, number)
            loss = self.backend.evaluate(inputs)
            tokens = int((inputs["labels"][:, 1:] >= 0).sum()) * (number < len(self.validation))
            total, count = total + loss * tokens, count + tokens
        sums = self.backend.of_all_ranks((total, count))
        return sum(each for each, _ in sums) / sum(each for _, each in sums)

    def _inputs(self, sequences: Sequences, number: int) -> dict[str, Tensor]:
        inputs = sequences.inputs(number)
        return {name: each.to(self.backend.device) for name, each in inputs.items()}

    def resume(self, folder: Path) -> None:
        """Goes on from the last checkpoint; a run that was killed before its first begins anew."""
        if Ranks().first(lambda: has_training(folder)):
            found = self.backend.resume(folder)
            self.done = found.step
            self.seen = found.position.get("sequences", found.step)

    def save(self, folder: Path) -> None:
        """Saves a checkpoint; NotFiniteError leaves the one before unchanged."""
        self.backend.save(folder, self.done, {"sequences": self.seen})

    def refusal(self, what: str) -> CommandError:
        """The error for a number that is not finite, with what there is to go on from."""
        if self.out is None:
            lower = f"give a --lr below {self.settings.lr:g}"
            return CommandError(f"{what} at step {self.done + 1}: {lower}.")
        folder = self.out / TRAINING
        saved = has_training(folder)
        kept = f"the last good state is in {folder}" if saved else "nothing was saved before"
        return CommandError(
            f"{what} after {self.done} of {self.settings.steps} steps; {kept}: begin again in "
            f"another --out with an --lr below {self.settings.lr:g}."
        )


def finetune(
    settings: TrainingSettings, data: Sequence[Data], options: Options, display: Display
) -> Result:
    """Trains, saves, and writes the fine-tuned folder at the end; over ranks, each calls it.

    `data` is what to train on, then what to evaluate on, if there is any.
    """
    folder = options.out / TRAINING
    missing = [path for path in (options.out, *options.out.parents) if not path.exists()]
    session: AbstractContextManager[object]
    if settings.engine is None:
        session, keeps_leftovers = training_folder(folder), options.resume
    else:
        from memtile.cli.finetune import sharded

        sharded.load_engine(settings.engine)
        keep_freed_memory_out()
        session, keeps_leftovers = sharded.process_group(), options.resume or not is_first_rank()
    with (
        PeakMemory() as memory,
        session,
        _removed_if_it_fails(options.out, missing, keeps_leftovers),
    ):
        found = prepare(settings, data, options, memory, display)
        run = Run(
            settings,
            found.backend,
            found.sequences,
            memory,
            options.out,
            options.save_every,
            validation=found.validation,
            eval_steps=options.eval_steps,
        )
        if options.resume:
            run.resume(folder)
        else:
            Ranks().first(lambda: settings.write(options.out))
        display.started(run.done)
        if options.trace is not None:
            run.on_traced = display.traced
        result = train(run, display.report)
        run.backend.write(Path(settings.model), options.out)
    return result


def train(run: Run, report: Callable[[LoggedStep], None], until: int | None = None) -> Result:
    """Steps until the settings' end or `until`; `report` is called on the first rank.

    A number that is not finite is a CommandError, and the last checkpoint stays. A signal saves the
    run, and is raised as Interrupted.
    """
    last = run.settings.steps if until is None else until
    writes = run.backend.rank == 0
    log = Log(run.out, run.done) if run.out is not None and writes else None
    entries: list[LoggedStep] = []
    listening: AbstractContextManager[list[int]] = (
        nullcontext([]) if run.out is None else _signals()
    )
    traced = min(run.done + 2, last) if run.on_traced is not None else None  # the first one learns
    begun = time.perf_counter()
    try:
        with listening as signals:
            while run.done < last:
                entry = run.traced_step() if run.done + 1 == traced else run.step()
                entries.append(replace(entry, validation_loss=run.evaluate()))
                if log is not None:
                    log.add(entries[-1])
                if writes:
                    report(entries[-1])
                if run.out is not None:
                    _save_or_stop(run, run.out / TRAINING, signals)
    except NotFiniteError as error:
        raise run.refusal(str(error).partition(";")[0]) from error
    finally:
        if log is not None:
            log.close()
    return Result(entries, run.memory.nbytes, time.perf_counter() - begun)


def _save_or_stop(run: Run, folder: Path, signals: list[int]) -> None:
    ended = run.done == run.settings.steps
    stops = any(run.backend.of_all_ranks(bool(signals)))  # a checkpoint takes all ranks
    if stops or ended or run.done % run.save_every == 0:
        run.save(folder)
    if stops and not ended:
        raise Interrupted(
            f"Stopped and saved after step {run.done} of {run.settings.steps}; to go on, give the "
            "same command with --resume.",
            128 + (signals or [signal.SIGTERM])[0],
        )


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that gets the number of the first Ctrl-C or SIGTERM; another one stops at once."""
    came: list[int] = []
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: object) -> None:
        came.append(number)
        restore()

    for each in before:
        signal.signal(each, note)
    try:
        yield came
    finally:
        restore()


@contextmanager
def _removed_if_it_fails(out: Path, missing: list[Path], keeps: bool) -> Iterator[None]:
    """Removes what a run wrote that failed before its first step was done, unless `keeps`.

    `missing` are `out` and those of its parents that were not there before, the outermost last.
    """
    try:
        yield
    except BaseException:
        log = out / LOG
        if not keeps and not (log.is_file() and log.stat().st_size):
            _empty(out)
            if missing:
                shutil.rmtree(missing[-1], ignore_errors=True)
        raise


def _empty(folder: Path) -> None:
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
