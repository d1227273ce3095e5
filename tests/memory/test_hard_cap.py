"""A model of 5 GiB of weights, gradients and moments trains within 512 MiB, enforced by the kernel.

Linux only, needs 6 GiB of disk in /var/tmp and, for the run to compare with, 7 GiB of memory.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import capped_training as capped
import pytest

SCRIPT = Path(capped.__file__)
FOLDER = Path("/var/tmp")
GIB = 1 << 30


def run(side, cap):
    arguments = [sys.executable, str(SCRIPT), side, cap, str(FOLDER)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return json.loads(done.stdout)


def can_make_a_cgroup():
    code = "import capped_training as c\nwith c.memory_cgroup(): pass"
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
    return (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, env=environment, check=False
        ).returncode
        == 0
    )


@pytest.fixture(scope="module")
def dense_losses():
    """Gives the losses of the dense model in memory, without any limit."""
    memory = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    if memory < 7 * GIB or shutil.disk_usage(FOLDER).free < 7 * GIB:
        pytest.skip("needs 7 GiB of free memory for the dense run, and of disk for the tiled one")
    return run("dense", "none")["losses"]


def test_the_model_is_as_large_as_it_says():
    """Weights, gradients and two moments in float32 are 5 GiB."""
    assert capped.STATE_BYTES >= 5 * GIB


@pytest.mark.parametrize("mode", ["in_backward", "classic"])
def test_training_on_disk_stays_within_a_hard_cap(dense_losses, mode):
    """Five AdamW steps under the kernel's limit, no piece above a tile, the dense run's losses.

    In a memory cgroup, which counts cached pages of the home too, where one can be made; else with
    RLIMIT_DATA, and private memory sampled.
    """
    capped_run = run(mode, "cgroup" if can_make_a_cgroup() else "rlimit")

    assert capped_run["losses"] == pytest.approx(dense_losses, rel=1e-5)
    assert capped_run["private_bytes"] <= capped.CAP_BYTES
    assert capped_run["largest_bytes"] <= capped.TILE_BYTES, capped_run["largest_op"]
