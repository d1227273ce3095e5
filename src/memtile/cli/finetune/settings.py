"""The settings of a run: written into its folder at the start, compared when it is resumed."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal

from memtile.checkpoints import Checkpoint, replace_file
from memtile.cli.errors import CommandError, check_at_least, check_learning_rate, check_seed

_NAME: Final = "finetune.json"
_PIECE: Final = 4 << 20
_READ_WHOLE: Final = ("config.json", "*token*", "vocab*", "merges*", "*.model")
_TEMPLATES: Final = ("chat_template*", "additional_chat_templates/*")
_ARGUMENTS: Final = {"model": "MODEL", "data": "DATA", "packing": "packing"}
SCHEDULES: Final = ("constant", "linear", "cosine")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a run is carried out, which changes none of its numbers."""

    budget: int  # bytes above the imports
    home: str  # of the tiles: "disk", "disk:FOLDER" or "host"
    strict: bool  # refuse a folder that holds more than the model has, or lacks a head
    trusts_code: bool  # whether code of the folder may run
    out: Path  # its folder, which all ranks see
    save_every: int  # steps between checkpoints
    resume: bool  # go on from the last one
    tile_bytes: int  # the largest tile, over ranks
    offload: bool  # over ranks, keep shards, gradients and moments in host memory
    cache: Path  # where tokens are kept
    eval_steps: int  # steps between two evaluations
    trace: Path | None = None  # file for what one step did; None: it is not observed


@dataclass(frozen=True)
class TrainingSettings:
    """Everything that decides the numbers of a run, and nothing else; checked when it is made."""

    model: str  # its folder
    data: tuple[str, ...]  # files to train on, in order
    steps: int  # of the optimizer, in all
    tokens: int  # in a step, one sequence
    lr: float  # of the first step
    seed: int  # of the order of sequences and of dropout
    lora: int | None = None  # rank of the adapters; None: all weights are trained
    digests: tuple[str, ...] = ()  # of the model, then of each file to train on and to evaluate on
    engine: str | None = None  # that holds shards; None: one process
    validation: tuple[str, ...] = ()  # files whose loss is shown
    packing: bool = True  # of texts; conversations and completions are never packed
    clip: float | None = None  # the norm that gradients are scaled down to; None: they are not
    warmup: int = 0  # first steps, in which the learning rate rises from 0
    schedule: str = "cosine"  # of the learning rate after that, one of SCHEDULES

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("tokens", 2), ("lora", 1), ("warmup", 0)):
            value = getattr(self, name)
            if value is not None:
                check_at_least(f"--{name}", value, least)
        check_seed(self.seed)
        check_learning_rate(self.lr)
        if self.warmup >= self.steps and self.warmup:
            raise CommandError(
                f"--warmup {self.warmup} leaves none of --steps {self.steps} at the full learning "
                "rate: give fewer."
            )
        if self.clip is not None and not (math.isfinite(self.clip) and self.clip > 0):
            raise CommandError(f"--clip {self.clip} is no norm: give one above 0, such as 1.0.")

    @property
    def mode(self) -> Literal["classic", "in_backward"]:
        """Of the optimizer: clipping takes the gradients of all weights before the first step."""
        return "in_backward" if self.clip is None else "classic"

    def write(self, out: Path) -> None:
        """Writes them into the run's folder."""
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / _NAME, json.dumps(asdict(self), indent=2) + "\n")

    def check_continues(self, out: Path) -> None:
        """Refuses to resume a run with other settings than its own."""
        saved = _read(out)
        for field in sorted(fields(self), key=lambda field: field.name == "digests"):  # at last
            ours, old = getattr(self, field.name), getattr(saved, field.name)
            if field.name == "engine" and ours and old:
                continue  # they share checkpoints
            if ours != old and field.name == "digests":
                raise CommandError(
                    f"the data or the model are not those that the run in {out} was begun with: "
                    "restore them, or begin in another --out."
                )
            if ours != old:
                option = _ARGUMENTS.get(field.name, f"--{field.name}")
                theirs, ours = (_said(value) for value in (old, ours))
                raise CommandError(
                    f"{out} holds a run with {option} {theirs}, and this is {ours}: give what it "
                    "was begun with, or another --out."
                )


def is_first_rank() -> bool:
    """Whether this process, by its launcher's environment, is the one that prints."""
    return os.environ.get("RANK", "0") == "0"


def holds_run(out: Path) -> bool:
    """Whether a run was begun in the folder."""
    return (out / _NAME).is_file()


def _read(out: Path) -> TrainingSettings:
    try:
        found: dict[str, Any] = json.loads((out / _NAME).read_bytes())  # JSON
        if "texts" in found:  # as it was called before data could be anything else
            found["data"] = found.pop("texts")
        lists = {name: tuple(found.get(name, ())) for name in ("data", "digests", "validation")}
        return TrainingSettings(**{**found, **lists})
    except FileNotFoundError as error:
        raise CommandError(
            f"--resume: {out} holds no run; begin one without --resume, or give its --out."
        ) from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CommandError(
            f"{out / _NAME} cannot be read ({error}): restore it, or begin in another --out."
        ) from error


def _said(value: object) -> object:
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else value


def digests(
    model: Path,
    data: Sequence[Path],
    with_weights: bool,
    with_template: bool = False,
    on_read: Callable[[int], None] = lambda nbytes: None,
) -> tuple[str, ...]:
    """SHA-256 of the model's config and tokenizer together, then of each file of data.

    Of weights the sizes count, since a run has them in its own checkpoints; a run whose checkpoints
    have adapters only needs `with_weights`. `on_read` gets the size of each piece that was read.
    """
    known: dict[str, object] = {
        path.name: _digest(path, on_read)
        for pattern in (*_READ_WHOLE, *(_TEMPLATES if with_template else ()))
        for path in sorted(model.glob(pattern))
        if path.is_file()
    }
    for path in weight_files(model):
        known[path.name] = _digest(path, on_read) if with_weights else path.stat().st_size
    together = hashlib.sha256(repr(sorted(known.items())).encode()).hexdigest()
    return (together, *(_digest(file, on_read) for file in data))


def tokenizer_digest(model: Path) -> str:
    """SHA-256 of config, tokenizer and chat templates: all that tokens depend on but the data."""
    found = {
        path.relative_to(model).as_posix(): _digest(path, lambda nbytes: None)
        for pattern in (*_READ_WHOLE, *_TEMPLATES)
        for path in sorted(model.glob(pattern))
        if path.is_file()
    }
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()


def weight_files(model: Path) -> list[Path]:
    """The files that a model's weights are read from."""
    return [file.path for file in Checkpoint.open(model).files]


def _digest(file: Path, on_read: Callable[[int], None]) -> str:
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(_PIECE):
            found.update(piece)
            on_read(len(piece))
    return found.hexdigest()
