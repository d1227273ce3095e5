"""What the library of products keeps, in a fresh process: it is taken once and never again."""

import os
import subprocess
import sys

CODE = """
import os
import torch
from memtile.convert.workspaces import take_workspace
from memtile.homes import keep_freed_memory_out
from memtile.planning import Products

def resident_bytes():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

keep_freed_memory_out()
torch.mm(torch.ones(64, 64), torch.ones(64, 64))
before = resident_bytes()
take_workspace(Products({first}, 0))
taken = resident_bytes()
for columns in (700, 3000, 6000, 12000):
    for rows in (64, 600):
        torch.mm(torch.empty(rows, 576), torch.empty(columns, 576).t())
print(taken - before, resident_bytes() - taken)
"""


def taken(first):
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(first=first)],
        capture_output=True,
        text=True,
        env=dict(os.environ),
        check=True,
    )
    return [int(word) for word in done.stdout.split()]


def test_after_the_largest_workspace_no_other_is_taken():
    """Ever wider products leave nothing more behind, once the largest was made."""
    at_first, later = taken("2000, 12000")

    assert at_first < 32 << 20
    assert later < 2 << 20


def test_no_workspace_is_taken_where_there_is_no_product():
    """A plan whose products are all in 16 bits has no float32 workspace."""
    assert taken("0, 0")[0] < 1 << 20
