"""A run in one process: loads, plans, trains within the budget, saves."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

import memtile
from memtile.checkpoints import training_folder
from memtile.cli import models
from memtile.cli.errors import CommandError
from memtile.cli.finetune.adapters import with_adapters
from memtile.cli.finetune.log import Entry
from memtile.cli.finetune.loop import (
    TRAINING,
    Report,
    Result,
    Run,
    first_missing,
    nothing_left_of_a_failed_start,
    train,
)
from memtile.cli.finetune.sequences import Heard, Sequences, read_sequences
from memtile.cli.finetune.settings import Settings
from memtile.convert import has_training
from memtile.testing import PeakMemory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OTHERS: Final = "tokenizer, texts and adapters"


@dataclass(frozen=True)
class Options:
    """How a run is carried out, which changes none of its numbers.

    Args:
        out: its folder.
        budget: bytes above the imports.
        home: where tiles live: "disk", "disk:FOLDER" or "host".
        save_every: steps between checkpoints.
        resume: go on from the last one.
        strict: refuse a folder that holds more than the model has, or lacks a head.
        trusts_code: whether code of the model's folder may run.
    """

    out: Path
    budget: int
    home: str
    save_every: int
    resume: bool
    strict: bool = False
    trusts_code: bool = False


def finetune(
    settings: Settings,
    options: Options,
    heard: Heard,
    planned: Callable[[str], None],
    started: Callable[[int], None],
    report: Report,
) -> Result:
    """Trains, saves, and writes the fine-tuned folder at the end.

    Args:
        settings: what to train.
        options: how.
        heard: called as the texts are read.
        planned: called with sentences on the plan.
        started: called with the number of steps that were done before.
        report: called after each step.

    Raises:
        CommandError: something given cannot be trained on or with, or the loss is not finite.
        BudgetError: nothing fits in the budget.
        CheckpointError: the model's or the run's checkpoint is damaged.
        Interrupted: a signal came; the run is saved.
    """
    made = first_missing(options.out)
    with (
        PeakMemory() as memory,
        training_folder(options.out / TRAINING),
        nothing_left_of_a_failed_start(options.out, made, options.resume),
    ):
        run = _PlannedRun(settings, options, memory, heard, planned)
        if options.resume:
            run.resume()
        else:
            settings.write(options.out)
        started(run.done)
        result = train(run, report)
        run.write_folder()
    return result


class _PlannedRun(Run):
    """A model whose tiles live where its plan says, stepped in backward."""

    def __init__(
        self,
        settings: Settings,
        options: Options,
        memory: PeakMemory,
        heard: Heard,
        planned: Callable[[str], None],
    ) -> None:
        super().__init__(settings, options.out, options.save_every, memory)
        torch.manual_seed(settings.seed)
        folder = Path(settings.model)
        model = models.empty_of(folder, options.trusts_code)
        with suppress(CommandError):  # they are no part of training: at worst, transformers' own
            models.read_settings(model, folder)
        check_dtype(model)
        _, self._sequences = texts_of(settings, options.out / TRAINING, heard, options.trusts_code)
        if settings.lora is not None:
            model = with_adapters(model, settings.lora)
        check_vocabulary(model, self._sequences)
        models.check_length(model, settings.tokens, f"--tokens {settings.tokens}")
        with models.within(options.budget, memory.nbytes, _OTHERS) as left:
            plan = memtile.plan(
                model,
                budget=left,
                tokens=settings.tokens,
                optimizer=torch.optim.AdamW,
                home=options.home,
                mode="in_backward",
            )
        planned(plan.summary)
        planned(models.taken(options.budget, options.budget - left, _OTHERS))
        with models.told():
            memtile.tile(model, plan, checkpoint=folder, strict=options.strict)
        self._model = model.train()
        self._optimizer = memtile.TileOptimizer(
            model, torch.optim.AdamW, mode="in_backward", lr=settings.lr
        )
        self._scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            self._optimizer, settings.steps
        )

    def resume(self) -> None:
        folder = self.out / TRAINING
        if has_training(folder):
            resumed = memtile.resume_training(folder, self._model, self._optimizer, self._scheduler)
            self.done = resumed.step

    def has_saved(self) -> bool:
        return has_training(self.out / TRAINING)

    def step(self) -> Entry:
        started, lr = time.perf_counter(), float(self._scheduler.get_last_lr()[0])
        ids = self._sequences.at(self.done)
        self._optimizer.zero_grad()
        loss = self._model(input_ids=ids, labels=ids, use_cache=False).loss
        value = float(loss.detach())
        self.check_finite(value)  # before backward, which would step the weights with it
        loss.backward()
        self._optimizer.step()
        self._scheduler.step()
        self.done += 1
        seconds = time.perf_counter() - started
        speed = self.settings.tokens / seconds
        return Entry(self.done, value, lr, seconds, speed, self.memory.nbytes)

    def save(self) -> None:
        memtile.save_training(
            self.out / TRAINING,
            self._model,
            self._optimizer,
            self._scheduler,
            step=self.done,
            position=self._sequences.position(self.done),
            trainable_only=self.settings.lora is not None,
        )

    def write_folder(self) -> None:
        """The fine-tuned model, or its adapters."""
        self._model.eval()
        if self.settings.lora is None:
            memtile.save_checkpoint(self._model, self.out)
        else:
            self._model.save_pretrained(str(self.out))
        models.carry_tokenizer(Path(self.settings.model), self.out)


def texts_of(
    settings: Settings, folder: Path, heard: Heard, trusts_code: bool = False
) -> tuple["PreTrainedTokenizerBase", Sequences]:
    """The tokenizer of a run's model, and its texts in tokens.

    Args:
        settings: of the run.
        folder: for a file of the tokens, which has no name.
        heard: called as the texts are read.
        trusts_code: whether code of the model's folder may run.

    Raises:
        CommandError: the folder has no tokenizer, the texts are too short, or the tokens find no
            room.
    """
    tokenizer = models.tokenizer_of(Path(settings.model), trusts_code)
    texts = [Path(text) for text in settings.texts]
    read = read_sequences(texts, tokenizer, settings.tokens, settings.seed, folder, heard)
    return tokenizer, read


def check_dtype(model: nn.Module) -> None:
    """Refuse a model that is trained in float16.

    Raises:
        CommandError: it is.
    """
    if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        raise CommandError(
            "MODEL is float16, in which gradients overflow without a scaler, and none can be used "
            'where weights are stepped in backward: write "dtype": "bfloat16" into its '
            "config.json, and its weights are converted as they are read."
        )


def check_vocabulary(model: Any, sequences: Sequences) -> None:  # transformers' or peft's
    """Refuse texts with ids that the model has no rows for.

    Raises:
        CommandError: they have.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if sequences.largest_id >= rows:
        raise CommandError(
            f"The tokenizer gives the id {sequences.largest_id}, and the model has {rows} rows for "
            "tokens: give the tokenizer that the model was trained with."
        )
