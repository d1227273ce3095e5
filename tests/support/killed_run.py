"""A process that trains a small parked model, saves after each step, and may be killed any time.

Run as a script, `killed_run.py FOLDER` forks one such process for each line that it reads, a number
of steps to train up to: it has imported everything before, so they begin at once. It prints the
process's id, and, once that is gone, its exit code.
"""

import os
import sys
from pathlib import Path

import torch
from resumable import Run, a_run

import memtile

KEEP = 2


def begin() -> Run:
    """The run as it begins, in every process."""
    torch.set_num_threads(1)
    return a_run("disk")


def go_on(folder: Path, until: int) -> None:
    """Resume where there is something to resume; train and save up to a step."""
    run = begin()
    with memtile.training_folder(folder):
        if memtile.has_training(folder):
            run.resume(folder)
        while run.done < until:
            run.train(1)
            run.save(folder, position=run.done, keep=KEEP)


def serve(folder: Path) -> None:
    """Fork the processes that are asked for, one after the other."""
    torch.set_num_threads(1)
    a_run().train(1)  # torch imports much at the first step; without a home no thread is started
    for line in sys.stdin:
        process = os.fork()
        if not process:
            go_on(folder, int(line))
            os._exit(0)
        print(process, flush=True)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
