"""What one run is: written into its folder at the start, and compared when it is continued."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from memtile.checkpoints import write_text
from memtile.cli.errors import CommandError

_NAME: Final = "finetune.json"


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

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("tokens", 2), ("seed", 0), ("lora", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise CommandError(f"--{name} {value} is too few: give {least} or more.")
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
            if ours != old:
                raise CommandError(
                    f"{out} holds a run with {_option(field.name)} {old}, and this is {ours}: give "
                    "what it was begun with, or another --out."
                )


def holds_run(out: Path) -> bool:
    """Whether a run was begun in the folder."""
    return (out / _NAME).is_file()


def _read(out: Path) -> Settings:
    try:
        found: dict[str, Any] = json.loads((out / _NAME).read_bytes())  # JSON
        return Settings(**{**found, "texts": tuple(found["texts"])})
    except FileNotFoundError as error:
        raise CommandError(
            f"--resume: {out} holds no run; begin one without --resume, or give its --out."
        ) from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CommandError(
            f"{out / _NAME} cannot be read ({error}): restore it, or begin in another --out."
        ) from error


def _option(name: str) -> str:
    return {"model": "MODEL", "texts": "TEXT"}.get(name, f"--{name}")
