"""A home on disk and other processes: killed ones, forked ones."""

import os
import signal
import subprocess
import sys

_PARK = """
import os, sys, torch
from memtile.errors import HomeError
from memtile.homes import DiskHome, aligned_buffer, allocation_of, allocate_copy

torch.set_num_threads(1)  # OpenMP's threads do not survive a fork: the child would hang
folder = sys.argv[1]
home = DiskHome(folder)
parked = allocate_copy(home, torch.arange(100_000))
"""

_FORK = """
child = os.fork()
if not child:
    code = 1
    assert torch.equal(parked, torch.arange(100_000))
    allocation_of(parked).read(aligned_buffer(allocation_of(parked).room))
    try:
        home.allocate((1,), torch.float32)
    except HomeError:
        code = 0
    home.close()
    del home, parked
    os._exit(code)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
allocation_of(parked).read(aligned_buffer(allocation_of(parked).room))
home.close()
"""

_WAIT = """
print("parked", flush=True)
sys.stdin.read()
"""


def test_a_killed_process_leaves_no_file(tmp_path):
    """After kill -9 nothing is left of its home, and its room is free again."""
    process = subprocess.Popen(
        [sys.executable, "-c", _PARK + _WAIT, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout.readline() == b"parked\n"
        process.send_signal(signal.SIGKILL)

    assert process.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == []


def test_a_forked_process_reads_and_takes_nothing_away(tmp_path):
    """A child may read tiles; it parks nothing, and closes only what is its own."""
    script = [sys.executable, "-c", _PARK + _FORK, str(tmp_path)]

    done = subprocess.run(script, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
