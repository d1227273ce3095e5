"""Parked models and processes that fork."""

import subprocess
import sys

SCRIPT = """
import os, sys, torch, memtile
from torch import nn
from memtile.homes import DiskHome

torch.set_num_threads(1)
torch.manual_seed(0)
model = memtile.tile(
    nn.Sequential(nn.Linear(13, 29), nn.Tanh(), nn.Linear(29, 7)), out_splits=4, home=DiskHome()
)
x = torch.randn(5, 13)
for _ in range(2):
    expected = model(x)  # reads ahead for a backward while the fork happens
child = os.fork()
if not child:
    good = all(torch.equal(model(x), expected) for _ in range(3))
    with torch.no_grad():
        good = good and torch.equal(model(x), expected)
    os._exit(0 if good else 1)
_, status = os.waitpid(child, 0)
expected.sum().backward()
assert torch.equal(model(x), expected)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_forked_child_runs_forward():
    """It has none of its parent's reader threads, and starts its own; the parent goes on."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, timeout=120
    )

    assert done.returncode == 0, done.stderr.decode()
