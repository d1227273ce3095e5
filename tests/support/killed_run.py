"""A process that trains a small parked model, saves after each step, and may be killed any time."""

from pathlib import Path

from resumable import Run, a_run

from memtile.checkpoints import training_folder
from memtile.convert import has_training

KEEP = 2


def begin() -> Run:
    """The run as it begins, in every process."""
    return a_run("disk")


def go_on(folder: Path, until: int) -> None:
    """Resume where there is something to resume; train and save up to a step."""
    run = begin()
    with training_folder(folder):
        if has_training(folder):
            run.resume(folder)
        while run.done < until:
            run.train(1)
            run.save(folder, position=run.done, keep=KEEP)
