"""What the library of products keeps: as much as is measured on this machine for these products."""

import json
import os
import random
import subprocess
import sys

import pytest

from memtile.costmodel import Products
from memtile.planner.product_memory import Workspaces

SHAPES = [
    (rows, depth, columns)
    for columns in (700, 3000, 12001)
    for rows, depth in ((64, 576), (300, 385), (300, 1500))
]
ORDERS = {
    "narrow first": SHAPES,
    "wide first": SHAPES[::-1],
    "mixed": [*SHAPES],
    "small": [(5, 700, 3001)],
}
random.Random(0).shuffle(ORDERS["mixed"])
CODE = """
import json, os, sys, torch
from memtile.convert import multiply, take_workspace
from memtile.homes import keep_freed_memory_out, trim_heap
from memtile.planner.machine_rates import private_bytes
from memtile.costmodel import Products

keep_freed_memory_out()
for shapes in json.loads(sys.argv[1]):
    if not os.fork():
        torch.mm(torch.ones(1, 1024), torch.ones(1024, 1024))
        before = private_bytes()
        take_workspace(Products(tuple(map(tuple, shapes)), 0))
        for _ in range(3):
            for shape in shapes:
                multiply(*shape)
        trim_heap()
        print(private_bytes() - before, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def kept():
    """Gives what three steps of products leave in memory, for each order, without the planner."""
    command = [sys.executable, "-c", CODE, json.dumps(list(ORDERS.values()))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return dict(zip(ORDERS, map(int, done.stdout.split()), strict=True))


@pytest.fixture(scope="module")
def known():
    """Gives what the planner measured for all orders."""
    with Workspaces({}) as workspaces:
        for order in ORDERS.values():
            workspaces(Products(tuple(order), 0))
    return workspaces.known


@pytest.fixture
def foreseen(known):
    """Gives what the planner predicts, without measuring again."""
    return lambda order: Workspaces(known)(Products(tuple(ORDERS[order]), 0))


@pytest.mark.parametrize("order", ORDERS)
def test_products_keep_what_was_measured_for_them(kept, foreseen, order):
    """The prediction is right to a MiB, or to a sixteenth, the margin of a plan."""
    expected = foreseen(order)

    assert abs(kept[order] - expected) <= max(1 << 20, expected // 16)


def test_each_question_begins_with_nothing_kept(foreseen, kept):
    """After all the large products, a small one is still predicted to keep what it keeps alone."""
    assert abs(foreseen("small") - kept["small"]) <= 1 << 18
    assert foreseen("small") <= foreseen("mixed") // 2


def test_what_is_known_is_not_measured_again(known):
    """A saved measurement starts no process."""
    with Workspaces(dict.fromkeys(known, 123)) as workspaces:
        assert workspaces(Products(tuple(SHAPES), 0)) == 123
        assert workspaces._process is None


def test_small_products_are_not_measured():
    """Neither are those of a 16-bit model, whose float32 products are few and small."""
    with Workspaces({}) as workspaces:
        assert workspaces(Products((), 9)) == 0
        assert 0 < workspaces(Products(((64, 1, 32),), 9)) < 1 << 20
        assert workspaces._process is None
