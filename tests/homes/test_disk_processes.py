"""A home on disk and other processes: killed ones, forked ones."""

import os
import signal
import subprocess
import sys

_PARK = """
import os, sys, torch
from memtile.errors import HomeError
from memtile.homes import DiskHome, aligned_buffer, berth_of, settle_in

torch.set_num_threads(1)  # OpenMP's threads do not survive a fork: the child would hang
folder = sys.argv[1]
homes = [DiskHome(folder), DiskHome(folder, keep=True)]
settled = [settle_in(home, torch.arange(100_000)) for home in homes]
for tensor in settled:
    berth_of(tensor).label = "tile"
"""

_FORK = """
child = os.fork()
if not child:
    code = 1
    for home, tensor in zip(homes, settled):
        assert torch.equal(tensor, torch.arange(100_000))
        berth_of(tensor).read(aligned_buffer(berth_of(tensor).room))
        try:
            home.berth((1,), torch.float32)
        except HomeError:
            code = 0
        home.close()
    del home, homes, tensor, settled
    os._exit(code)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert os.listdir(folder) == []
for home, tensor in zip(homes, settled):
    berth_of(tensor).read(aligned_buffer(berth_of(tensor).room))
    home.close()
assert os.listdir(folder) == ["tiles.memtile"]
"""

_WAIT = """
print("parked", flush=True)
sys.stdin.read()
"""


def test_a_killed_process_leaves_no_file(tmp_path):
    """After kill -9 nothing is left of its homes, kept or not, and their room is free again."""
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
    """A child may read tiles; it parks nothing, seals nothing, and closes only what is its own."""
    script = [sys.executable, "-c", _PARK + _FORK, str(tmp_path)]

    done = subprocess.run(script, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
