"""What a run begins with: its model, planned and loaded, and its data as sequences of tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memtile.cli import models
from memtile.cli.errors import CommandError
from memtile.cli.finetune.backend import Backend, check_rank, load
from memtile.cli.finetune.data_files import Data
from memtile.cli.finetune.display import Display
from memtile.cli.finetune.sequences import Sequences, read_sequences
from memtile.cli.finetune.settings import Options, TrainingSettings, tokenizer_digest
from memtile.cli.finetune.token_store import key_of
from memtile.testing import PeakMemory


@dataclass(frozen=True)
class Prepared:
    """The model of a run, and its sequences."""

    backend: Backend
    sequences: Sequences
    validation: Sequences | None


def prepare(
    settings: TrainingSettings,
    data: Sequence[Data],
    options: Options,
    memory: PeakMemory,
    display: Display,
) -> Prepared:
    """Reads the data and loads the model; `display` gets the plan's sentences before the data's."""
    torch.manual_seed(settings.seed)
    path = Path(settings.model)
    model = models.empty_of(path, options.trusts_code)
    if settings.engine != "zero3":  # which scales the loss
        _check_dtype(model)
    tokenizer = models.tokenizer_of(path, options.trusts_code)
    models.check_length(model, settings.tokens, f"--tokens {settings.tokens}")
    if settings.lora is not None:
        check_rank(model, settings.lora)
    said: list[str] = []  # of the data, to be shown once the plan is there too
    sequences, *others = _sequences(
        settings, data, tokenizer, options.cache, display.reading, said.append
    )
    for each in (sequences, *others):
        _check_vocabulary(model, each)
    backend = _loaded(model, settings, options, memory, display.say)
    for sentence in said:
        display.say(sentence)
    return Prepared(backend, sequences, others[0] if others else None)


def _loaded(
    model: Any,  # of transformers
    settings: TrainingSettings,
    options: Options,
    memory: PeakMemory,
    say: Callable[[str], None],
) -> Backend:
    if settings.engine is None:
        return load(model, settings, options, memory, say)
    from memtile.cli.finetune import sharded

    return sharded.load(model, settings, options, say)


def _sequences(
    settings: TrainingSettings,
    data: Sequence[Data],
    tokenizer: Any,  # transformers'
    cache: Path,
    on_read: Callable[[int, int], None],
    on_stored: Callable[[str], None],
) -> list[Sequences]:
    """Those to train on in the order of the seed, those to evaluate on in their own."""
    digests = iter(settings.digests[1:])
    maker = (version("transformers"), tokenizer_digest(Path(settings.model)))
    length = None if settings.packing else settings.tokens
    made: list[Sequences] = []
    for each in data:
        of_files = [next(digests) for _ in each.files]
        made.append(
            read_sequences(
                each,
                tokenizer,
                settings.tokens,
                None if made else settings.seed,
                packs=settings.packing,
                cache=cache,
                key=key_of(*maker, each.kind, each.columns, of_files, length),
                on_read=on_read,
                on_stored=on_stored,
            )
        )
    return made


def _check_dtype(model: nn.Module) -> None:
    if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        raise CommandError(
            "MODEL is float16, in which gradients overflow without a scaler, and none can be used "
            'where weights are stepped in backward: write "dtype": "bfloat16" into its '
            "config.json, and its weights are converted as they are read."
        )


def _check_vocabulary(model: Any, sequences: Sequences) -> None:  # transformers'
    rows = model.get_input_embeddings().weight.shape[0]
    if sequences.largest_id >= rows:
        raise CommandError(
            f"The tokenizer gives the id {sequences.largest_id}, and the model has {rows} rows for "
            "tokens: give the tokenizer that the model was trained with."
        )
