"""A model trains within a cap of a fifth to a tenth of its state, enforced by the kernel.

By default 512 MiB of weights, gradients and moments within 96 MiB; the slow one is of 5 GiB within
512 MiB. Linux only; needs the state and a fifth more of disk in /var/tmp, and of memory for the run
to compare with.
"""

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import capped_training as capped
import pytest

from memtile.transfer.iterations import SLABS

SCRIPT = Path(capped.__file__)
FOLDER = Path("/var/tmp")
LARGE = pytest.param("in_backward", "large", marks=[pytest.mark.slow, pytest.mark.timeout(1800)])


def run(side, cap, size):
    arguments = [sys.executable, str(SCRIPT), side, cap, str(FOLDER), size]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def dense_losses():
    """Gives a function: the losses of a dense model in memory, without any limit."""

    @functools.lru_cache
    def losses(size):
        needed = capped.SIZES[size].state_bytes * 6 // 5
        line = Path("/proc/meminfo").read_text().split("MemAvailable:")[1]
        free = min(int(line.split()[0]) * 1024, shutil.disk_usage(FOLDER).free)
        if free < needed:
            pytest.skip(f"needs {needed >> 20} MiB of free memory, and of disk in {FOLDER}")
        return run("dense", "none", size)["losses"]

    return losses


def test_the_models_are_as_large_as_they_say():
    """Weights, gradients and two moments in float32 are 512 MiB and 5 GiB."""
    assert capped.SIZES["small"].state_bytes >= 512 << 20
    assert capped.SIZES["large"].state_bytes >= 5 << 30


@pytest.mark.parametrize(("mode", "size"), [("in_backward", "small"), ("classic", "small"), LARGE])
def test_training_on_disk_stays_within_a_hard_cap(dense_losses, mode, size):
    """AdamW steps under the kernel's limit, no piece above a tile, the dense run's losses.

    Both modes in the small size, and the large size in one mode.
    In a memory cgroup, which counts cached pages of the home too, where one can be made; else with
    RLIMIT_DATA, and private memory sampled.
    """
    found = within_the_cap(dense_losses(size), mode, size)

    assert found["largest_bytes"] <= capped.SIZES[size].tile_bytes, found["largest_op"]


def within_the_cap(expected, mode, size):
    """What a run prints that had the dense run's losses and took no more than its cap."""
    found = run(mode, "cgroup" if capped.can_make_a_cgroup() else "rlimit", size)
    assert found["losses"] == pytest.approx(expected, rel=1e-5)
    assert found["private_bytes"] <= capped.SIZES[size].cap_bytes
    return found


@pytest.mark.slow
def test_an_mlp_of_ten_times_the_cap_reads_each_tile_twice_a_step(dense_losses):
    """Once in forward and once in backward, where its step finds it; the turn keeps a few."""
    size = capped.SIZES["mlp"]
    assert size.state_bytes == 10 * size.cap_bytes
    reads = within_the_cap(dense_losses("mlp"), "in_backward", "mlp")["reads"]

    assert len(reads) == size.state_bytes // size.tile_bytes
    assert max(reads) == 2 * size.steps
    assert sum(times < 2 * size.steps for times in reads) <= 3 * SLABS  # each holds three tiles
