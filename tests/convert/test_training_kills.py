"""A run that is killed at any moment is whole, can be resumed, and ends as if it never had been.

MEMTILE_KILLS says how often it is killed; the moments are drawn from a seed.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import killed_run
import pytest
import torch
from killed_run import KEEP, begin, go_on
from resumable import all_of, differences

import memtile
from memtile.checkpoints import steps

KILLS = int(os.environ.get("MEMTILE_KILLS", "15"))
LONGEST = 0.4  # seconds that a process lives: its start, its resume, and some saved steps
FOREVER = 1000  # steps: more than it lives, and an end if the test does not come to kill it


class Processes:
    """Processes in the middle of the run, one at a time."""

    def __init__(self, folder):
        paths = [str(Path(memtile.__file__).parents[1]), str(Path(killed_run.__file__).parent)]
        self._server = subprocess.Popen(
            [sys.executable, killed_run.__file__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )

    def start(self, until):
        """Begin one that trains up to a step; its id, once there is one."""
        self._server.stdin.write(f"{until}\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def exit_code(self):
        """Of the last one, once it is gone."""
        return int(self._server.stdout.readline())

    def close(self):
        """End what forks them."""
        self._server.kill()
        self._server.communicate()


@pytest.fixture
def processes(tmp_path):
    """Gives processes that save into the folder "run", and sets torch's threads back."""
    threads, started = torch.get_num_threads(), Processes(tmp_path / "run")
    yield started
    started.close()
    torch.set_num_threads(threads)


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


def test_every_kill_leaves_a_whole_checkpoint(tmp_path, processes):
    """After each kill -9 the newest one resumes, bit for bit; the end is the uninterrupted one."""
    folder, moments = tmp_path / "run", random.Random(11)
    uninterrupted, reached, while_saving = Uninterrupted(), [0], 0
    go_on(folder, 1)
    for _ in range(KILLS):
        process = processes.start(FOREVER)
        time.sleep(moments.uniform(0, LONGEST))
        os.kill(process, signal.SIGKILL)

        assert processes.exit_code() == -signal.SIGKILL
        while_saving += bool(steps.leftovers(folder))
        reached.append(check_newest(folder, uninterrupted))
    processes.start(reached[-1] + 3)

    assert processes.exit_code() == 0
    assert check_newest(folder, uninterrupted) == reached[-1] + 3
    assert reached == sorted(reached)
    assert len(steps.saved_steps(folder)) <= KEEP
    assert steps.leftovers(folder) == []
    print(f"{KILLS} kills, {while_saving} while saving, after steps {reached[1:]}")


def test_a_process_may_be_killed_before_it_saves(tmp_path, processes):
    """There is nothing to resume then, and the next one begins."""
    process = processes.start(FOREVER)
    os.kill(process, signal.SIGKILL)
    assert processes.exit_code() == -signal.SIGKILL
    assert not memtile.has_training(tmp_path / "run")

    processes.start(2)

    assert processes.exit_code() == 0
    assert check_newest(tmp_path / "run", Uninterrupted()) == 2
