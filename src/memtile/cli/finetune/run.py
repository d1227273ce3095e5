"""The run itself: loads, plans, trains, saves, and goes on where it was stopped."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

import memtile
from memtile.cli import models
from memtile.cli.errors import CommandError, Interrupted
from memtile.cli.finetune.adapters import with_adapters
from memtile.cli.finetune.log import Entry, Log
from memtile.cli.finetune.sequences import Sequences, read_sequences
from memtile.cli.finetune.settings import Settings
from memtile.testing import PeakMemory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from memtile.planning import Plan

_TRAINING: Final = "training"

Report = Callable[[Entry], None]


@dataclass(frozen=True)
class Options:
    """How a run is carried out, which changes none of its numbers.

    Args:
        out: its folder.
        budget: bytes above the imports.
        home: where tiles live: "disk", "disk:FOLDER" or "host".
        save_every: steps between checkpoints.
        resume: go on from the last one.
    """

    out: Path
    budget: int
    home: str
    save_every: int
    resume: bool


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        losses: of the steps that were done now.
        peak_bytes: the most memory, above the imports.
        seconds: they took.
    """

    losses: list[float]
    peak_bytes: int
    seconds: float


@dataclass
class _Run:
    """Everything that a step works with."""

    settings: Settings
    options: Options
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    optimizer: memtile.TileOptimizer
    scheduler: "torch.optim.lr_scheduler.LRScheduler"
    sequences: Sequences
    memory: PeakMemory
    done: int = 0


def finetune(
    settings: Settings,
    options: Options,
    planned: Callable[["Plan"], None],
    started: Callable[[int], None],
    report: Report,
) -> Result:
    """Trains, saves, and writes the fine-tuned folder at the end.

    Args:
        settings: what to train.
        options: how.
        planned: called with the plan.
        started: called with the number of steps that were done before.
        report: called after each step.

    Raises:
        CommandError: something given cannot be trained on or with, or the loss is not finite.
        BudgetError: nothing fits in the budget.
        CheckpointError: the model's or the run's checkpoint is damaged.
        Interrupted: a signal came; the run is saved.
    """
    with PeakMemory() as memory, memtile.training_folder(options.out / _TRAINING):
        run = _prepared(settings, options, memory, planned)
        if options.resume:
            _resume(run)
        else:
            settings.write(options.out)
        started(run.done)
        result = _train(run, report)
        _write_folder(run)
    return result


def _prepared(
    settings: Settings, options: Options, memory: PeakMemory, planned: Callable[["Plan"], None]
) -> _Run:
    torch.manual_seed(settings.seed)
    folder = Path(settings.model)
    tokenizer = models.tokenizer_of(folder)
    texts = [Path(text) for text in settings.texts]
    sequences = read_sequences(texts, tokenizer, settings.tokens, settings.seed)
    model = models.empty_of(folder)
    if settings.lora is not None:
        model = with_adapters(model, settings.lora)
    _check_vocabulary(model, sequences)
    with models.within(options.budget, memory.nbytes) as left:
        plan = memtile.plan(
            model,
            budget=left,
            tokens=settings.tokens,
            optimizer=torch.optim.AdamW,
            home=options.home,
            mode="in_backward",
        )
    planned(plan)
    memtile.tile(model, plan, checkpoint=folder)
    model.train()
    optimizer = memtile.TileOptimizer(model, torch.optim.AdamW, mode="in_backward", lr=settings.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    return _Run(settings, options, model, tokenizer, optimizer, scheduler, sequences, memory)


def _check_vocabulary(model: Any, sequences: Sequences) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if sequences.largest_id >= rows:
        raise CommandError(
            f"The tokenizer gives the id {sequences.largest_id}, and the model has {rows} rows for "
            "tokens: give the tokenizer that the model was trained with."
        )


def _resume(run: _Run) -> None:
    """Go on from the last checkpoint; a run that was killed before its first begins anew."""
    folder = run.options.out / _TRAINING
    if memtile.has_training(folder):
        resumed = memtile.resume_training(folder, run.model, run.optimizer, run.scheduler)
        run.done = resumed.step


def _train(run: _Run, report: Report) -> Result:
    log = Log(run.options.out, run.done)
    losses: list[float] = []
    begun = time.perf_counter()
    try:
        with _stopping() as stop:
            while run.done < run.settings.steps:
                entry = _step(run)
                losses.append(entry.loss)
                log.add(entry)
                report(entry)
                ended = run.done == run.settings.steps
                if stop or ended or run.done % run.options.save_every == 0:
                    _save(run)
                if stop and not ended:
                    raise Interrupted(_stopped(run), 128 + stop[0])
    finally:
        log.close()
    return Result(losses, run.memory.nbytes, time.perf_counter() - begun)


def _step(run: _Run) -> Entry:
    started, lr = time.perf_counter(), float(run.scheduler.get_last_lr()[0])
    ids = run.sequences.at(run.done)
    run.optimizer.zero_grad()
    loss = run.model(input_ids=ids, labels=ids, use_cache=False).loss
    value = float(loss.detach())
    if not math.isfinite(value):  # before backward, which would step the weights with it
        raise CommandError(_not_finite(run, value))
    loss.backward()
    run.optimizer.step()
    run.scheduler.step()
    run.done += 1
    seconds = time.perf_counter() - started
    speed = run.settings.tokens / seconds
    return Entry(run.done, value, lr, seconds, speed, run.memory.nbytes)


def _not_finite(run: _Run, value: float) -> str:
    out = run.options.out
    kept = f"the last good state is in {out / _TRAINING}"
    if not memtile.has_training(out / _TRAINING):
        kept = "nothing was saved before"
    return (
        f"The loss is {value} at step {run.done + 1}; {kept}: begin again in another --out with an "
        f"--lr below {run.settings.lr:g}."
    )


def _save(run: _Run) -> None:
    memtile.save_training(
        run.options.out / _TRAINING,
        run.model,
        run.optimizer,
        run.scheduler,
        step=run.done,
        position=run.sequences.position(run.done),
        trainable_only=run.settings.lora is not None,
    )


def _stopped(run: _Run) -> str:
    return (
        f"Stopped and saved after step {run.done} of {run.settings.steps}; to go on, give the same "
        "command with --resume."
    )


def _write_folder(run: _Run) -> None:
    """The fine-tuned model, or its adapters, as other libraries read them."""
    run.model.eval()
    if run.settings.lora is None:
        memtile.save_checkpoint(run.model, run.options.out)
    else:
        run.model.save_pretrained(str(run.options.out))
    run.tokenizer.save_pretrained(run.options.out)


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
