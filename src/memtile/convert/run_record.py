"""What a training checkpoint's record says of a run besides its tensors: written, and compared."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from memtile.checkpoints.exact_json import to_json
from memtile.errors import ArgumentError, CheckpointError

Json = dict[str, Any]  # of the record: whatever JSON it has


class Scheduler(Protocol):
    """Anything whose state can be saved and loaded, as torch's schedulers."""

    def state_dict(self) -> dict[str, Any]:
        """The state: numbers, texts, lists and dictionaries."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take such a state over."""


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on: `position` and `extra` are what `save_training` was given.

    Attributes:
        step: the number of steps that are done.
        folder: the checkpoint that was taken.
    """

    step: int
    position: Any  # any JSON
    extra: Any  # any JSON
    folder: Path


def check_numbers(step: object, keep: object) -> None:
    """Refuse wrong numbers of steps and of checkpoints."""
    for name, value, least, what in (
        ("step", step, 0, "a number of steps: 0 or more"),
        ("keep", keep, 1, "how many checkpoints stay: 1 or more"),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ArgumentError(f"{name}={value!r} must be {what}, an int")


def run_record(given: Mapping[str, object], scheduler: Scheduler | None) -> Json:
    """What a checkpoint's record says of a run: what is given, by name, and its scheduler."""
    record: Json = {name: to_json(value, name) for name, value in given.items()}
    record["scheduler"] = None
    if scheduler is not None:
        state = to_json(scheduler.state_dict(), "the scheduler's state_dict()")
        record["scheduler"] = {"class": _class_name(scheduler), "state": state}
    return record


def _class_name(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def check_scheduler(saved: Json | None, scheduler: Scheduler | None, place: Path) -> None:
    """Refuse a scheduler of another class than the one that was saved."""
    theirs = "no scheduler" if saved is None else saved["class"]
    ours = "no scheduler" if scheduler is None else _class_name(scheduler)
    if ours != theirs:
        raise CheckpointError(
            f"{place} was saved with {theirs}, and is to be resumed with {ours}: give "
            "resume_training what save_training was given"
        )
