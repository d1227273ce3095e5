"""A run that is killed at any moment is whole, can be resumed, and ends as if it never had been.

MEMTILE_KILLS says how often it is killed; the moments are drawn from a seed.
"""

import os
import random
import signal
import time

import torch
from killed_run import KEEP, begin, go_on
from processes import started
from resumable import all_of, differences

from memtile.checkpoints import steps
from memtile.convert import has_training

KILLS = int(os.environ.get("MEMTILE_KILLS", "15"))
LONGEST = 0.4  # seconds that a process lives: its start, its resume, and some saved steps
FOREVER = 1000  # steps: more than it lives, and an end if the test does not come to kill it


def start(folder, until):
    """Begins a process in the middle of the run, which trains up to a step."""
    return started(go_on, folder, until)


def exit_code(process):
    """The exit code, once the process has ended."""
    process.join()
    return process.exitcode


class Uninterrupted:
    """The run to compare with: nobody kills or saves it, and it goes on from step to step."""

    def __init__(self):
        self.run = begin()
        self.random = random.getstate(), torch.get_rng_state()

    def at(self, step):
        """Everything of it after so many steps."""
        random.setstate(self.random[0])
        torch.set_rng_state(self.random[1])
        self.run.train(step - self.run.done)
        self.random = random.getstate(), torch.get_rng_state()
        return all_of(self.run)


def check_newest(folder, uninterrupted):
    """The newest checkpoint is whole and is the uninterrupted run at its step; which step it is."""
    run = begin()
    resumed = run.resume(folder)
    found = all_of(run)

    assert resumed.position == resumed.step
    assert differences(found, uninterrupted.at(resumed.step)) == []
    return resumed.step


def test_every_kill_leaves_a_whole_checkpoint(tmp_path):
    """After each kill -9 the newest one resumes, bit for bit; the end is the uninterrupted one."""
    folder, moments = tmp_path / "run", random.Random(11)
    uninterrupted, reached, while_saving = Uninterrupted(), [0], 0
    go_on(folder, 1)
    for _ in range(KILLS):
        process = start(folder, FOREVER)
        time.sleep(moments.uniform(0, LONGEST))
        process.kill()

        assert exit_code(process) == -signal.SIGKILL
        while_saving += bool(steps.leftovers(folder))
        reached.append(check_newest(folder, uninterrupted))
    last = start(folder, reached[-1] + 3)

    assert exit_code(last) == 0
    assert check_newest(folder, uninterrupted) == reached[-1] + 3
    assert reached == sorted(reached)
    assert len(steps.saved_steps(folder)) <= KEEP
    assert steps.leftovers(folder) == []
    print(f"{KILLS} kills, {while_saving} while saving, after steps {reached[1:]}")


def test_a_process_may_be_killed_before_it_saves(tmp_path):
    """After a kill before the first save there is nothing to resume, and the run starts anew."""
    process = start(tmp_path / "run", FOREVER)
    process.kill()
    assert exit_code(process) == -signal.SIGKILL
    assert not has_training(tmp_path / "run")

    second = start(tmp_path / "run", 2)

    assert exit_code(second) == 0
    assert check_newest(tmp_path / "run", Uninterrupted()) == 2
