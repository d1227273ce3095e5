"""What one run is: written into its folder at the start, and compared when it is continued."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from memtile.checkpoints import Checkpoint, write_text
from memtile.cli.errors import CommandError

_NAME: Final = "finetune.json"
_PIECE: Final = 4 << 20
_BESIDE: Final = ("config.json", "*token*", "vocab*", "merges*", "*.model")  # the tokenizer's files


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of a run, and nothing else.

    Args:
        model: the folder that it begins with.
        texts: files to learn from, in order.
        steps: optimizer steps in all.
        tokens: in a step, one sequence.
        lr: learning rate of the first step; it falls to 0 along a cosine.
        seed: of the order of sequences and of dropout.
        lora: rank of the adapters; None: all weights are trained.
        digests: of each text, and of what tells the model from another.
        engine: that holds shards; None: one process by itself.

    Raises:
        CommandError: a number that makes no sense.
    """

    model: str
    texts: tuple[str, ...]
    steps: int
    tokens: int
    lr: float
    seed: int
    lora: int | None = None
    digests: tuple[str, ...] = ()
    engine: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("tokens", 2), ("seed", 0), ("lora", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise CommandError(f"--{name} {value} is too few: give {least} or more.")
        if self.seed >= 1 << 63:
            raise CommandError(f"--seed {self.seed} is too large: give one below 2^63.")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise CommandError(
                f"--lr {self.lr} is no learning rate: give one above 0, such as 1e-5."
            )

    def write(self, out: Path) -> None:
        """Leave them in the run's folder."""
        write_text(out / _NAME, json.dumps(asdict(self), indent=2) + "\n")

    def check_continues(self, out: Path) -> None:
        """Refuse to continue a run with other numbers than its own.

        Raises:
            CommandError: there is no run in the folder, or its settings are others.
        """
        theirs = _read(out)
        for field in fields(self):
            ours, old = getattr(self, field.name), getattr(theirs, field.name)
            if field.name == "engine" and ours and old:
                continue  # they share checkpoints
            if ours != old and field.name == "digests":
                raise CommandError(
                    f"the texts or the model are not those that the run in {out} was begun with: "
                    "restore them, or begin in another --out."
                )
            if ours != old:
                raise CommandError(
                    f"{out} holds a run with {_option(field.name)} {_or_none(old)}, and this is "
                    f"{_or_none(ours)}: give "
                    "what it was begun with, or another --out."
                )


def holds_run(out: Path) -> bool:
    """Whether a run was begun in the folder."""
    return (out / _NAME).is_file()


def _read(out: Path) -> Settings:
    try:
        found: dict[str, Any] = json.loads((out / _NAME).read_bytes())  # JSON
        lists = {name: tuple(found[name]) for name in ("texts", "digests")}
        return Settings(**{**found, **lists})
    except FileNotFoundError as error:
        raise CommandError(
            f"--resume: {out} holds no run; begin one without --resume, or give its --out."
        ) from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CommandError(
            f"{out / _NAME} cannot be read ({error}): restore it, or begin in another --out."
        ) from error


def digests(
    model: Path,
    texts: Sequence[Path],
    with_weights: bool,
    heard: Callable[[int], None] = lambda nbytes: None,
) -> tuple[str, ...]:
    """What tells these files from others: of the model together, then of each text.

    Args:
        model: its config and its tokenizer are read, whole.
        texts: the same.
        with_weights: read the weights too, since they go on mattering where a run's checkpoints
            have adapters only. Otherwise their sizes do: a run has its weights from its own
            checkpoint, and one without a checkpoint begins anew.
        heard: called with the bytes of each piece that was read.

    Raises:
        CheckpointError: the model has no weights that can be read.
    """
    known: dict[str, object] = {
        path.name: _digest(path, heard)
        for pattern in _BESIDE
        for path in sorted(model.glob(pattern))
        if path.is_file()
    }
    for path in weight_files(model):
        known[path.name] = _digest(path, heard) if with_weights else path.stat().st_size
    together = hashlib.sha256(repr(sorted(known.items())).encode()).hexdigest()
    return (together, *(_digest(text, heard) for text in texts))


def weight_files(model: Path) -> list[Path]:
    """The files of a model's folder that its weights are read from."""
    return [file.path for file in Checkpoint.open(model).files]


def _digest(file: Path, heard: Callable[[int], None]) -> str:
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(_PIECE):
            found.update(piece)
            heard(len(piece))
    return found.hexdigest()


def _or_none(value: object) -> str:
    return "none" if value is None else str(value)


def _option(name: str) -> str:
    return {"model": "MODEL", "texts": "TEXT"}.get(name, f"--{name}")
